"""The forward KL over trie slots with its gradient in closed form; what a kernel replaces.

With m the student's mass of a slot, up to a factor per item, and q the teacher's probability there,

    loss = sum q (log q - log m) + log sum m,    d loss / d m = 1 / sum m - q / m,

both sums over the item's valid slots. Where the student has the tokens below a node, m of a slot is
the sum over its tokens, and d m / d logit = exp(logit). Where it says the next piece, m is the
probability of a child, and of all else for END; the softmax's own term, sum m (d loss / d m), is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.losses.prefix_kl.slots import END, SlotLayout, SlotTargets


@torch.no_grad()
def forward_kl_below(
    layout: SlotLayout, targets: SlotTargets, logits: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor] | None:
    """
    Args:
        logits: [K] the student's, of the tokens below the items' nodes.
        seed: [N] factor of each item's loss in the gradient.

    Returns: [N] nats and [K] gradient; None where a mass is so small that it has lost its digits,
        or is no number: these are for `SlotTargets.divergence`, which stays in log space.
    """
    top = logits.new_full((len(layout),), -torch.inf)
    top.scatter_reduce_(0, layout.token_item, logits, "amax")
    exps = torch.exp(logits - top[layout.token_item])
    mass = logits.new_zeros(len(layout.item)).index_add_(0, layout.token_slot, exps)
    made = _over_slots(layout, targets, mass, seed)
    return None if made is None else (made[0], exps * made[1][layout.token_slot])


@torch.no_grad()
def forward_kl_next(
    layout: SlotLayout, targets: SlotTargets, logits: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor] | None:
    """
    Args:
        logits: [N, V] the student's row after each item's prefix.
        seed: [N] factor of each item's loss in the gradient.

    Returns: [N] nats and [N, V] gradient; None as `forward_kl_below`.
    """
    probs = torch.softmax(logits, 1)
    inside = layout.child
    at = (layout.item[inside], layout.piece[inside])
    children = probs[at]
    # Summed without the children, never 1 minus their sum: that would lose a small END.
    rest = probs.index_put_(at, probs.new_zeros(())).sum(1)
    mass = rest[layout.item].masked_scatter_(inside, children)
    made = _over_slots(layout, targets, mass, seed)
    if made is None:
        return None
    loss, slope = made
    on_end = layout.piece == END
    end = slope.new_zeros(len(layout)).index_add_(0, layout.item[on_end], slope[on_end])
    return loss, probs.mul_(end[:, None]).index_put_(at, children * slope[inside])


def _over_slots(
    layout: SlotLayout, targets: SlotTargets, mass: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor] | None:
    """[N] loss and [S] `seed` times its gradient by the mass [S] of each slot, which is changed."""
    item, count = layout.item, len(layout)
    # A teacher in float64 beside a student that is none.
    probs, negentropy = targets.probs.to(mass.dtype), targets.negentropy.to(mass.dtype)
    mass.masked_fill_(~targets.valid, 1.0)
    if not bool((mass >= torch.finfo(mass.dtype).tiny * 1e6).all()):
        return None
    total = mass.new_zeros(count).index_add_(0, item, mass * targets.valid)
    total.masked_fill_(~targets.counted, 1.0)
    cross = mass.new_zeros(count).index_add_(0, item, probs * torch.log(mass))
    loss = negentropy - cross + torch.log(total)
    slope = (torch.reciprocal(total)[item] - probs / mass) * targets.valid
    return loss, slope * seed[item]
