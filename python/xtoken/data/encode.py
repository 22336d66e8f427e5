"""Documents under one tokenizer or two: plain texts, and conversations by their chat templates."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from xtoken import Vocab
from xtoken.data.chat_template import ChatTemplate, Rendering
from xtoken.data.conversations import Conversation
from xtoken.data.documents import Document, check_text
from xtoken.data.loss_mask import Encoded, RenderingEncoder
from xtoken.data.stops import StopTokens, stop_tokens

Printed: TypeAlias = str | Rendering


class Encoder:
    """One side's tokenizer: what it makes of texts and of printed conversations.

    Args:
        tokenizer: a `transformers` tokenizer; a fast one with a chat template for conversations.
        side: "student" or "teacher", for messages.
        vocab: of the tokenizer; made when needed if absent.
        date: the day that a chat template prints, see `ChatTemplate`.
        generation_config: of the model, see `stop_tokens`.
    """

    def __init__(
        self,
        tokenizer: Any,
        side: str = "student",
        *,
        vocab: Vocab | None = None,
        date: datetime.date | None = None,
        generation_config: object = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._side = side
        self._given_vocab = vocab
        self._date = date
        self._generation_config = generation_config

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The chat template; plain texts need none."""
        return ChatTemplate(self._tokenizer, side=self._side, date=self._date)

    @functools.cached_property
    def stops(self) -> StopTokens:
        """What ends a turn and a text."""
        template = self.template if getattr(self._tokenizer, "chat_template", None) else None
        config = self._generation_config
        return stop_tokens(self._tokenizer, self._vocab, config, template=template)

    @functools.cached_property
    def _vocab(self) -> Vocab:
        return self._given_vocab or Vocab.from_tokenizer(self._tokenizer)

    @functools.cached_property
    def _renderings(self) -> RenderingEncoder:
        return RenderingEncoder(
            self._tokenizer, side=self._side, vocab=self._vocab, stops=self.stops
        )

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
    """Return what a document is for each of the encoders, as rows of one entry per encoder.

    One row, unless one of the templates prints an earlier answer otherwise once more follows:
    then one for each answer of the assistant.
    """
    if isinstance(document, str):
        check_text(document, f"text {document[:40]!r}")
        return [(document,) * len(encoders)]
    templates = [encoder.template for encoder in encoders]
    whole = [template.whole(document) for template in templates]
    complete = tuple(rendering for rendering in whole if rendering is not None)
    if len(complete) == len(whole):
        return [complete]
    messages = document.messages
    return [
        tuple(template.last(document, messages[:end]) for template in templates)
        for end, learned in zip(document.answer_ends, document.answers_learned, strict=True)
        if learned
    ]
