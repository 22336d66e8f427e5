"""`xtoken align` and `xtoken vocab`: what they show, write and refuse."""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_zoo as zoo
from tokenizers import Tokenizer, decoders, models, normalizers
from typer.testing import CliRunner

from xtoken import Aligner, ChunkKind, Vocab
from xtoken._locks import locked
from xtoken.cli import app, main
from xtoken.vocab.display import visible

WIDE = {"COLUMNS": "200", "TERM": "dumb"}
TEXTS = [text[:500] for text in zoo.TEXT[:25]]


@pytest.fixture(name="pair", scope="module")
def _pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    zoo.byte_level_bpe().save(str(folder / "student.json"))
    (folder / "teacher").mkdir()
    content = zoo.sentencepiece_bpe().to_str().encode()
    (folder / "teacher" / "tokenizer.json.xz").write_bytes(lzma.compress(content, preset=0))
    return ["--student", str(folder / "student.json"), "--teacher", str(folder / "teacher")]


def run(*arguments: str, text: str | None = None) -> str:
    result = CliRunner().invoke(app, arguments, input=text, env=WIDE, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of the command as the shell runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["xtoken", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_a_person_sees_shapes_kinds_and_bytes(pair: list[str]) -> None:
    shown = run("align", *pair, "-", text="in 201\n\x07 é<|end_of_text|>?")
    assert "2│0│1" in shown or "20│1" in shown or "201" in shown
    assert "\\x07" in shown
    assert "<|end_of_text|> ∅" in shown
    assert "∅               <" in shown
    assert "⏎" in shown
    assert "student only" in shown
    assert "coverage" in shown
    assert "1:1" in shown
    assert "more chunks" in run("align", *pair, "--limit", "1", text="one two three")


def test_white_space_and_lone_bytes_are_made_visible() -> None:
    assert visible(b"a b\n\t\r") == "a·b⏎⇥␍"
    assert visible(b"\xe2\x82") == "\\xe2\\x82"
    assert visible("é\u200d\x00".encode()) == "é\\xe2\\x80\\x8d\\x00"


def test_a_program_gets_all_of_it(pair: list[str], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Hundreds of 201 naïve tokens", encoding="utf-8")
    answer: dict[str, Any] = json.loads(run("align", *pair, "--json", str(file)))
    student, teacher = answer["student"], answer["teacher"]
    expected = Aligner(pair[1], pair[3]).align(student["ids"], teacher["ids"])
    assert student["bounds"] == expected.student_bounds.tolist()
    assert answer["kind"] == [ChunkKind(kind).name for kind in expected.kind.tolist()]
    assert bytes.fromhex("".join(student["hex"])).decode() == file.read_text(encoding="utf-8")
    assert answer["coverage"]["exact_bytes"] == expected.coverage.exact_bytes
    assert answer["coverage"]["student_byte_share"] == 1.0
    assert sum(answer["shapes"].values()) == len(expected)
    whole = json.loads(run("align", *pair, "--json", "--whole-characters", text="naïve 😀"))
    assert len(whole["kind"]) <= len(whole["student"]["ids"])


def test_special_tokens_can_be_left_out(pair: list[str]) -> None:
    bare = json.loads(run("align", *pair, "--json", "--no-special-tokens", text="a"))
    assert bare["student"]["tokens"] == ["a"]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def test_a_corpus_becomes_columns_that_datasets_loads(pair: list[str], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    out = tmp_path / "out"
    arguments = ["align", *pair, "--batch", str(source), "--out", str(out), "--rows", "10"]
    said = json.loads(run(*arguments, "--json"))
    assert (said["rows"], said["files"], said["made_now"]) == (25, 3, 3)
    table = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(table) == 25
    aligner = Aligner(pair[1], pair[3])
    student = zoo.byte_level_bpe()
    for row, text in zip(table, TEXTS, strict=True):
        assert row["student_ids"] == student.encode(text).ids
        expected = aligner.align(row["student_ids"], row["teacher_ids"])
        for name in ("student_bounds", "teacher_bounds", "kind", "byte_counts"):
            np.testing.assert_array_equal(row[name], getattr(expected, name))
    assert table["row"][:] == list(range(25))


def test_an_interrupted_corpus_goes_on_where_it_stopped(pair: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    out = tmp_path / "out"
    arguments = ["align", *pair, "--batch", str(source), "--out", str(out), "--rows", "10"]
    (out / ".xtoken-align").mkdir(parents=True)  # as of a run that was cut off at its start
    first = json.loads(run(*arguments, "--json"))
    whole = {file.name: file.read_bytes() for file in out.glob("*.parquet")}
    # As if the second part had been cut off before it was whole.
    (out / "part-00001.parquet").unlink()
    (out / ".part-00002.parquet.1.partial").write_bytes(b"half")
    again = json.loads(run(*arguments, "--json"))
    assert again["made_now"] == 1
    assert again["coverage"] == first["coverage"]
    assert {file.name: file.read_bytes() for file in out.glob("part-*")} == whole
    assert "25 rows in 3 files" in run(*arguments)


def test_two_processes_do_not_align_into_one_directory(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "texts.jsonl", tmp_path / "aligned"
    source.write_text(json.dumps({"text": "one two"}))
    arguments = ["align", *pair, "--batch", str(source), "--out", str(out)]
    run(*arguments)
    with locked(out / ".xtoken-align" / ".lock"):
        assert f"another process aligns into {out}; wait for its end" in fails(capsys, *arguments)
    run(*arguments)


def test_a_parquet_corpus_is_read_by_its_column(pair: list[str], tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    source = tmp_path / "texts.parquet"
    parquet.write_table(pa.table({"body": TEXTS[:3]}), source)
    out = tmp_path / "out"
    arguments = ["align", *pair, "--batch", str(source), "--out", str(out)]
    assert json.loads(run(*arguments, "--text-field", "body", "--json"))["rows"] == 3
    assert len(parquet.read_table(out / "part-00000.parquet")) == 3


def test_rows_are_those_of_the_source_and_blank_ones_are_left_out(
    pair: list[str], tmp_path: Path
) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = ["first", "", " \n", "second", "third"]
    lines = write_jsonl(tmp_path / "texts.jsonl", texts)
    lines.write_text("\n" + lines.read_text() + "\n\n")
    parquet.write_table(pa.table({"text": texts}), tmp_path / "texts.parquet")
    for source in (lines, tmp_path / "texts.parquet"):
        out = tmp_path / f"out{source.suffix}"
        arguments = ["align", *pair, "--batch", str(source), "--out", str(out), "--rows", "2"]
        said = json.loads(run(*arguments, "--json"))
        assert (said["rows"], said["left_out"], said["files"]) == (3, 2, 2)
        assert "2 with a blank text left out" in run(*arguments)
        parts = [parquet.read_table(file) for file in sorted(out.glob("*.parquet"))]
        assert [row for part in parts for row in part["row"].to_pylist()] == [0, 3, 4]


def test_a_corpus_is_of_its_tokenizers_and_not_of_their_vocabularies_alone(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS[:3])
    student = tmp_path / "student.json"
    student.write_bytes(Path(pair[1]).read_bytes())
    arguments = ["align", "--student", str(student), *pair[2:], "--batch", str(source)]
    arguments += ["--out", str(tmp_path / "out")]
    run(*arguments)
    before = Aligner(str(student), pair[3]).fingerprint
    tokenizer = Tokenizer.from_file(str(student))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(student))
    assert Aligner(str(student), pair[3]).fingerprint == before
    assert "of another student_tokenizer; pass another --out" in fails(capsys, *arguments)


def test_a_byte_order_mark_is_no_part_of_a_text(pair: list[str], tmp_path: Path) -> None:
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfsome text")
    (tmp_path / "plain.txt").write_bytes(b"some text")
    marked, plain = (
        json.loads(run("align", *pair, "--json", str(tmp_path / name)))
        for name in ("marked.txt", "plain.txt")
    )
    assert marked["student"]["ids"] == plain["student"]["ids"]


def test_a_vocabulary_is_described_with_its_traps(pair: list[str], tmp_path: Path) -> None:
    shown = run("vocab", pair[3])
    for part in ("sentencepiece", "every", "byte fallback", "BPE", "<s>", "more than one id"):
        assert part in shown
    facts = json.loads(run("vocab", "--json", pair[1]))
    assert facts["fingerprint"] == Vocab.from_path(pair[1]).fingerprint
    assert facts["size"] == facts["normal"] + facts["special"]
    assert facts["roles"]["bos"]["text"] == "<|begin_of_text|>"
    assert facts["traps"]["tokens that are not UTF-8 alone"]["count"] >= 128
    assert json.loads(run("vocab", "--json", pair[3]))["traps"]["characters that become a space"]
    ranks = tmp_path / "small.tiktoken"
    ranks.write_bytes(b"YQ== 0\nYg== 3\n")
    assert "ids without a token" in run("vocab", str(ranks))
    words = tmp_path / "words.json"
    zoo.wordpiece().save(str(words))
    assert "lossy" in run("vocab", str(words))


def test_a_special_token_that_looks_like_markup_is_shown(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["[bold]", "[/INST]", ":key:"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "[/INST]", "pad_token": "[bold]", "bos_token": ":key:"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    shown = run("vocab", str(tmp_path))
    assert "[/INST]" in shown
    assert "[bold]" in shown
    assert ":key:" in shown


def test_what_a_terminal_would_obey_is_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = zoo.byte_level_bpe(300)
    hostile = ["<\x1b[31mred>", "<a\nb>", "<\u202etxt>"]
    tokenizer.add_special_tokens(hostile)
    file = str(tmp_path / "tokenizer.json")
    tokenizer.save(file)
    sides = ["--student", file, "--teacher", file]
    (tmp_path / "text.txt").write_text("".join(hostile))
    align = ["align", *sides, str(tmp_path / "text.txt")]
    for arguments in (["vocab", file], align, ["project", "audit", *sides]):
        shown = run(*arguments)
        assert not {"\x1b", "\u202e"} & set(shown), arguments
    assert "<\\x1b[31mred>" in run(*align)
    missing = str(tmp_path / "no\x1b[31m.json")
    assert "\x1b" not in fails(capsys, "vocab", missing)


def test_a_vocabulary_shows_what_only_its_file_says(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "Ġb": 1, "a▁b": 2}, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("▁")])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<think>", " x"])
    tokenizer.add_special_tokens(["<|end|>"])
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    traps = json.loads(run("vocab", "--json", str(tmp_path)))["traps"]
    assert traps["added tokens that are plain text"]["examples"] == ["<think> (3)", "·x (4)"]
    assert traps["keys outside the byte alphabet"]["examples"] == ["a▁b (2)"]
    assert traps["changes of text before it is tokenized"]["examples"] == ["NFC"]
    assert "<think>" in run("vocab", str(file))


def test_bad_arguments_are_one_line_that_says_what_to_do(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"fine \xff")
    assert "not UTF-8 at byte 5" in fails(capsys, "align", *pair, str(text))
    missing = ["--student", str(tmp_path / "none"), *pair[2:]]
    assert "does not exist" in fails(capsys, "align", *missing, str(text))
    absent = fails(capsys, "align", *pair, str(tmp_path / "none.txt"))
    assert "none.txt does not exist; pass a UTF-8 text" in absent
    assert "is a directory, expected a text file" in fails(capsys, "align", *pair, str(tmp_path))
    ranks = tmp_path / "small.tiktoken"
    ranks.write_bytes(b"YQ== 0\n")
    no_encoder = ["--student", str(ranks), *pair[2:]]
    assert "no encoder for text" in fails(capsys, "align", *no_encoder, str(text))
    assert "does not exist" in fails(capsys, "vocab", str(tmp_path / "none"))


def test_a_bad_corpus_is_one_line_that_says_what_to_do(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    source = str(write_jsonl(tmp_path / "texts.jsonl", TEXTS[:3]))
    align = ["align", *pair]
    assert "go together" in fails(capsys, *align, "--batch", source)
    batch = [*align, "--out", out, "--batch"]
    assert "neither .jsonl nor .parquet" in fails(capsys, *batch, "texts.csv")
    assert "none.jsonl" in fails(capsys, *batch, str(tmp_path / "none.jsonl"))
    assert "none.parquet" in fails(capsys, *batch, str(tmp_path / "none.parquet"))
    assert "--rows 0" in fails(capsys, *batch, source, "--rows", "0")
    assert "texts.jsonl:1 has no string in field 'body'" in fails(
        capsys, *batch, source, "--text-field", "body"
    )
    assert not Path(out).exists()
    both = tmp_path / "both.jsonl"
    both.write_text('{"text": "a", "body": "b"}\n')
    run(*batch, str(both), "--text-field", "body")
    assert "of another text_field" in fails(capsys, *batch, str(both))
    full = tmp_path / "full"
    full.mkdir()
    (full / "note").touch()
    other = [*align, "--out", str(full), "--batch", source]
    assert "not empty" in fails(capsys, *other)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text"\n')
    new = [*align, "--out", str(tmp_path / "new"), "--batch"]
    assert "broken.jsonl:2 is not JSON" in fails(capsys, *new, str(broken))
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    newer = [*align, "--out", str(tmp_path / "newer"), "--batch"]
    assert "holds no text" in fails(capsys, *newer, str(empty))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rows", "5"), "--rows 5 is for --batch; pass --batch and --out, or leave it out"),
        (("--threads", "2"), "--threads 2 is for --batch; pass --batch and --out, or leave it"),
        (("--text-field", "a"), "--text-field a is for --batch; pass --batch and --out, or"),
        (("--limit", "3", "--json"), "--limit 3 with --json, which has all chunks; leave one"),
        (("--batch", "a.jsonl", "--out", "out", "--limit", "3"), "--limit 3 with --batch, which"),
        (("a.txt", "--batch", "a.jsonl", "--out", "out"), "a.txt beside --batch a.jsonl, which"),
    ],
)
def test_what_the_other_way_to_align_reads_is_not_ignored(
    capsys: pytest.CaptureFixture[str], pair: list[str], flags: tuple[str, ...], message: str
) -> None:
    assert message in fails(capsys, "align", *pair, *flags)
