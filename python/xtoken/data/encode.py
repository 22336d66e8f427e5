"""Documents under one tokenizer or two: plain texts, and conversations by their chat templates."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from xtoken._checks import expect, expect_list, token_limit
from xtoken._core import Vocab
from xtoken.data.backend import TextBackend
from xtoken.data.chat_template import ChatTemplate, Rendering
from xtoken.data.completions import Completion
from xtoken.data.conversations import Conversation
from xtoken.data.loss_mask import NO_RANGES, Encoded, RenderingEncoder
from xtoken.data.rows import Document, check_text
from xtoken.data.stops import StopTokens, stop_tokens
from xtoken.vocab.content import content_digest
from xtoken.vocab.side import Untruncated, encode_texts

Printed: TypeAlias = str | Rendering | Completion

# A head of a long text has these tokens more than are kept, as those at its end may be others.
_SPARE_TOKENS = 64
# Most texts have fewer; a head that turns out too short is made longer.
_CHARS_PER_TOKEN = 16


class Encoder:
    """One side's tokenizer: what it makes of texts and of printed conversations.

    Args:
        tokenizer: a `transformers` tokenizer, a fast one with a chat template for conversations; of
            texts also a `tokenizers.Tokenizer` or a tiktoken `Encoding`.
        side: "student" or "teacher", for messages.
        vocab: of the tokenizer; made when needed if absent.
        date: the day that a chat template prints, see `ChatTemplate`.
        generation_config: of the model, see `stop_tokens`.

    Raises:
        ArgumentTypeError: `date` is no `datetime.date`.
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
        if date is not None:
            expect(date, datetime.date, "date", "pass a datetime.date, or None for today")
        self._date = date
        self._generation_config = generation_config

    def same_as(self, other: Encoder) -> bool:
        """Whether both make the same tokens and loss masks of any document."""
        if (self._date, self._generation_config) != (other._date, other._generation_config):
            return False
        if self._tokenizer is other._tokenizer:
            return True
        vocabs = self._given_vocab, other._given_vocab
        if vocabs[0] is None or vocabs[1] is None or vocabs[0].fingerprint != vocabs[1].fingerprint:
            return False
        return (found := _content(self._tokenizer)) is not None and found == _content(
            other._tokenizer
        )

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The chat template; plain texts need none."""
        return ChatTemplate(
            self._tokenizer, side=self._side, date=self._date, backend=self._backend
        )

    @functools.cached_property
    def stops(self) -> StopTokens:
        """What ends a turn and a text."""
        template = self.template if getattr(self._tokenizer, "chat_template", None) else None
        config = self._generation_config
        return stop_tokens(self._tokenizer, self._vocab, config, template=template)

    @functools.cached_property
    def _backend(self) -> TextBackend | None:
        # One that is not fast is refused where its tokens are needed.
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else TextBackend(self._tokenizer, side=self._side)

    @functools.cached_property
    def _decides_words(self) -> bool:
        """Whether the last characters of a word may change its first token."""
        backend = getattr(self._tokenizer, "backend_tokenizer", self._tokenizer)
        return type(getattr(backend, "model", None)).__name__ == "Unigram"

    @functools.cached_property
    def _parts_words(self) -> bool:
        """Whether words are tokenized each by itself."""
        backend = getattr(self._tokenizer, "backend_tokenizer", self._tokenizer)
        parts = getattr(backend, "pre_tokenizer", None)
        return parts is not None and len(parts.pre_tokenize_str("a b")) > 1

    @functools.cached_property
    def _whole(self) -> Untruncated:
        return Untruncated(self._tokenizer)

    @functools.cached_property
    def _vocab(self) -> Vocab:
        return self._given_vocab or Vocab.from_tokenizer(self._tokenizer)

    @functools.cached_property
    def _renderings(self) -> RenderingEncoder:
        return RenderingEncoder(
            self._tokenizer,
            side=self._side,
            vocab=self._vocab,
            stops=self.stops,
            backend=self._backend,
        )

    def encode_conversation(self, conversation: Conversation) -> list[Encoded]:
        """Tokenize a conversation as the chat template prints it: `apply_chat_template`'s ids.

        One sequence with all answers in its loss mask; where the template renders earlier turns
        differently in longer conversations, one sequence per answer, which ends with that answer
        and has it alone in the mask.

        Args:
            conversation: see `Conversation.from_messages`.
        Raises:
            DataError: if there is no chat template, or it cannot print the conversation.
        """
        return self.encode([row[0] for row in print_document(conversation, [self])])

    def encode(self, printed: Sequence[Printed], *, max_tokens: int | None = None) -> list[Encoded]:
        """Return each text with the special tokens that the tokenizer adds, all of it in the loss
        mask, of a completion what follows its prompt, and each rendering with what the assistant
        says in the mask.

        A token that spells the end of a prompt and the beginning of its completion counts.

        Args:
            printed: texts, completions and renderings.
            max_tokens: tokens that will be kept of each. Of a text that is far longer only a head
                is tokenized, some tokens more than these: they are those of the whole text, as
                Unigram, which decides all tokens of a word together, has whole words.

        Raises:
            ArgumentTypeError: `printed` is one text, or holds what is none of the three.
            OptionError: `max_tokens` is no whole number of at least 1.
            DataError: a text holds half a character.
        """
        kinds = (str, Completion, Rendering)
        expect_list("printed", printed, kinds, "texts, completions and renderings")
        max_tokens = token_limit(max_tokens, 1)
        if max_tokens is not None:
            printed = [self._head(item, max_tokens + _SPARE_TOKENS) for item in printed]
        texts = [item for item in printed if isinstance(item, str)]
        completions = [item for item in printed if isinstance(item, Completion)]
        renderings = [item for item in printed if isinstance(item, Rendering)]
        encoded = {
            str: iter(self._texts(texts) if texts else []),
            Completion: iter(self._completions(completions) if completions else []),
            Rendering: iter(self._renderings(renderings) if renderings else []),
        }
        # A text may be of a class of its own, such as numpy's.
        return [next(encoded[str if isinstance(item, str) else type(item)]) for item in printed]

    def _head(self, printed: Printed, count: int) -> Printed:
        """Return a head that has as many tokens, or all if there are not many more."""
        text = printed if isinstance(printed, str) else printed.text
        length = count * _CHARS_PER_TOKEN
        while 2 * length < len(text):
            end = _word_end(text, length)
            if self._decides_words and not text[end : end + 1].isspace():
                if not self._parts_words:
                    return printed
                length *= 4
                continue
            head = _head(printed, end)
            (encoded,) = self.encode([head])
            if len(encoded.ids) >= count:
                return head
            length *= 4
        return printed

    def _completions(self, items: list[Completion]) -> list[Encoded]:
        whole = self._texts([item.text for item in items])
        prompts = encode_texts(self._whole(), [item.prompt for item in items])
        for encoded, prompt in zip(whole, prompts, strict=True):
            encoded.loss_mask[: self._completion_start(encoded.ids.tolist(), prompt)] = False
        return whole

    def _completion_start(self, ids: list[int], prompt: list[int]) -> int:
        """The first token that is not the prompt's alone: what follows may have changed those
        before it."""
        pairs = enumerate(zip(ids, prompt, strict=False))
        at = next((at for at, (one, other) in pairs if one != other), min(len(ids), len(prompt)))
        if at == len(prompt):
            return at
        spelled = [self._vocab.token_bytes(token) for token in ids]
        own = b"".join(map(self._vocab.token_bytes, prompt))
        if not b"".join(spelled).startswith(own):
            return at  # a normalizer changed the prompt
        done = sum(map(len, spelled[:at]))
        for index in range(at, len(ids)):
            done += len(spelled[index])
            # A token without bytes behind the prompt is the completion's.
            if done > len(own) or (done == len(own) and not spelled[index]):
                return index
        return len(ids)

    def _texts(self, texts: list[str]) -> list[Encoded]:
        rows = encode_texts(self._whole(), texts)
        return [
            Encoded(np.asarray(ids, dtype=np.int64), np.ones(len(ids), dtype=np.bool_), NO_RANGES)
            for ids in rows
        ]


def _content(tokenizer: Any) -> tuple[object, ...] | None:
    """What tokens and renderings depend on; None where the tokenizer does not tell."""
    digest = content_digest(tokenizer)
    return None if digest is None else (digest, getattr(tokenizer, "chat_template", None))


def _head(printed: Printed, end: int) -> Printed:
    """The first characters of a text, a completion or a rendering."""
    if isinstance(printed, str):
        return printed[:end]
    if isinstance(printed, Rendering):
        return printed.head(end)
    length = end - len(printed.prompt)
    if length > 0 and printed.completion[:length].strip():
        return Completion(printed.prompt, printed.completion[:length], printed.source)
    return printed


def _word_end(text: str, length: int) -> int:
    """Return the last end of a word before `length`, where tokenizers cut; `length` in a long
    word."""
    at = max(text.rfind(mark, length - length // 4, length) for mark in " \n")
    while at > 0 and text[at - 1].isspace():
        at -= 1
    return at if at > length // 2 else length


def print_document(document: Document, encoders: Sequence[Encoder]) -> list[tuple[Printed, ...]]:
    """Return what a document is for each of the encoders, as rows of one entry per encoder.

    One row, or one per answer of the assistant where one of the templates renders earlier turns
    differently in longer conversations.
    """
    if isinstance(document, str):
        check_text(document, f"text {document[:40]!r}")
        return [(document,) * len(encoders)]
    if isinstance(document, Completion):
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
