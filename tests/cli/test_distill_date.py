"""Chat templates that print the date: a run resumed on another day learns the same texts."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_texts, write_pair

from xtoken.cli import distill_config, distill_run
from xtoken.data import Conversation, TextSplit
from xtoken.errors import OptionError
from xtoken.training import DistillConfig, load_models, prepare, train

TEMPLATE = (
    "{{ strftime_now('%d %b %Y') + ' ' }}{% for message in messages %}"
    "{{ message['content'] + ' ' }}{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
CONFIG = DistillConfig(
    loss="ce", steps=1, batch_size=2, max_tokens=48, warmup_steps=0, device="cpu",
    date="2026-11-25", curves=False,
)  # fmt: skip


def request(out: Path, *, resume: bool) -> distill_run.Request:
    return distill_run.Request(
        student="s", teachers=[], teacher_column=None, data=[str(out)],
        held_out=None, split="train", text_field=None,
        chat_templates={}, config=None, settings={}, compare=False, out=out, resume=resume,
        teacher_cache=out,
    )  # fmt: skip


def test_the_day_of_a_run_is_that_of_its_start(tmp_path: Path) -> None:
    models = load_models(*write_pair(tmp_path))
    for tokenizer in (models.pair.student_tokenizer, models.pair.teacher_tokenizer):
        tokenizer.chat_template = TEMPLATE  # type: ignore[union-attr]
    chats = [
        Conversation.from_messages(
            [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text}]
        )
        for text in tiny_texts(8)
    ]
    texts = TextSplit(chats[2:], chats[:2], 0)
    materials = prepare(models, texts, CONFIG)
    start = materials.pair.student_tokenizer.decode(  # type: ignore[union-attr]
        materials.train.examples[0].student_ids.tolist()
    )
    assert start.startswith("25 Nov 2026")
    train(materials, CONFIG, None, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["date"] == "2026-11-25"
    undated = replace(CONFIG, date=None)
    resumed = distill_config.dated(undated, request(tmp_path / "run", resume=True))
    assert resumed.date == "2026-11-25"
    assert train(materials, resumed, None, tmp_path / "run", resume=True).steps_before == 1
    today = distill_config.dated(undated, request(tmp_path / "run", resume=False)).date
    assert today == datetime.date.today().isoformat()


def test_what_is_no_day_is_refused() -> None:
    with pytest.raises(OptionError, match="date = 'tomorrow', expected a day as YYYY-MM-DD"):
        DistillConfig(date="tomorrow")
