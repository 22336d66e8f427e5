"""`xtoken report`: pages of real files, and one line for what cannot be shown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizer_zoo as zoo
from typer.testing import CliRunner

from xtoken import Pair
from xtoken.cli import app, main
from xtoken.cli.sides import page_names, read_document
from xtoken.losses import LOSSES
from xtoken.vocab.side import Side

from html_reading import page_data, read_page


@pytest.fixture(name="pair", scope="module")
def _pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    paths = []
    for name, tokenizer in (("one", zoo.byte_level_bpe()), ("other", zoo.byte_level_bpe(2000, 1))):
        (folder / name).mkdir()
        tokenizer.save(str(folder / name / "tokenizer.json"))
        paths.append(str(folder / name / "tokenizer.json"))
    return ["--student", paths[0], "--teacher", paths[1]]


def run(*arguments: str, text: str | None = None) -> str:
    command = ["report", *arguments]
    result = CliRunner().invoke(app, command, input=text, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of the command as the shell runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["xtoken", "report", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_text_a_file_and_standard_input_give_the_same_chunks(
    pair: list[str], tmp_path: Path
) -> None:
    text = "in 201 days\n"
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    out = tmp_path / "page.html"
    found = []
    for given, source in (
        (text, "the given text"),
        (str(file), "text.txt"),
        ("-", "standard input"),
    ):
        said = run("alignment", *pair, "--text", given, "--out", str(out), text=text)
        assert f"page: {out}" in said.replace("\n", "")
        root = read_page(out.read_text(encoding="utf-8"))
        assert root.all("p", "sub")[0].text.startswith(source)
        found.append(page_data(root)["chunks"])
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 3


def test_pages_are_called_as_the_models_or_as_asked(pair: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "page.html")
    run("alignment", *pair, "--text", "a b", "--out", out)
    assert read_page(Path(out).read_text()).all("h1")[0].text == "Alignment: one over other"
    run("pair", *pair, "--out", out, "--student-name", "Llama", "--text", "in 201 days")
    root = read_page(Path(out).read_text())
    assert root.all("h1")[0].text == "Student Llama, teacher other"
    assert "What prefix KL compares in the given text" in root.text


def test_a_folder_that_could_be_any_models_is_named_with_its_parent(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    for folder in (tmp_path / "SmolLM2" / "tok", snapshot, tmp_path / "run" / "checkpoint-40"):
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").touch()
    names = [
        page_names(Side("student", one), Side("teacher", other), None, None)
        for one, other in (
            (tmp_path / "SmolLM2" / "tok" / "tokenizer.json", snapshot),
            (tmp_path / "run" / "checkpoint-40", tmp_path / "SmolLM2"),
        )
    ]
    assert names == [("SmolLM2/tok", "org/name"), ("run/checkpoint-40", "SmolLM2")]
    twice = Side("student", snapshot), Side("teacher", snapshot)
    assert page_names(*twice, "a", None)[0] == "a"


def test_the_audit_writes_the_same_page(pair: list[str], tmp_path: Path) -> None:
    one, other = tmp_path / "one.html", tmp_path / "other.html"
    text = tmp_path / "text.txt"
    text.write_text("in 201 days", encoding="utf-8")
    run("pair", *pair, "--out", str(one), "--text", str(text))
    command = ["project", "audit", *pair, "--html", str(other), "--text", str(text)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert one.read_text() == other.read_text()


def test_a_path_is_printed_as_it_is(pair: list[str], tmp_path: Path) -> None:
    """Not as rich's markup, in which `[/v2]` would end what was not begun and
    `:key:` would be a picture."""
    (tmp_path / "page[").mkdir()
    for name in ("page[v2].html", "page[/v2].html", ":key:.html"):
        out = str(tmp_path / name)
        said = run("alignment", *pair, "--text", "a text", "--out", out)
        assert f"page: {out}" in said.replace("\n", "")


def test_with_models_a_row_of_a_file_has_probabilities(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(
        json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "In 201 days."}) + "\n"
    )
    out = tmp_path / "page.html"
    sides = [str(folder / "student"), str(folder / "teacher")]
    run(
        "alignment", "--student", sides[0], "--teacher", sides[1], "--student-model", sides[0],
        "--teacher-model", sides[1], "--text", str(data), "--row", "2", "--out", str(out),
    )  # fmt: skip
    root = read_page(out.read_text(encoding="utf-8"))
    content = page_data(root)
    assert content["models"] == ["student", "teacher"]
    assert "data.jsonl, row 2" in root.all("p", "sub")[0].text
    views = [view for chunk in content["chunks"] for view in chunk["losses"]]
    assert {view["loss"] for view in views} == set(LOSSES)
    values = {loss: [v.get("value") for v in views if v["loss"] == loss] for loss in LOSSES}
    assert set(values.pop("same-vocab-kl")) == {None}  # the pair has two
    for loss, found in values.items():  # a part of a KL can be below 0
        assert all(value >= (-5 if loss in ("gold", "h-kl") else -1e-5) for value in found), loss


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    for name, loss in (("a/run", "p-kl"), ("b/run", "ce")):
        (tmp_path / name).mkdir(parents=True)
        lines = [json.dumps({"step": step, "ce": 3.0 / step}) for step in (1, 2, 3)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        (tmp_path / name / "config.json").write_text(json.dumps({"loss": loss, "seed": 0}))
    out = tmp_path / "page.html"
    run("run", str(tmp_path / "a/run"), str(tmp_path / "b/run"), "--out", str(out))
    root = read_page(out.read_text())
    assert page_data(root)["runs"] == ["a/run", "b/run"]
    assert [cell.text for cell in root.all("tr")[1].all("td")][-2:] == ["p-kl", "0"]


def test_the_newest_state_of_a_trainer_is_a_run_too(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from xtoken.training import DistillArguments, DistillTrainer

    arguments = DistillArguments(
        str(tmp_path / "out"), max_steps=12, logging_steps=1, save_steps=3, report_to="none",
        per_device_train_batch_size=1, use_cpu=True, loss="p-kl", disable_tqdm=True,
    )  # fmt: skip
    trainer = DistillTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "student"),
        arguments,
        teachers=[str(folder / "teacher")],
        train_dataset=["In 201 days it flew 384 km, and back. " * 3, "Bread and butter. " * 6],
        processing_class=Pair(folder / "student", folder / "teacher"),
    )
    trainer.train()
    out = tmp_path / "page.html"
    run("run", str(tmp_path / "out"), "--out", str(out))
    charts = {c["title"]: c for c in page_data(read_page(out.read_text()))["charts"]}
    (line,) = charts["distillation loss (nats per chunk)"]["lines"]
    logged = [log for log in trainer.state.log_history if "kd" in log]
    assert line == [[log["step"], pytest.approx(log["kd"], rel=1e-4)] for log in logged]
    assert len(line) == 12
    assert "total, weighted" in charts
    assert not any("runtime" in title for title in charts)


def test_without_torch_pages_have_all_but_probabilities(pair: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules |= dict.fromkeys(['torch', 'transformers', 'matplotlib'])\n"
        "from xtoken.cli import main; main()"
    )
    for command in (["pair"], ["alignment", "--text", "in 201 days"]):
        out = tmp_path / f"{command[0]}.html"
        arguments = ["report", *command, *pair, "--out", str(out)]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        data = page_data(read_page(out.read_text(encoding="utf-8")))
    assert {chunk["counted"] for chunk in data["chunks"]} == {None}
    assert any(chunk["losses"] for chunk in data["chunks"])


def test_what_cannot_be_shown_is_one_line(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "page.html")
    align = ["alignment", *pair, "--out", out]
    assert "none.txt does not exist" in fails(capsys, *align, "--text", "none.txt")
    assert "does not exist" in fails(capsys, *align, "--text", "some/where")
    assert "limit = 0 is out of range" in fails(capsys, *align, "--text", "a b", "--limit", "0")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    assert "--row 2: " in fails(capsys, *align, "--text", str(rows), "--row", "2")
    rows.write_text('{"text": "a"}\n{"text": " "}\n{"text": "c"}\n')
    blank = fails(capsys, *align, "--text", str(rows), "--row", "2")
    assert "rows.jsonl:2: its text is blank" in blank
    assert read_document(str(rows), 3) == ("c", "rows.jsonl, row 3")
    nowhere = ["alignment", *pair, "--text", "a b", "--out", str(tmp_path / "none" / "page.html")]
    assert "there is no directory" in fails(capsys, *nowhere)
    assert "is a directory" in fails(capsys, "pair", *pair, "--out", str(tmp_path))
    assert "rows = 0 is out of range" in fails(capsys, "pair", *pair, "--out", out, "--rows", "0")
    model = ["--text", "a b", "--teacher-model", str(tmp_path / "none")]
    assert "no model that transformers can load" in fails(capsys, *align, *model)
    talk = tmp_path / "talk.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talk.write_text(json.dumps({"messages": messages}) + "\n")
    assert "holds no plain text" in fails(capsys, "pair", *pair, "--out", out, "--text", str(talk))
    assert "template" in fails(capsys, *align, "--text", str(talk))
    assert not Path(out).exists()


def test_a_run_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "page.html")
    (tmp_path / "state").mkdir()
    state = {"log_history": [{"step": 1, "loss": int("9" * 400)}]}
    (tmp_path / "state" / "trainer_state.json").write_text(json.dumps(state))
    large = fails(capsys, "run", str(tmp_path / "state"), "--out", str(tmp_path / "page.html"))
    assert "holds a number that is too large in its log_history" in large
    assert "has no metrics.jsonl and no trainer_state.json" in fails(
        capsys, "run", str(tmp_path), "--out", out
    )
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "ce": null}\n')
    assert "no record yet" in fails(capsys, "run", str(tmp_path), "--out", out)
    twice = [str(tmp_path), str(tmp_path)]
    assert "is named twice" in fails(capsys, "run", *twice, "--out", out)
    (tmp_path / "metrics.jsonl").write_text("no record\n")
    assert "line 1" in fails(capsys, "run", str(tmp_path), "--out", out)
