"""A conversation as a tokenizer's own chat template prints it, and where the assistant speaks."""

from __future__ import annotations

import datetime
import functools
import json
import re
from dataclasses import dataclass
from typing import Any

from xtoken.data.backend import TextBackend
from xtoken.data.conversations import Conversation, Message
from xtoken.data.turn_ends import TurnEnd, read_turn_end
from xtoken.errors import DataError

Span = tuple[int, int]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Takes an answer's place to find what a template puts around it.
_MARK = "XTOKENMARK"
# Contents of so many characters stand in no text by chance.
_TELLING = 20
_DATE_FUNCTION = "strftime_now"
_DATE_CODES = "aAwdbBmyYHIpMSfzZjUWcxXGuV"


@dataclass(frozen=True)
class Answer:
    """What the assistant says in a printed text, or a part of it.

    Args:
        start, end: its characters, half-open. Where `content_end` is None the end may be that of
            the text or short of the turn's, and the markers tell.
        content_end: where the end of the turn begins, which `end` then closes.
        learned: whether a loss may predict it.
    """

    start: int
    end: int
    content_end: int | None = None
    learned: bool = True

    def head(self, length: int) -> Answer:
        """Return what of it lies among the first characters of the text."""
        if self.end <= length:
            return self
        content_end = None if self.content_end is None else min(self.content_end, length)
        return Answer(min(self.start, length), length, content_end, self.learned)


@dataclass(frozen=True)
class Rendering:
    """A conversation as text.

    Args:
        text: what the chat template prints, special tokens included.
        answers: what of it the assistant says, in order.
    """

    text: str
    answers: tuple[Answer, ...]

    def head(self, length: int) -> Rendering:
        """Return the first characters of it; answers behind them stay, empty."""
        if len(self.text) <= length:
            return self
        return Rendering(self.text[:length], tuple(item.head(length) for item in self.answers))


class ChatTemplate:
    """The chat template of one tokenizer.

    The assistant's spans are those of the template's `{% generation %}` blocks, if it has any.
    Else an answer is what the template adds to the conversation before it with the generation
    prompt: what the model would have to say there.

    Args:
        tokenizer: a `transformers` tokenizer.
        side: "student" or "teacher", for messages.
        date: the day that the template prints where it asks for today's; None takes today's, once.
            A run that is resumed on another day passes the day that it began.
        backend: of the tokenizer; made when needed if absent.
    Raises:
        DataError: if the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        side: str = "student",
        date: datetime.date | None = None,
        backend: TextBackend | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._side = side
        self._date = date or datetime.date.today()
        self._backend = backend
        self._turn_ends: dict[str, TurnEnd] = {}
        try:
            source = tokenizer.get_chat_template()
        # A tokenizer of another library has no such method, one without template raises.
        except (AttributeError, ValueError) as error:
            raise DataError(
                f"the {side}'s tokenizer has no chat template, expected one to print conversations "
                "with; set tokenizer.chat_template, or put a chat_template.jinja beside its "
                "tokenizer.json"
            ) from error
        if not isinstance(source, str):
            raise DataError(
                f"the {side}'s chat template is a {type(source).__name__}, expected a text; mend "
                "chat_template in its tokenizer_config.json"
            )
        templates = getattr(tokenizer, "chat_template", None)
        self.prints_date: bool = _DATE_FUNCTION in f"{source}{templates}"
        """Whether the text may depend on the day."""

    def whole(self, conversation: Conversation) -> Rendering | None:
        """Return the conversation with the spans of all answers.

        None where the template renders earlier turns differently in longer conversations (Qwen3
        drops earlier thinking): the answer is then not what the model said, see `last`.
        """
        messages = conversation.messages
        text, blocks = self._rendered(messages, conversation)
        found: list[Answer] = []
        for end, learned in zip(
            conversation.answer_ends, conversation.answers_learned, strict=True
        ):
            answered = text if end == len(messages) else self._print(messages[:end], conversation)
            content_end = self._content_end(answered, conversation)
            ended = len(answered)
            if content_end is not None:
                ended = content_end + len(self.turn_end(conversation).text)
            if not text.startswith(answered[:ended]):
                return None
            if blocks is None:
                spans = [(self._start(messages[:end], answered, conversation), len(answered))]
            else:
                spans = [span for span in blocks if span[0] < len(answered)]
                blocks = blocks[len(spans) :]
            if end == len(messages):
                text = self._ended(text, content_end, conversation)
            self._check_answer(messages[:end], answered, spans, content_end, conversation)
            found += self._answers(text, spans, content_end, conversation, learned=learned)
        self._check_prompts(messages, text, conversation)
        return Rendering(text, tuple(found))

    def last(self, conversation: Conversation, messages: list[Message]) -> Rendering:
        """Return messages that end in an answer, with that answer only.

        Args:
            conversation: the one that they begin.
            messages: from its first to one of the assistant's.
        """
        text, blocks = self._rendered(messages, conversation)
        content_end = self._content_end(text, conversation)
        if blocks is None:
            spans = [(self._start(messages, text, conversation), len(text))]
        else:
            prompt = self._print(messages[:-1], conversation, prompted=True)
            pairs = enumerate(zip(prompt, text, strict=False))
            start = next((at for at, (left, right) in pairs if left != right), len(prompt))
            spans = [span for span in blocks if span[0] >= start]
        self._check_answer(messages, text, spans, content_end, conversation)
        self._check_prompts(messages, text, conversation)
        text = self._ended(text, content_end, conversation)
        answers = self._answers(text, spans, content_end, conversation, learned=True)
        return Rendering(text, tuple(answers))

    def turn_end(self, conversation: Conversation | None = None) -> TurnEnd:
        """Return what the template prints after an answer, read off its own output.

        Args:
            conversation: a tokenizer may have another template where there are tools.
        """
        source = self._source(conversation)
        if source not in self._turn_ends:
            printed = functools.partial(self._printed, source=source)
            if self._backend is None:
                self._backend = TextBackend(self._tokenizer, side=self._side)
            self._turn_ends[source] = read_turn_end(
                printed, self._backend, self._tokenizer.eos_token_id, self._tokenizer.bos_token_id
            )
        return self._turn_ends[source]

    def _content_end(self, answered: str, conversation: Conversation) -> int | None:
        """Find where the end of the turn begins, in messages that end in an answer."""
        footer = self.turn_end(conversation).footer
        if footer is None or not answered.endswith(footer):
            return None
        return len(answered) - len(footer)

    def _ended(self, text: str, content_end: int | None, conversation: Conversation) -> str:
        """Add what ends earlier turns where a template prints it once more follows only."""
        end = self.turn_end(conversation)
        if content_end is None or not end.later or end.text.strip():
            return text
        return text[:content_end] + end.later

    def _answers(
        self,
        text: str,
        spans: list[Span],
        content_end: int | None,
        conversation: Conversation,
        *,
        learned: bool,
    ) -> list[Answer]:
        """Close an answer's last span where its turn ends."""
        answers = [Answer(start, end, learned=learned) for start, end in spans]
        if content_end is None or not spans:
            return answers
        start, end = spans[-1]
        if start > content_end or text[end:content_end].strip():
            return answers
        ending = self.turn_end(conversation)
        closes = next(
            (it for it in (ending.later, ending.text) if it and text.startswith(it, content_end)),
            "",
        )
        answers[-1] = Answer(start, content_end + len(closes), content_end, learned)
        return answers

    def _start(self, messages: list[Message], text: str, conversation: Conversation) -> int:
        """Find where the answer begins in the text of messages that end in it."""
        before = self._print(messages[:-1], conversation)
        prompt = self._print(messages[:-1], conversation, prompted=True)
        if text.startswith(prompt) and prompt != before:
            return len(prompt)
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
            return len(prompt)
        return len(header)

    def _check_answer(
        self,
        messages: list[Message],
        text: str,
        spans: list[Span],
        content_end: int | None,
        conversation: Conversation,
    ) -> None:
        """Refuse an answer of which the template prints nothing, or not all calls."""
        answer, at = messages[-1], len(messages) - 1
        said = "".join(text[start : min(end, content_end or end)] for start, end in spans)
        if spans and content_end is not None and not said.strip():
            raise self._unprinted(conversation, f"messages[{at}]", answer["role"])
        calls = answer.get("tool_calls") or []
        for call in range(len(calls)) if isinstance(calls, list) else ():
            fewer = answer | {"tool_calls": [*calls[:call], *calls[call + 1 :]]}
            if not fewer["tool_calls"]:
                del fewer["tool_calls"]
            if self._try_print([*messages[:-1], fewer], conversation) == text:
                place = f"messages[{at}].tool_calls[{call}]"
                raise self._unprinted(conversation, place, answer["role"])
            self._check_arguments(
                calls[call], f"messages[{at}].tool_calls[{call}]", said, conversation
            )

    def _check_arguments(
        self, call: object, place: str, said: str, conversation: Conversation
    ) -> None:
        """Refuse arguments that come out in another notation than the template is written for."""
        function = call.get("function", call) if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, dict) and arguments:
            wrong, seen, remedy = str(arguments), "as Python has it", "a string of JSON"
            right = json.dumps(arguments, ensure_ascii=False)
        elif isinstance(arguments, str) and arguments.lstrip()[:1] == "{":
            wrong = json.dumps(arguments, ensure_ascii=False)
            right, seen, remedy = f'"{arguments}"', "as a string within JSON", "an object"
        else:
            return
        if wrong != right and wrong in said:
            raise DataError(
                f"{conversation.source}: the {self._side}'s chat template prints {place}.function."
                f"arguments {seen}; write them as {remedy}"
            )

    def _check_prompts(
        self, messages: list[Message], text: str, conversation: Conversation
    ) -> None:
        """Refuse a prompt that the template leaves out, as some do with roles they do not know."""
        for at, message in enumerate(messages):
            content = message["content"].strip()
            # A short content may stand in the text by chance.
            found = content in text and (len(content) >= _TELLING or message["role"] == "user")
            if message["role"] == "assistant" or not content or found:
                continue
            others = [*messages[:at], *messages[at + 1 :]]
            if self._try_print(others, conversation) == text:
                raise self._unprinted(conversation, f"messages[{at}]", message["role"])

    def _unprinted(self, conversation: Conversation, place: str, role: str) -> DataError:
        return DataError(
            f"{conversation.source}: the {self._side}'s chat template prints nothing of {place}, "
            f"of role {role!r}; leave the line out, or give a template that prints it"
        )

    def _source(self, conversation: Conversation | None) -> str:
        """Return the template; a tokenizer may have another one for tools."""
        tools = None if conversation is None else conversation.tools
        source: str = self._tokenizer.get_chat_template(tools=tools)
        return source

    def _rendered(
        self, messages: list[Message], conversation: Conversation
    ) -> tuple[str, list[Span] | None]:
        """Print messages, with the spans of generation blocks; None for a template without."""
        if _GENERATION.search(self._source(conversation)) is None:
            return self._print(messages, conversation), None
        return self._marked(messages, conversation)

    def _marked(
        self, messages: list[Message], conversation: Conversation
    ) -> tuple[str, list[Span]]:
        """Print messages, and return the spans of the generation blocks that hold anything."""
        from transformers.utils import chat_template_utils

        # Through Any: transformers declares less than it returns.
        library: Any = chat_template_utils
        try:
            (text,), (found,) = library.render_jinja_template(
                conversations=[messages],
                tools=conversation.tools,
                chat_template=self._dated(self._source(conversation)),
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
                **self._date_values(self._source(conversation)),
            )
        except Exception as error:
            raise self._refused(conversation, error) from error
        spans = [(int(start), int(end)) for start, end in found if end > start]
        if not spans:
            raise DataError(
                f"{conversation.source}: the {self._side}'s chat template marks nothing as "
                "generated; put {% generation %} around all that the assistant says"
            )
        return text, spans

    def _print(
        self, messages: list[Message], conversation: Conversation, *, prompted: bool = False
    ) -> str:
        try:
            return self._printed(
                messages,
                source=self._source(conversation),
                tools=conversation.tools,
                prompted=prompted,
            )
        # Templates fail in many ways: raise_exception, undefined fields, a TypeError within.
        except Exception as error:
            raise self._refused(conversation, error) from error

    def _try_print(self, messages: list[Message], conversation: Conversation) -> str | None:
        try:
            return self._print(messages, conversation)
        except DataError:
            return None

    def _printed(
        self,
        messages: list[Message],
        *,
        source: str,
        tools: list[Message] | None = None,
        prompted: bool = False,
    ) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self._dated(source),
            tokenize=False,
            add_generation_prompt=prompted,
            **self._date_values(source),
        )
        return text

    def _dated(self, source: str) -> str:
        """Put the run's day in the place of today's: transformers takes no function for it."""
        if _DATE_FUNCTION not in source:
            return source
        return (
            f"{{%- macro {_DATE_FUNCTION}(format) -%}}{{%- set date = namespace(text=format) -%}}"
            "{%- for code, value in xtoken_date.items() -%}"
            "{%- set date.text = date.text | replace(code, value) -%}{%- endfor -%}"
            f"{{{{- date.text -}}}}{{%- endmacro -%}}{source}"
        )

    def _date_values(self, source: str) -> dict[str, dict[str, str]]:
        if _DATE_FUNCTION not in source:
            return {}
        midnight = datetime.datetime.combine(self._date, datetime.time())
        codes = [f"%{flag}{code}" for code in _DATE_CODES for flag in ("", "-")]
        return {"xtoken_date": {code: midnight.strftime(code) for code in codes} | {"%%": "%"}}

    def _refused(self, conversation: Conversation, error: Exception) -> DataError:
        return DataError(
            f"{conversation.source}: the {self._side}'s chat template cannot print it "
            f"({' '.join(str(error).split())}); change the messages or the template"
        )
