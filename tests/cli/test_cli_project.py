"""`xtoken project`: each command on real files, and what it says of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizer_zoo as zoo
from tiny_models import tiny_texts, write_pair
from typer.testing import CliRunner

from xtoken import Projection, Vocab
from xtoken.cli import app, main

WIDE = {"COLUMNS": "200", "TERM": "dumb"}


@pytest.fixture(name="pair", scope="module")
def _pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a student packing three digits and a teacher with one a token."""
    folder = tmp_path_factory.mktemp("tokenizers")
    zoo.byte_level_bpe().save(str(folder / "student.json"))
    zoo.byte_level_bpe(2000, 1).save(str(folder / "teacher.json"))
    return ["--student", str(folder / "student.json"), "--teacher", str(folder / "teacher.json")]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["project", *arguments], env=WIDE, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of the command as the shell runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["xtoken", "project", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_build_writes_a_file_that_show_explain_and_the_library_read(
    pair: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "w.safetensors"
    built = run("build", *pair, "--out", str(out), "--decay", "0.2", "--reverse", "unmatched")
    assert "numerals, 3 digits" in built
    assert "decay 0.2" in built
    w = Projection.load(out, pair[1], pair[3])
    assert (w.options.decay, w.options.reverse) == (0.2, "unmatched")
    assert f"{w.stats()['exact']:,}" in run("show", str(out))
    shown = run("explain", "201", *pair, "--file", str(out))
    assert "'2' (0.80" in shown


def test_build_pairs_special_tokens_as_told(pair: list[str], tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    roles = ["--special-role", f"bos={begin},{end}", "--special-role", f"eos={end},{begin}"]
    run("build", *pair, "--out", str(out), *roles)
    w = Projection.load(out, pair[1], pair[3])
    assert w.explain(begin).entries[0].token == end
    assert w.explain(end).entries[0].token == begin


def test_explain_builds_w_itself_and_takes_ids_and_escapes(pair: list[str]) -> None:
    shown = run("explain", "201", r"\xe2", "<|begin_of_text|>", *pair)
    assert "'2' (0.9009)  '0' (0.0901)  '1' (0.0090)" in shown
    assert r"b'\xe2'" in shown
    assert "role" in shown
    token_id = Vocab.from_path(pair[1]).id_of(b"201")
    assert "'201'" in run("explain", "--ids", str(token_id), *pair)


def test_export_and_import_exchange_the_table(pair: list[str], tmp_path: Path) -> None:
    out, table = str(tmp_path / "w.safetensors"), str(tmp_path / "w.pt")
    run("build", *pair, "--out", out)
    run("export", out, "--out", table)
    assert "imported" in run("import", table, *pair, "--out", str(tmp_path / "back.safetensors"))
    back, w = (Projection.load(tmp_path / f"{name}.safetensors") for name in ("back", "w"))
    assert back.indices.tolist() == w.indices.tolist()


def test_audit_prints_tables_json_and_a_page(pair: list[str], tmp_path: Path) -> None:
    page = tmp_path / "audit.html"
    printed = run("audit", *pair, "--html", str(page))
    assert "recommended: prefix KL (the default)" in printed
    assert "three-digit numerals" in printed
    assert "<!doctype html>" in page.read_text()
    result = json.loads(run("audit", *pair, "--json"))
    assert result["recommendation"] == "prefix-kl"
    assert result["classes"][0]["name"] == "one-digit numerals"


def test_audit_of_a_text_shows_where_the_teachers_mass_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = write_pair(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny_texts(3)))
    sides = ["--student", str(student), "--teacher", str(teacher)]
    given = [*sides, "--text", str(text), "--teacher-model", str(teacher)]
    arguments = ["project", "audit", *given, "--json"]
    # Beside it transformers prints what it loads.
    found = CliRunner().invoke(app, arguments, env=WIDE, catch_exceptions=False)
    result = json.loads(found.stdout)
    assert {item["name"] for item in result["placement"]} >= {"1:1", "1:n"}
    boundaries = [
        sum(item["boundaries"] for item in result[part])
        for part in ("placement", "placement_by_class")
    ]
    assert boundaries[0] == boundaries[1] > 20
    assert "dropped by P-KL" in run("audit", *given)
    assert "--text FILE" in fails(capsys, "audit", *sides, "--teacher-model", str(teacher))


def test_what_is_wrong_is_one_line(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "w.safetensors"
    run("build", *pair, "--out", str(out))
    swapped = ["--student", pair[3], "--teacher", pair[1]]
    assert "student and teacher are swapped" in fails(capsys, "show", str(out), *swapped)
    missing = ["--student", str(tmp_path / "none"), *pair[2:]]
    assert "does not exist" in fails(capsys, "audit", *missing)
    assert "top_k = 0" in fails(capsys, "build", *pair, "--out", str(out), "--top-k", "0")
    assert "reverse = 'x'" in fails(capsys, "build", *pair, "--out", str(out), "--reverse", "x")
    unknown = ["--special-role", "eot=<x>,<y>"]
    error = fails(capsys, "build", *pair, "--out", str(out), *unknown)
    assert "special_roles['eot'][0] = '<x>' is not in the vocabulary" in error
    nowhere = str(tmp_path / "none" / "w.safetensors")
    assert "there is no directory" in fails(capsys, "build", *pair, "--out", nowhere)
    assert "is not one token of the student" in fails(capsys, "explain", "of the", *pair)
    out.write_bytes(out.read_bytes()[:2000])
    assert "is truncated" in fails(capsys, "show", str(out))
    assert "does not exist" in fails(capsys, "import", nowhere, *pair, "--out", str(out))


def test_an_id_that_is_no_number_is_a_usage_error(pair: list[str]) -> None:
    result = CliRunner().invoke(app, ["project", "explain", "--ids", "x", *pair], env=WIDE)
    assert result.exit_code == 2
    assert "'x' is not an id" in result.output


def test_a_special_role_of_another_form_is_a_usage_error(pair: list[str]) -> None:
    for text in ("eot", "eot=<x>", "=<x>,<y>", "eot=<x>,<y>,<z>"):
        arguments = ["project", "build", *pair, "--out", "w", "--special-role", text]
        result = CliRunner().invoke(app, arguments, env=WIDE)
        assert result.exit_code == 2
        assert "is not of the form ROLE=STUDENT,TEACHER" in result.output


def test_help_lists_the_commands_and_loads_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from xtoken.cli import app;"
        "out = CliRunner().invoke(app, ['project', '--help']).output;"
        "assert 'torch' not in sys.modules, 'torch was imported'; print(out)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | WIDE,
    ).stdout  # fmt: skip
    for command in ("build", "show", "explain", "export", "import", "audit"):
        assert f" {command} " in output
