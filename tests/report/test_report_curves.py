"""The picture of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtoken.report.curves import draw_curves


def records(steps: int) -> list[dict[str, float]]:
    trained = [{"step": s, "ce": 5.0 / s, "learning_rate": 1e-3} for s in range(1, steps + 1)]
    return [*trained, {"step": steps, "eval_bits_per_byte": 2.0, "eval_numeral_mass": float("nan")}]


def test_runs_of_different_length_and_content_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    draw_curves({"p-kl": [{"step": 1, "kd": 2.0}, *records(9)], "ce": records(3)}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_records_is_drawn_empty(tmp_path: Path) -> None:
    draw_curves({"ce": []}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 runs, expected at least 1"):
        draw_curves({}, tmp_path / "curves.png")
