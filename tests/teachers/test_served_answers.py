"""What a server may answer: entries that are no ids or numbers are refused in one line."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served_server import Faults, ServedModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtoken.errors import ServerError
from xtoken.teachers.served import ChosenIds, ServedTeacher

# Told by what it takes of the mass, where it takes any.
BEYOND = r"names id \d{10,}, which no head of|to ids such as \d{10,}, outside the teacher voc"
SENT = np.array([5, 9, 300, 17], np.int64)
Change = Callable[[Any], Any]


class Changed(ServedModel):
    """Answers are changed on their way out."""

    change: Change | None = None

    def _send_bytes(self, handler: BaseHTTPRequestHandler, status: int, data: bytes) -> None:
        if self.change is not None and status == 200 and b"logprobs" in data:
            made = self.change(json.loads(data))
            data = made if isinstance(made, bytes) else json.dumps(made).encode()
        super()._send_bytes(handler, status, data)


@pytest.fixture(scope="module")
def teacher(folder: Path) -> tuple[Any, Any]:
    path = folder / "teacher"
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def refusals(
    teacher: tuple[Any, Any], kind: str, changes: dict[str, Change], *, nested: bool = False
) -> dict[str, str]:
    """By name of a change, what the client says of it."""
    model, tokenizer = teacher
    chosen = None
    if kind == "vllm-tokens":
        chosen = ChosenIds(lambda ids: np.ones((len(ids), 1), np.int64), 1, "one")
    found = {}
    with (
        Changed(model, kind, tokenizer=tokenizer, faults=Faults(cap=-1, nested=nested)) as server,
        ServedTeacher(
            server.url, vocab=tokenizer, top_k=6, api=kind, retries=0, chosen=chosen  # type: ignore[arg-type]
        ) as client,
    ):  # fmt: skip
        client.predictions([SENT])
        for name, change in changes.items():
            server.change = change
            with pytest.raises(ServerError) as caught:
                print(name, client.predictions([SENT]))
            found[name] = str(caught.value)
            assert "\n" not in found[name]
            server.change = None
    return found


def entry(change: Callable[[dict[str, Any], str], object]) -> Change:
    """Change the last entry of vLLM's third position."""

    def whole(answer: Any) -> Any:
        row = answer["choices"][0]["prompt_logprobs"][2]
        change(row, list(row)[-1])
        return answer

    return whole


def test_entries_of_vllm_are_ids_and_numbers(teacher: tuple[Any, Any]) -> None:
    def key(name: str) -> Change:
        return entry(lambda row, last: row.__setitem__(name, row.pop(last)))

    def value(field: str, given: object) -> Change:
        return entry(lambda row, last: row[last].__setitem__(field, given))

    def index(given: object) -> Change:
        return lambda answer: answer["choices"][0].__setitem__("index", given) or answer

    keys = ("-7", "9" * 30, "9" * 5000, " 7", "3.0", "hello", "٧")
    numbers = ("-1.5", True, [1], -(10**400))
    ranks = ("2", True, 1.5, -5, 10**30)
    found = refusals(
        teacher,
        "vllm",
        {f"key {each}": key(each) for each in keys}
        | {f"number {each}": value("logprob", each) for each in numbers}
        | {f"rank {each}": value("rank", each) for each in ranks}
        | {f"index {each}": index(each) for each in (True, 1, -1, 0.0, "0", None)}
        | {"beyond": key("1999999999")},
    )
    for name, message in found.items():
        word = {
            "key": "an id in prompt_logprobs of the answer is",
            "number": "a log-probability of the answer is",
            "rank": "a rank of the answer is",
            "index": "index of the answer is",
            "beyond": "",
        }[name.partition(" ")[0]]
        assert message.startswith(word), name
    assert re.search(BEYOND, found["beyond"])


@pytest.mark.parametrize("place", [0, 1])
def test_entries_of_sglang_are_ids_and_numbers(teacher: tuple[Any, Any], place: int) -> None:
    """Place 0 holds the log-probability, 1 the id."""

    def nested(given: object) -> Change:
        def whole(answer: Any) -> Any:
            answer[0]["meta_info"]["input_top_logprobs"][2][0][place] = given
            return answer

        return whole

    def own(given: object) -> Change:
        def whole(answer: Any) -> Any:
            answer[0]["meta_info"]["input_token_logprobs"][2][place] = given
            return answer

        return whole

    bad: tuple[object, ...] = ("-2", True, [1], -(10**400))
    if place == 1:
        bad = (None, -3, 3.7, 10**30, "17", True)
    changes = {f"top {each}": nested(each) for each in bad}
    changes |= {f"own {each}": own(each) for each in bad}
    words = ("a log-probability of the answer is", "an id in input_top_logprobs of the answer is")
    for name, message in refusals(teacher, "sglang", changes, nested=True).items():
        echoed = place == 1 and name.startswith("own")
        assert ("came back as" in message) if echoed else message.startswith(words[place]), name


def test_flat_arrays_of_sglang_hold_ids_and_numbers(teacher: tuple[Any, Any]) -> None:
    def flat(name: str, dtype: str, change: Callable[[Any], object] = lambda array: None) -> Change:
        def whole(answer: Any) -> Any:
            info = answer[0]["meta_info"]
            key = f"input_top_logprobs_{name}_flat_b64"
            array = np.frombuffer(base64.b64decode(info[key]), info[f"{key}_dtype"]).astype(dtype)
            change(array)
            info |= {
                key: base64.b64encode(array.tobytes()).decode(),
                f"{key}_dtype": dtype,
            }
            return answer

        return whole

    found = refusals(
        teacher,
        "sglang",
        {
            "negative": flat("idx", "int32", lambda array: array.__setitem__(7, -1)),
            "beyond": flat("idx", "int64", lambda array: array.__setitem__(7, 2**40)),
            "float ids": flat("idx", "float32"),
            "whole numbers": flat("val", "int32"),
        },
    )
    assert found["negative"].startswith("an id in input_top_logprobs of the answer is '-1'")
    assert re.search(BEYOND, found["beyond"])
    assert found["float ids"].startswith("input_top_logprobs_idx_flat_b64 of the answer is")
    assert found["whole numbers"].startswith("input_top_logprobs_val_flat_b64 of the answer is")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 200_000 + b"]" * 200_000, "an answer that is nested too deeply to be read"),
        (b'{"choices":' + b"9" * 5000 + b"}", r"an answer that is not JSON \(Exceeds the limit"),
        (b"\xff\xfe{}", "an answer that is not UTF-8 at byte 0"),
        (b'{"choices":' + b"[" * 900 + b"]" * 900 + b"}", "choices of the answer has|parent of"),
    ],
)
def test_what_is_no_json_is_one_line(teacher: tuple[Any, Any], content: bytes, words: str) -> None:
    found = refusals(teacher, "vllm", {"changed": lambda answer: content})
    assert re.search(words, found["changed"])


def test_damaged_arrays_of_chosen_ids_are_one_line(teacher: tuple[Any, Any]) -> None:
    def scores(content: bytes) -> Change:
        text = base64.b64encode(content).decode()
        return lambda answer: answer | {"prompt_token_id_logprobs": text}

    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 2), np.float32))
    whole = buffer.getvalue()
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }"
    changes = {
        "archive": scores(b"PK\x03\x04" + b"x" * 40),
        "cut": scores(whole[:-4]),
        "no header": scores(whole[:20]),
    } | {
        size: scores(
            b"\x93NUMPY\x01\x00" + b"\x76\x00" + (header % size.encode()).ljust(117) + b"\n"
        )
        for size in ("9" * 12, "9" * 30, "-1", "None")
    }
    for name, message in refusals(teacher, "vllm-tokens", changes).items():
        assert message.startswith("prompt_token_id_logprobs"), name
