"""The record of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from xtoken.errors import FormatError
from xtoken.training.metrics_log import History, read_history, records_until


def test_records_are_on_disk_as_soon_as_they_are_added_and_are_read_back(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        history.add({"step": step, "ce": 1.5 / step})
        assert read_history(tmp_path / "metrics.jsonl") == history.records
    assert len(history.records) == 2


def test_values_that_json_lacks_are_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.jsonl")
    history.add({"step": 1, "numeral_mass": math.nan, "kd": math.inf})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=str)
    assert line == {"step": 1, "numeral_mass": None, "kd": None}
    (record,) = read_history(tmp_path / "metrics.jsonl")
    assert math.isnan(record["numeral_mass"])


@pytest.mark.parametrize(
    "line", ['{"step": null, "ce": 1.0}', '{"ce": 1.0}', f'{{"step": 1, "ce": {"9" * 400}}}',
             f'{{"step": {"9" * 400}, "ce": 1}}', '{"step": 1e400, "ce": 1}']
)  # fmt: skip
def test_a_line_without_a_step_or_with_what_no_float_holds_is_refused(
    tmp_path: Path, line: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(FormatError, match=r"metrics\.jsonl line 2 is no record of a run: "):
        read_history(tmp_path / "metrics.jsonl")


def test_a_new_history_empties_the_file_of_an_earlier_run(tmp_path: Path) -> None:
    History(tmp_path / "metrics.jsonl").add({"step": 1})
    History(tmp_path / "metrics.jsonl")
    assert read_history(tmp_path / "metrics.jsonl") == []


def test_a_history_without_a_file_keeps_its_records(tmp_path: Path) -> None:
    history = History()
    history.add({"step": 1})
    assert history.records == [{"step": 1}]
    assert not list(tmp_path.iterdir())


def test_a_record_goes_on_after_what_is_kept_of_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    for step in (1, 2, 3):
        history.add({"step": step, "ce": math.nan})
    with path.open("a") as file:
        file.write('{"step": 4, "c')
    assert [record["step"] for record in read_history(path)] == [1, 2, 3]
    kept = History(path, records_until(path, 2))
    kept.add({"step": 3, "ce": 0.5})
    assert [record["step"] for record in read_history(path)] == [1, 2, 3]
    assert read_history(path)[2] == {"step": 3, "ce": 0.5}
    assert list(tmp_path.iterdir()) == [path]
    assert records_until(tmp_path / "absent", 5) == []
