"""The forward KL over trie slots with its gradient in closed form; what a kernel replaces.

With m the student's mass of a slot, up to a factor an item, and q the teacher's probability there,

    loss = sum q (log q - log m) + log sum m,    d loss / d m = 1 / sum m - q / m,

both sums over the item's valid slots, and d m / d logit = exp(logit) for the tokens in the slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .prefix_slots import SlotLayout, SlotTargets


@torch.no_grad()
def forward_kl(
    layout: SlotLayout, targets: SlotTargets, logits: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor] | None:
    """
    Args:
        logits: [K] the student's, of the tokens below the items' nodes.
        seed: [N] factor of each item's loss in the gradient.

    Returns: [N] nats and [K] gradient; None where a mass is so small that it has lost its digits,
        or is no number: these are for `SlotTargets.divergence`, which stays in log space.
    """
    item, count = layout.item, len(layout)
    top = logits.new_full((count,), -torch.inf)
    top.scatter_reduce_(0, layout.token_item, logits, "amax")
    exps = torch.exp(logits - top[layout.token_item])
    mass = logits.new_zeros(len(item)).index_add_(0, layout.token_slot, exps)
    mass.masked_fill_(~targets.valid, 1.0)
    if not bool((mass >= torch.finfo(mass.dtype).tiny * 1e6).all()):
        return None
    total = mass.new_zeros(count).index_add_(0, item, mass * targets.valid)
    total.masked_fill_(~targets.counted, 1.0)
    cross = mass.new_zeros(count).index_add_(0, item, targets.probs * torch.log(mass))
    loss = targets.negentropy - cross + torch.log(total)
    grad_mass = (torch.reciprocal(total)[item] - targets.probs / mass) * targets.valid
    return loss, exps * (grad_mass * seed[item])[layout.token_slot]
