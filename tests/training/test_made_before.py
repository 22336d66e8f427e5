"""Rows that were tokenized before, under the limits of a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny_models import tiny_texts
from transformers import AutoModelForCausalLM

from xtoken.errors import DataError
from xtoken.pair import Pair
from xtoken.teachers import LiveTeacher, StoreKey, TopKStore
from xtoken.training import DistillArguments, DistillTrainer, Teacher

TEXTS = tiny_texts(8)
# The student's first token, which has no chunk, is a large part of what is left.
pytestmark = pytest.mark.filterwarnings("ignore::xtoken.errors.LowCoverageWarning")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return Pair(folder / "student", folder / "teacher")


def trainer(folder: Path, pair: Pair, rows: Any, source: Any = None, **more: Any) -> DistillTrainer:
    arguments = DistillArguments(
        str(folder / "out"), max_steps=2, max_tokens=16, report_to=[], use_cpu=True,
        logging_steps=1, per_device_train_batch_size=4, disable_tqdm=True, save_strategy="no",
        kd_weight=1.0, loss="p-kl", **more,
    )  # fmt: skip
    return DistillTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "student"), arguments,
        teachers=[Teacher(source or str(folder / "teacher"), pair)],
        train_dataset=rows, processing_class=pair,
    )  # fmt: skip


def kinds(pair: Pair) -> dict[str, Any]:
    tokenized = Dataset.from_dict(pair.tokenize({"text": TEXTS}))
    return {
        "tokenized": tokenized,
        "set": pair.examples(TEXTS),
        "list": pair.examples(TEXTS).examples,
        "rows": list(tokenized),
        "stream": tokenized.to_iterable_dataset(),
    }


@pytest.mark.parametrize("kind", ["tokenized", "set", "list", "rows", "stream"])
def test_rows_made_before_are_cut_as_texts_are(folder: Path, pair: Pair, kind: str) -> None:
    found = []
    for rows in (TEXTS, kinds(pair)[kind]):
        made = trainer(folder, pair, rows, train_sampling_strategy="sequential")
        made.train()
        found.append([log for log in made.state.log_history if "kd" in log])
        assert len(found[-1]) == 2
    for plain, cut in zip(*found, strict=True):
        assert (cut["chunks"], cut["loss"]) == (plain["chunks"], pytest.approx(plain["loss"]))


def test_cut_rows_find_the_predictions_of_the_whole(
    folder: Path, pair: Pair, tmp_path: Path
) -> None:
    live = LiveTeacher.from_pretrained(folder / "teacher")
    rows = pair.examples(TEXTS)
    key = StoreKey(live.fingerprint, 32, "float32", pair.teacher_vocab.fingerprint)
    store = TopKStore(tmp_path, key)
    store.fill(live, [each.teacher_ids for each in rows.examples])
    made = trainer(folder, pair, rows, store, top_k=32)
    made.train()
    assert [log["rows_left_out"] for log in made.state.log_history if "rows_left_out" in log] == []
    assert len([log for log in made.state.log_history if "kd" in log]) == 2


def test_rows_of_which_a_cut_leaves_nothing_are_left_out_and_counted(
    folder: Path, pair: Pair
) -> None:
    long = pair.examples([{"prompt": " ".join(TEXTS), "completion": " yes"}]).examples[0]
    rows = pair.examples(TEXTS[:1])
    rows.examples.append(long)
    made = trainer(folder, pair, rows)
    with pytest.warns(UserWarning, match="no student token in the loss within max_tokens = 16"):
        made.train()
    assert made.rows_left_out == 2  # of two passes
    assert made.evaluate(rows)["eval_tokens"] == made.evaluate(TEXTS[:1])["eval_tokens"]
    with pytest.raises(DataError, match="none of the 1 examples has a student token in the loss"):
        made.evaluate(type(rows)([long], 0))
