"""`xtoken transfer`: a model with another tokenizer that loads, and can be distilled further."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from click.testing import Result
from tiny_models import tiny_texts, write_jsonl, write_pair
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from xtoken import Pair
from xtoken.cli import app
from xtoken.errors import XTokenError


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("transfer")
    write_pair(made)
    write_jsonl(made / "texts.jsonl", tiny_texts(16))
    done = transfer(made, made / "out")
    assert done.exit_code == 0, done.output
    (made / "output.txt").write_text(done.output)
    return made


def transfer(
    workspace: Path, out: Path, *flags: str, model: str = "teacher", tokenizer: str = "student"
) -> Result:
    sources = ["--model", str(workspace / model), "--tokenizer", str(workspace / tokenizer)]
    return CliRunner().invoke(app, ["transfer", *sources, "--out", str(out), *flags])


def test_what_is_written_loads_as_what_was_made(workspace: Path) -> None:
    sides = [AutoTokenizer.from_pretrained(workspace / name) for name in ("out", "teacher")]
    model = AutoModelForCausalLM.from_pretrained(workspace / "teacher", dtype=torch.float32)
    Pair(*sides, cache_dir=False).transfer_embeddings(model)
    loaded = AutoModelForCausalLM.from_pretrained(workspace / "out", dtype=torch.float32)
    ids = sides[0]("In 1969 a computer had 4,096 words.", return_tensors="pt").input_ids
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.config.vocab_size == len(sides[0])
    assert loaded.generation_config.eos_token_id == sides[0].eos_token_id


def test_the_tokenizer_is_the_one_that_was_asked_for(workspace: Path) -> None:
    text = "def f(x):\n    return 2023"
    made, asked = (AutoTokenizer.from_pretrained(workspace / name) for name in ("out", "student"))
    assert made(text).input_ids == asked(text).input_ids


def test_the_table_says_what_became_of_the_tokens(workspace: Path) -> None:
    shown = (workspace / "output.txt").read_text()
    counts = json.loads((workspace / "out" / "transfer.json").read_text())
    assert "without a source" in shown
    assert "three-digit numerals" in shown
    assert counts["without_source"] == 2
    total = counts["copied"] + counts["averaged"] + counts["without_source"] + counts["unused"]
    assert total == len(AutoTokenizer.from_pretrained(workspace / "student"))


def test_distillation_from_the_old_model_goes_on_with_it(workspace: Path, tmp_path: Path) -> None:
    arguments = [
        *("distill", "--student", str(workspace / "out"), "--teacher", str(workspace / "teacher")),
        *("--data", str(workspace / "texts.jsonl"), "--out", str(tmp_path / "run")),
        *("--steps", "1", "--batch-size", "2", "--max-tokens", "48", "--device", "cpu"),
        "--no-curves",
        *("--teacher-cache", str(tmp_path / "cache")),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output


def test_an_untied_checkpoint_whose_config_says_tied_keeps_both_tables(
    workspace: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(workspace / "teacher")
    torch.nn.init.normal_(model.lm_head.weight)
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
    model.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(workspace / "teacher").save_pretrained(tmp_path / "teacher")
    assert model.config.tie_word_embeddings
    done = transfer(workspace, tmp_path / "new", model=str(tmp_path / "teacher"))
    assert done.exit_code == 0, done.output
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    # One table is minus the other, so the new ones are.
    assert not made.config.tie_word_embeddings
    torch.testing.assert_close(made.lm_head.weight, -made.get_input_embeddings().weight)


def test_more_pieces_are_the_mean_of_all_of_them(workspace: Path, tmp_path: Path) -> None:
    tokenizers = [
        AutoTokenizer.from_pretrained(workspace / name) for name in ("student", "teacher")
    ]
    tokenizers[0].add_tokens(["zyxwvuts"])
    tokenizers[0].save_pretrained(tmp_path / "longer")
    token = len(tokenizers[0]) - 1
    pieces = tokenizers[1]("zyxwvuts", add_special_tokens=False).input_ids
    assert 4 < len(pieces) <= 8
    longer = str(tmp_path / "longer")
    done = transfer(workspace, tmp_path / "new", "--max-pieces", "8", tokenizer=longer)
    assert done.exit_code == 0, done.output
    old, new = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).lm_head.weight.detach()
        for folder in (workspace / "teacher", tmp_path / "new")
    )
    torch.testing.assert_close(new[token], old[pieces].mean(0))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_a_directory_of_adapters_is_refused_in_one_line(workspace: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(workspace / "teacher")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapters")
    with pytest.raises(XTokenError, match="adapters holds adapters; merge them first"):
        raise_of(transfer(workspace, tmp_path / "new", model=str(tmp_path / "adapters")))


def test_a_directory_with_files_is_not_written_to(workspace: Path) -> None:
    with pytest.raises(XTokenError, match="is not empty; pass a new directory"):
        raise_of(transfer(workspace, workspace / "out"))


def test_a_model_that_is_not_there_is_named(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(XTokenError, match=r"model directory .*nowhere does not exist"):
        raise_of(transfer(workspace, tmp_path / "new", model="nowhere"))
    assert not (tmp_path / "new").exists()


def test_an_unknown_dtype_is_refused_with_those_that_there_are(
    workspace: Path, tmp_path: Path
) -> None:
    with pytest.raises(XTokenError, match="--dtype int8, expected auto, float32 or bfloat16"):
        raise_of(transfer(workspace, tmp_path / "new", "--dtype", "int8"))


def test_nothing_is_left_of_a_transfer_that_failed(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(XTokenError, match="pad_to_multiple_of = 0"):
        raise_of(transfer(workspace, tmp_path / "new", "--pad-to-multiple-of", "0"))
    assert list(tmp_path.iterdir()) == []


def raise_of(done: Result) -> None:
    assert done.exception is not None
    raise done.exception
