"""The kept answer of a server: sealed, and refused in one line where it is not one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xtoken.errors import StoreError
from xtoken.teachers import Predictions
from xtoken.teachers.served import Probe


@pytest.fixture
def probe() -> Probe:
    rng = np.random.default_rng(0)
    rows = np.sort(rng.normal(-3, 1, (4, 3)).astype(np.float32))[:, ::-1]
    rows[1, 2] = -np.inf
    ids = rng.permuted(np.tile(np.arange(9), (4, 1)), axis=1)[:, :3]
    answer = Predictions(ids, rows, np.zeros(4, np.float32))
    return Probe.of("tiny", np.array([5, 6, 7, 8]), answer)


def test_it_is_sealed_and_older_ones_are_read(tmp_path: Path, probe: Probe) -> None:
    path = tmp_path / "served.json"
    probe.save(path)
    assert Probe.load(path) == probe
    text = path.read_text()
    path.write_text(text.replace('"tiny"', '"tidy"'))
    with pytest.raises(StoreError, match=r"served.json was altered, or does not describe a served"):
        Probe.load(path)
    path.write_text(json.dumps(probe.__dict__) + "\n")  # as it was kept without a checksum
    assert Probe.load(path) == probe
    assert Probe.load(path).digest == probe.digest


def test_what_is_no_answer_is_told_in_one_line(tmp_path: Path, probe: Probe) -> None:
    path = tmp_path / "served.json"
    whole: dict[str, Any] = dict(probe.__dict__)
    changes: list[dict[str, Any]] = [
        {"ids": [row[:-1] for row in probe.ids]},
        {"ids": probe.ids[:-1]},
        {"ids": [[0.5] * 3] * 4},
        {"ids": None},
        {"ids": "abcd"},
        {"log_probs": [["x"] * 3] * 4},
        {"log_probs": None},
        {"log_probs": [[float("nan")] * 3] * 4},
        {"ids": [[]] * 4, "log_probs": [[]] * 4},
        {"model": 3},
        {"prompt": {}},
        {"more": 1},
    ]
    texts = [json.dumps(whole | change) for change in changes]
    for text in [*texts, "", "[]", "null", "[" * 100_000, "9" * 5000]:
        path.write_text(text)
        with pytest.raises(StoreError, match="does not describe a served teacher") as caught:
            Probe.load(path)
        assert "\n" not in str(caught.value)
