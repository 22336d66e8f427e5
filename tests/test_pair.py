"""The pair: what it is made from, what it makes, what it refuses."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizer_zoo as zoo
from forked import Forked
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import xtoken
from xtoken import Aligner, Pair, Projection, Vocab
from xtoken.errors import (
    ArgumentTypeError,
    DataError,
    FormatError,
    MissingFileError,
    OptionError,
    PairError,
    UnsupportedTokenizerError,
)

TEXT = "In 1969 a computer with 4,096 words of memory flew 384,400 km."


def sources(folder: Path) -> dict[str, tuple[object, object]]:
    files = [folder / side / "tokenizer.json" for side in ("student", "teacher")]
    return {
        "directories": (folder / "student", folder / "teacher"),
        "texts of paths": (str(folder / "student"), str(folder / "teacher")),
        "files": (files[0], files[1]),
        "transformers": tuple(
            AutoTokenizer.from_pretrained(folder / side) for side in ("student", "teacher")
        ),
        "tokenizers": tuple(Tokenizer.from_file(str(file)) for file in files),
        "one of each": (folder / "student", Tokenizer.from_file(str(files[1]))),
    }


def test_a_pair_is_the_same_from_whatever_it_is_made(folder: Path) -> None:
    pairs = {name: Pair(*given, cache_dir=False) for name, given in sources(folder).items()}
    first = pairs["directories"]
    for name, pair in pairs.items():
        assert pair.fingerprints == first.fingerprints, name
        assert pair.align(TEXT) == first.align(TEXT), name
        assert pair.projection.indices.tolist() == first.projection.indices.tolist(), name


def test_a_pair_of_vocabularies_aligns_ids_and_says_that_it_cannot_encode() -> None:
    student = Vocab.from_tokens([b"2", b"0", b"1", b"201"], ranked=True)
    teacher = Vocab.from_tokens([b"1", b"0", b"2"], ranked=True)
    pair = Pair(student, teacher, cache_dir=False)
    assert pair.align([3], [2, 1, 0]).shapes() == {(1, 3): 1}
    with pytest.raises(UnsupportedTokenizerError, match="the student is a Vocab"):
        pair.align("201")


def test_the_parts_are_those_that_are_built_by_hand(folder: Path) -> None:
    pair = Pair(folder / "student", folder / "teacher", cache_dir=False, decay=0.5)
    tokenizers = [AutoTokenizer.from_pretrained(folder / side) for side in ("student", "teacher")]
    projection = Projection.build(*tokenizers, decay=0.5, cache_dir=False)
    assert pair.projection.weights.tolist() == projection.weights.tolist()
    ids = [tokenizer(TEXT)["input_ids"] for tokenizer in tokenizers]
    assert pair.align(TEXT) == Aligner(*tokenizers).align(*ids)
    assert str(pair.explain("201")) == str(projection.explain("201"))
    assert pair.audit().recommendation in ("p-kl", "h-kl", "prefix-kl")
    assert pair.audit(TEXT).supervision


def test_parts_are_made_once(folder: Path) -> None:
    pair = Pair(folder / "student", folder / "teacher", cache_dir=False)
    assert pair.projection is pair.projection
    assert pair.aligner is pair.aligner
    assert pair.tries is pair.tries


def test_the_projection_is_kept_on_disk_by_fingerprint(folder: Path, tmp_path: Path) -> None:
    given = folder / "student", folder / "teacher"
    _ = Pair(*given, cache_dir=tmp_path).projection
    (file,) = tmp_path.glob("*.safetensors")
    written = file.stat().st_mtime_ns
    _ = Pair(*given, cache_dir=tmp_path).projection
    assert file.stat().st_mtime_ns == written
    _ = Pair(*given, cache_dir=tmp_path, decay=0.0).projection
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_saved_pair_reads_back_without_the_directories_it_came_from(
    folder: Path, tmp_path: Path
) -> None:
    pair = Pair(folder / "student", folder / "teacher", cache_dir=False, decay=0.25)
    pair.save(tmp_path / "pair")
    loaded = Pair.load(tmp_path / "pair")
    assert loaded.fingerprint == pair.fingerprint
    assert loaded.projection.weights.tolist() == pair.projection.weights.tolist()
    assert loaded.align(TEXT) == pair.align(TEXT)
    assert loaded.options == {**loaded.options, "decay": 0.25}


def test_a_saved_pair_of_vocabularies_reads_back(tmp_path: Path) -> None:
    student = Vocab.from_tokens([b"ab", b"a", b"b"], ranked=True)
    pair = Pair(student, Vocab.from_tokens([b"b", b"a"], ranked=True), cache_dir=False)
    pair.save(tmp_path)
    assert Pair.load(tmp_path).fingerprint == pair.fingerprint


# No file grows beyond what W takes, as on a disk that is nearly full: the tokenizers do not fit.
SAVED_ON_A_FULL_DISK = """
import resource, signal, sys
from xtoken import Pair
from xtoken.errors import FailedWriteError

student, teacher, out = sys.argv[1:]
pair = Pair(teacher, student, cache_dir=False)
pair.projection
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in range(2_000, 200_000, 4_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        pair.save(out)
    except FailedWriteError as error:
        print(error)
        Pair.load(out)
        continue
    break
print("saved")
"""


def test_a_pair_that_could_not_be_saved_leaves_the_one_that_was_there(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pair"
    Pair(folder / "student", folder / "teacher", cache_dir=False).save(out)
    (out / "notes.txt").write_text("kept")
    program = Forked(SAVED_ON_A_FULL_DISK, folder / "student", folder / "teacher", out)
    said, errors = program.communicate()
    assert program.returncode == 0, errors
    *failed, last = said.splitlines()
    assert last == "saved"
    assert len(failed) > 2
    # W fits long before the tokenizers do.
    assert any("projection.safetensors" not in each for each in failed)
    loaded = Pair.load(out)
    assert loaded.fingerprint == Pair(folder / "teacher", folder / "student").fingerprint
    assert {path.name for path in out.iterdir()} == {
        "notes.txt", "pair.json", "projection.safetensors", "student", "student.vocab", "teacher",
        "teacher.vocab",
    }  # fmt: skip


@pytest.mark.parametrize("file", ["pair.json", "student.vocab", "projection.safetensors"])
def test_a_damaged_file_of_a_saved_pair_is_named(folder: Path, tmp_path: Path, file: str) -> None:
    Pair(folder / "student", folder / "teacher", cache_dir=False).save(tmp_path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(FormatError, match=file.replace(".", r"\.")):
        Pair.load(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(MissingFileError, match=file.replace(".", r"\.")):
        Pair.load(tmp_path)


def test_a_pair_of_a_newer_format_is_refused(folder: Path, tmp_path: Path) -> None:
    Pair(folder / "student", folder / "teacher", cache_dir=False).save(tmp_path)
    description = json.loads((tmp_path / "pair.json").read_text())
    (tmp_path / "pair.json").write_text(json.dumps(description | {"format_version": 99}))
    with pytest.raises(FormatError, match="has format 99, this version of xtoken reads up to 1"):
        Pair.load(tmp_path)


def test_a_folder_with_the_vocabulary_of_another_pair_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    Pair(folder / "student", folder / "teacher", cache_dir=False).save(tmp_path / "one")
    Pair(folder / "teacher", folder / "student", cache_dir=False).save(tmp_path / "two")
    (tmp_path / "one" / "student.vocab").write_bytes(
        (tmp_path / "two" / "student.vocab").read_bytes()
    )
    with pytest.raises(FormatError, match=r"student\.vocab has fingerprint"):
        Pair.load(tmp_path / "one")


def test_a_person_can_read_what_a_pair_is(folder: Path) -> None:
    pair = Pair(folder / "student", folder / "teacher", cache_dir=False)
    sizes = [f"{size:,}" for size in pair.sizes]
    assert repr(pair) == (
        f"Pair(student ({sizes[0]} tokens, byte-level) <- teacher ({sizes[1]} tokens, byte-level); "
        "W not built yet)"
    )
    entries = len(pair.projection.indices)
    assert repr(pair).endswith(f"W of {entries:,} entries)")


def test_a_pair_with_other_options_shares_the_tokenizers(folder: Path) -> None:
    pair = Pair(folder / "student", folder / "teacher", cache_dir=False)
    other = pair.with_options(decay=0.0)
    assert other.student is pair.student
    assert other.fingerprints == pair.fingerprints
    assert other.fingerprint != pair.fingerprint
    assert len(other.projection.indices) < len(pair.projection.indices)


def test_a_pair_crosses_to_another_process(folder: Path) -> None:
    pair = Pair(folder / "student", folder / "teacher", cache_dir=False)
    again = pickle.loads(pickle.dumps(pair))
    assert again.fingerprint == pair.fingerprint
    assert again.align(TEXT) == pair.align(TEXT)


def test_half_a_character_is_refused_wherever_a_text_is_encoded(folder: Path) -> None:
    pair = Pair(folder / "student", folder / "teacher", cache_dir=False)
    calls = (
        pair.align,
        lambda text: pair.examples([text]),
        lambda text: pair.student.encode([text]),
    )
    for call in calls:
        with pytest.raises(DataError, match=r"text 'a.ud800' holds half a character"):
            call("a\ud800")
    with pytest.raises(ArgumentTypeError, match=r"texts\[0\] is int, expected a list of texts"):
        pair.student.encode([5])  # type: ignore[list-item]


def test_wrong_calls_name_the_call_that_was_meant(folder: Path) -> None:
    pair = Pair(folder / "student", folder / "teacher", cache_dir=False)
    with pytest.raises(ArgumentTypeError, match="ids of one side; pass those of the teacher too"):
        pair.align([1, 2])  # type: ignore[call-overload]
    with pytest.raises(ArgumentTypeError, match="a text and ids; pass a text, or the ids of both"):
        pair.align("text", [1])  # type: ignore[call-overload]
    with pytest.raises(OptionError, match="Pair has no option 'topk'; it knows top_k"):
        Pair(folder / "student", folder / "teacher", topk=3)  # type: ignore[call-arg]
    with pytest.raises(MissingFileError, match="no-such-place does not exist"):
        _ = Pair("no-such-place", folder / "teacher").sizes
    with pytest.raises(MissingFileError, match=r"pair\.json does not exist; write it with Pair\.s"):
        Pair.load(folder)


def test_a_tokenizer_that_reads_otherwise_than_its_file_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(folder / "student", folder / "teacher", cache_dir=False)
    _ = pair.student_vocab
    other = AutoTokenizer.from_pretrained(folder / "teacher")
    monkeypatch.setattr("xtoken.vocab.side.load_tokenizer", lambda source: other)
    with pytest.raises(PairError, match="pass the tokenizer object in place of the path"):
        _ = pair.student_tokenizer


def test_a_pair_of_paths_needs_neither_torch_nor_transformers(folder: Path) -> None:
    program = f"""
import sys
import xtoken
pair = xtoken.Pair({str(folder / "student" / "tokenizer.json")!r},
                   {str(folder / "teacher" / "tokenizer.json")!r}, cache_dir=False)
assert len(pair.align({TEXT!r})) > 5
assert len(pair.projection.indices) > 100
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_all_families_make_pairs() -> None:
    families = [zoo.byte_level_bpe(), zoo.deepseek()]
    pair = Pair(*families, cache_dir=False)
    assert pair.align(TEXT).coverage.student_byte_share == 1
    assert xtoken.Pair is Pair
