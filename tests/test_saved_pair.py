"""What lies on the disk of a pair: all that it is made from, and nothing of an earlier one."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from forked import Forked
from tiny_models import READ_HUB, write_hub
from transformers import AutoTokenizer

from xtoken import Pair, Vocab
from xtoken.errors import OptionError, UnsupportedTokenizerError

TEXT = "In 1969 a computer with 4,096 words of memory flew 384,400 km."


def made(folder: Path) -> Pair:
    return Pair(folder / "student", folder / "teacher", cache_dir=False)


def tokens() -> Pair:
    student = Vocab.from_tokens([b"ab", b"a", b"b"], ranked=True)
    return Pair(student, Vocab.from_tokens([b"b", b"a"], ranked=True), cache_dir=False)


@pytest.fixture
def stopping(folder: Path, tmp_path: Path) -> Path:
    """The pair of `folder`, whose student's model stops at a token more than its tokenizer says."""
    for name in ("student", "teacher"):
        shutil.copytree(folder / name, tmp_path / "of" / name)
    (tmp_path / "of" / "student" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 7]})
    )
    return tmp_path / "of"


def test_a_pair_saved_over_another_has_nothing_of_it(folder: Path, tmp_path: Path) -> None:
    printing = AutoTokenizer.from_pretrained(folder / "student")
    printing.chat_template = "{{ messages[0].content }}"
    Pair(printing, folder / "teacher", cache_dir=False).save(tmp_path)
    made(folder).save(tmp_path)
    assert getattr(Pair.load(tmp_path).student_tokenizer, "chat_template", None) is None
    tokens().save(tmp_path)
    loaded = Pair.load(tmp_path)
    assert loaded.fingerprint == tokens().fingerprint
    with pytest.raises(UnsupportedTokenizerError, match="the student is a Vocab"):
        loaded.align("ab")


def test_a_pair_is_saved_into_the_folder_that_it_came_from(folder: Path, tmp_path: Path) -> None:
    made(folder).save(tmp_path)
    loaded = Pair.load(tmp_path)
    loaded.save(tmp_path)
    assert Pair.load(tmp_path).align(TEXT) == made(folder).align(TEXT)


def test_a_save_that_was_cut_off_is_done_again(folder: Path, tmp_path: Path) -> None:
    made(folder).save(tmp_path)
    (tmp_path / "pair.json").unlink()
    made(folder).save(tmp_path)
    assert Pair.load(tmp_path).fingerprint == made(folder).fingerprint


def test_the_student_of_a_run_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "student", tmp_path / "student")
    with pytest.raises(OptionError, match=r"student/.* is of no saved pair, .*pass a folder"):
        made(folder).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]
    # Nor where a pair was there before.
    made(folder).save(tmp_path / "pair")
    weights = tmp_path / "pair" / "student" / "model.safetensors"
    shutil.copy(folder / "student" / "model.safetensors", weights)
    with pytest.raises(OptionError, match=r"model\.safetensors is of no saved pair"):
        tokens().save(tmp_path / "pair")
    assert weights.is_file()


def test_what_stops_the_models_is_kept(stopping: Path, tmp_path: Path) -> None:
    pair = made(stopping)
    assert 7 in pair.student_vocab.stops
    pair.save(tmp_path / "pair")
    shutil.rmtree(stopping)
    loaded = Pair.load(tmp_path / "pair")
    other = pickle.loads(pickle.dumps(loaded))
    for each in (loaded, other):
        assert each.student_vocab.stops == pair.student_vocab.stops
        assert each.fingerprint == pair.fingerprint
        assert [encoder.stops for encoder in each.encoders()] == [
            encoder.stops for encoder in pair.encoders()
        ]


def test_a_learned_w_goes_with_the_pair(folder: Path, tmp_path: Path) -> None:
    pair = made(folder)
    built = pair.projection.weights
    pair.projection = pair.projection.with_weights(np.sqrt(built))
    weights = pair.projection.weights
    assert not np.array_equal(weights, built)
    pair.save(tmp_path / "pair")
    loaded = Pair.load(tmp_path / "pair")
    for each in (pair, loaded):
        for found in (pickle.loads(pickle.dumps(each)), copy.copy(each), copy.deepcopy(each)):
            assert np.array_equal(found.projection.weights, weights)
            assert found.projection.options.origin == "learned"
    # A built one is built again, so that these bytes are the same before and after.
    plain = made(folder)
    before = pickle.dumps(plain)
    assert np.array_equal(plain.projection.weights, built)
    assert pickle.dumps(plain) == before


STOPS = """
import sys, warnings
from transformers import AutoTokenizer
from xtoken.vocab.side import Side
from xtoken.data.stops import vocab_with_stops

warnings.simplefilter("error" if sys.argv[1] == "there" else "always")
for source in ("owner/student", AutoTokenizer.from_pretrained("owner/student")):
    print(*vocab_with_stops(Side("student", source)).stops)
"""


def test_a_model_on_the_hub_stops_where_the_same_in_a_directory_does(
    stopping: Path, tmp_path: Path
) -> None:
    variables = write_hub(tmp_path)
    (file,) = tmp_path.glob("hub/models--owner--student/snapshots/*/generation_config.json")
    shutil.copy(stopping / "student" / file.name, file)
    output, errors = Forked(READ_HUB + STOPS, "there", **variables).communicate()
    expected = " ".join(map(str, made(stopping).student_vocab.stops))
    assert output.splitlines() == [expected] * 2, errors
    # As after a download of the tokenizer alone.
    file.unlink()
    output, errors = Forked(READ_HUB + STOPS, "missing", **variables).communicate()
    assert len(output.splitlines()) == 2, errors
    assert "owner/student may have a generation_config.json, which cannot be read" in errors
