"""Documents under one tokenizer or two: plain texts, and conversations by their chat templates."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from xtoken._core import Vocab
from xtoken.data.chat_template import ChatTemplate, Rendering
from xtoken.data.conversations import Conversation
from xtoken.data.documents import Document
from xtoken.data.loss_mask import Encoded, RenderingEncoder

Printed: TypeAlias = str | Rendering


class Encoder:
    """One side's tokenizer: what it makes of texts and of printed conversations.

    Args:
        tokenizer: a `transformers` tokenizer; a fast one with a chat template for conversations.
        side: "student" or "teacher", for messages.
        vocab: of the tokenizer; made when needed if absent.
    """

    def __init__(self, tokenizer: Any, side: str = "student", *, vocab: Vocab | None = None):
        self._tokenizer = tokenizer
        self._side = side
        self._vocab = vocab

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The chat template; plain texts need none."""
        return ChatTemplate(self._tokenizer, side=self._side)

    @functools.cached_property
    def _renderings(self) -> RenderingEncoder:
        return RenderingEncoder(self._tokenizer, side=self._side, vocab=self._vocab)

    def encode_conversation(self, conversation: Conversation) -> list[Encoded]:
        """Tokenize a conversation as the chat template prints it: `apply_chat_template`'s ids.

        One sequence with all answers in its loss mask; where the template prints an earlier answer
        otherwise once more follows, one for each answer, which ends with it and has it alone in the
        mask.

        Args:
            conversation: see `Conversation.from_messages`.
        Raises:
            DataError: if there is no chat template, or it cannot print the conversation.
        """
        return self.encode([row[0] for row in print_document(conversation, [self])])

    def encode(self, printed: Sequence[Printed]) -> list[Encoded]:
        """Return each text with the special tokens that the tokenizer adds, all of it in the loss
        mask, and each rendering with what the assistant says in the mask."""
        texts = [item for item in printed if isinstance(item, str)]
        renderings = [item for item in printed if not isinstance(item, str)]
        from_texts = iter(self._texts(texts) if texts else [])
        from_renderings = iter(self._renderings(renderings) if renderings else [])
        return [next(from_texts if isinstance(item, str) else from_renderings) for item in printed]

    def _texts(self, texts: list[str]) -> list[Encoded]:
        # verbose=False: a text beyond the model's length is cut later, so no warning is due.
        rows = self._tokenizer(texts, verbose=False)["input_ids"]
        none = np.zeros((0, 2), dtype=np.int64)
        return [
            Encoded(np.asarray(ids, dtype=np.int64), np.ones(len(ids), dtype=np.bool_), none)
            for ids in rows
        ]


def print_document(document: Document, encoders: Sequence[Encoder]) -> list[tuple[Printed, ...]]:
    """Return what a document is for each of the encoders, as rows of one entry an encoder.

    One row, unless one of the templates prints an earlier answer otherwise once more follows:
    then one for each answer of the assistant.
    """
    if isinstance(document, str):
        return [(document,) * len(encoders)]
    templates = [encoder.template for encoder in encoders]
    whole = [template.whole(document) for template in templates]
    complete = tuple(rendering for rendering in whole if rendering is not None)
    if len(complete) == len(whole):
        return [complete]
    messages = document.messages
    return [
        tuple(template.last(document, messages[:end]) for template in templates)
        for end in document.answer_ends
    ]
