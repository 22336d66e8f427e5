"""A conversation as a tokenizer's own chat template prints it, and where the assistant speaks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from xtoken.data.conversations import Conversation, Message
from xtoken.errors import DataError

Span = tuple[int, int]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Takes an answer's place to find what a template puts around it.
_MARK = "XTOKENMARK"


@dataclass(frozen=True)
class Rendering:
    """A conversation as text.

    Args:
        text: what the chat template prints, special tokens included.
        spans: half-open character ranges of what the assistant says, in order; a range may reach
            past the end of the turn, up to the header of the next.
    """

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """The chat template of one tokenizer.

    The assistant's spans are those of the template's `{% generation %}` blocks, if it has any.
    Else an answer is what the template adds to the conversation before it with the generation
    prompt: what the model would have to say there.

    Args:
        tokenizer: a `transformers` tokenizer.
        side: "student" or "teacher", for messages.
    Raises:
        DataError: if the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, *, side: str = "student") -> None:
        self._tokenizer = tokenizer
        self._side = side
        try:
            tokenizer.get_chat_template()
        # A tokenizer of another library has no such method, one without template raises.
        except (AttributeError, ValueError) as error:
            raise DataError(
                f"the {side}'s tokenizer has no chat template, expected one to print conversations "
                "with; set tokenizer.chat_template, or put a chat_template.jinja beside its "
                "tokenizer.json"
            ) from error

    def whole(self, conversation: Conversation) -> Rendering | None:
        """Return the conversation with the spans of all answers.

        None where the template prints an earlier answer otherwise once more follows (Qwen3 drops
        its thoughts): the answer as printed is then not what the model said, see `last`.
        """
        messages = conversation.messages
        if self._marks_generation(conversation):
            return self._marked(messages, conversation)
        text = self._print(messages, conversation)
        spans = []
        for end in conversation.answer_ends:
            answered, span = self._answer(messages[:end], conversation)
            if not text.startswith(answered):
                return None
            spans.append(span)
        return Rendering(text, tuple(spans))

    def last(self, conversation: Conversation, messages: list[Message]) -> Rendering:
        """Return messages that end in an answer, with the spans of that answer only.

        Args:
            conversation: the one that they begin.
            messages: from its first to one of the assistant's.
        """
        if not self._marks_generation(conversation):
            text, span = self._answer(messages, conversation)
            return Rendering(text, (span,))
        marked = self._marked(messages, conversation)
        prompt = self._print(messages[:-1], conversation, prompted=True)
        pairs = enumerate(zip(prompt, marked.text, strict=False))
        start = next((at for at, (left, right) in pairs if left != right), len(prompt))
        return Rendering(marked.text, tuple(span for span in marked.spans if span[0] >= start))

    def _answer(self, messages: list[Message], conversation: Conversation) -> tuple[str, Span]:
        """Print messages that end in an answer, and find the answer."""
        text = self._print(messages, conversation)
        before = self._print(messages[:-1], conversation)
        prompt = self._print(messages[:-1], conversation, prompted=True)
        if text.startswith(prompt) and prompt != before:
            return text, (len(prompt), len(text))
        # No generation prompt, or another one than the history has (DeepSeek-R1's thought).
        marked = [*messages[:-1], messages[-1] | {"content": _MARK}]
        header, found, footer = self._print(marked, conversation).partition(_MARK)
        fits = len(header) + len(footer) <= len(text)
        if not (found and fits and text.startswith(header) and text.endswith(footer)):
            raise DataError(
                f"{conversation.source}: the {self._side}'s chat template prints "
                f"messages[{len(messages) - 1}] so that it cannot be told from what surrounds it; "
                "give the template {% generation %} blocks"
            )
        if text.startswith(prompt) and not header[len(prompt) :].strip():
            # White space before the answer is said with it, as Mistral's templates have it.
            return text, (len(prompt), len(text))
        return text, (len(header), len(text))

    def _source(self, conversation: Conversation) -> str:
        """Return the template; a tokenizer may have another one for tools."""
        source: str = self._tokenizer.get_chat_template(tools=conversation.tools)
        return source

    def _marks_generation(self, conversation: Conversation) -> bool:
        return _GENERATION.search(self._source(conversation)) is not None

    def _marked(self, messages: list[Message], conversation: Conversation) -> Rendering:
        from transformers.utils import chat_template_utils

        # Through Any: transformers declares less than it returns.
        library: Any = chat_template_utils
        try:
            (text,), (found,) = library.render_jinja_template(
                conversations=[messages],
                tools=conversation.tools,
                chat_template=self._source(conversation),
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise self._refused(conversation, error) from error
        spans = tuple((int(start), int(end)) for start, end in found if end > start)
        if not spans:
            raise DataError(
                f"{conversation.source}: the {self._side}'s chat template marks nothing as "
                "generated; put {% generation %} around all that the assistant says"
            )
        return Rendering(text, spans)

    def _print(
        self, messages: list[Message], conversation: Conversation, *, prompted: bool = False
    ) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tools=conversation.tools,
                tokenize=False,
                add_generation_prompt=prompted,
            )
        # Templates fail in many ways: raise_exception, undefined fields, a TypeError within.
        except Exception as error:
            raise self._refused(conversation, error) from error
        return text

    def _refused(self, conversation: Conversation, error: Exception) -> DataError:
        return DataError(
            f"{conversation.source}: the {self._side}'s chat template cannot print it "
            f"({' '.join(str(error).split())}); change the messages or the template"
        )
