"""What the models say of a text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from xtoken.data.examples import Ids
from xtoken.errors import NonFiniteError, PairError
from xtoken.teachers.causal import causal_logits
from xtoken.vocab.head_size import least_columns, most_columns
from xtoken.vocab.side import Side

# Rows of the vocabulary's width that are turned into probabilities at a time.
_ROWS = 64


@torch.no_grad()
def text_logits(model: nn.Module, side: Side, ids: Ids) -> Tensor:
    """A model's logits [1, T, V'] of a text.

    Args:
        model: of the side.
        ids: [T] of the text.

    Raises:
        PairError: the model is of another tokenizer.
        OptionError: the text is longer than the model has positions.
        NonFiniteError: the model predicts NaN or +inf.
    """
    size, columns = len(side.vocab), int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    # Some lack a few columns for tokens that no text reaches; more are padding.
    fits = least_columns(size) <= columns <= most_columns(size)
    if not fits or int(ids.max(initial=0)) >= columns:
        raise PairError(
            f"the {side.name}'s tokenizer has {size} tokens, its model {columns} columns; this is "
            "another model's tokenizer: pass the model that belongs to it"
        )
    rows = torch.from_numpy(np.array(ids))[None]
    logits = causal_logits(model.eval(), rows, torch.ones_like(rows)).float()
    wrong = (logits.isnan() | logits.isposinf()).any(-1)[0].nonzero()
    if len(wrong):
        raise NonFiniteError(
            f"the {side.name}'s model predicts NaN or +inf after token {int(wrong[0])}, expected "
            "finite logits; its weights are damaged or overflow: copy it again, or use float32"
        )
    return logits


def token_probabilities(logits: Tensor, ids: Ids, vocab_size: int) -> list[float | None]:
    """The probability of each token given those before it; None for the first.

    Args:
        logits: [1, T, V'] of the text; columns from `vocab_size` on are padding.
        ids: [T] of the text.
    """
    found: list[float | None] = [None]
    following = torch.from_numpy(np.array(ids[1:]))
    for start in range(0, len(following), _ROWS):
        wanted = following[start : start + _ROWS]
        rows = logits[0, start : start + len(wanted), :vocab_size].log_softmax(-1)
        found += rows.gather(1, wanted[:, None])[:, 0].exp().tolist()
    return found
