"""`xtoken eval`: bits per byte by hand, and tasks where lm-eval is installed."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_texts, write_jsonl, write_pair
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from xtoken.cli import app

LM_EVAL = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    write_pair(folder)
    write_jsonl(folder / "data.jsonl", tiny_texts(12))
    return folder


def evaluate(workspace: Path, *flags: str) -> str:
    model = str(workspace / "teacher")
    result = CliRunner().invoke(app, ["eval", "--model", model, "--device", "cpu", *flags])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_bits_per_byte_are_those_of_the_texts(workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    output = evaluate(
        workspace, "--data", str(workspace / "data.jsonl"), "--out", str(out), "--max-tokens", "64"
    )
    model = AutoModelForCausalLM.from_pretrained(workspace / "teacher").double()
    tokenizer = AutoTokenizer.from_pretrained(workspace / "teacher")
    nats, count = 0.0, 0
    for text in tiny_texts(12):
        ids = torch.tensor([tokenizer(text).input_ids[:64]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        nats -= float(log_probs.gather(1, ids[0, 1:, None]).sum())
        count += len(tokenizer.decode(ids[0, 1:]).encode())
    score = json.loads(out.read_text())["texts"]
    assert score["bytes"] == count
    assert score["bits_per_byte"] == pytest.approx(nats / math.log(2) / count, rel=1e-5)
    assert f"{score['bits_per_byte']:.4f}" in output
    assert "texts are cut at 64 tokens" in output


def test_what_is_not_scored_is_counted_and_the_rest_is(workspace: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    rows = [{"text": "no figure here"}, {"messages": talk}, {"text": "x"}, {"text": "nor here"}]
    data = tmp_path / "data[a].jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "scores[v2].json"
    output = evaluate(workspace, "--data", str(data), "--out", str(out))
    assert "2 of 4 texts are left out" in output
    assert "the model's tokenizer has no chat template" in output
    assert "no token to score" in output
    assert "student" not in output
    assert out.name in output.replace(" ", "")
    assert "NaN" not in out.read_text()
    assert json.loads(out.read_text())["texts"]["numeral_nll"] is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tasks", ","), "--tasks ',' names none; pass names with commas between them"),
        (("--data", "DATA", "--limit", "1"), "--limit 1 without --tasks, of which it is; pass"),
        (("--data", "DATA", "--shots", "3"), "--shots 3 without --tasks"),
        ((), "nothing to score; pass --data with texts, --tasks with tasks of lm-eval, or both"),
        (("--data", "nowhere.jsonl"), "data file nowhere.jsonl does not exist"),
        (("--data", "DATA", "--max-tokens", "999"), "has 512 positions; pass 512 or less"),
        (("--data", "DATA", "--max-tokens", "1"), "--max-tokens 1, expected at least 2"),
        (("--data", "DATA", "--batch-size", "0"), "--batch-size 0, expected at least 1"),
        (("--data", "DATA", "--dtype", "int8"), "--dtype int8, expected auto, float32 or"),
    ],
)
def test_what_cannot_be_scored_is_told(workspace: Path, flags: tuple[str, ...], words: str) -> None:
    named = [str(workspace / "data.jsonl") if flag == "DATA" else flag for flag in flags]
    with pytest.raises(Exception, match=words):
        evaluate(workspace, *named)


@pytest.mark.skipif(LM_EVAL, reason="lm-eval is installed")
def test_tasks_without_lm_eval_are_refused_before_anything_is_loaded(workspace: Path) -> None:
    with pytest.raises(ImportError, match="--tasks needs lm-eval, which is not installed; run pip"):
        evaluate(workspace, "--tasks", "gsm8k")


@pytest.mark.skipif(not LM_EVAL, reason="lm-eval is not installed")
def test_a_task_of_a_file_is_run_by_lm_eval(workspace: Path, tmp_path: Path) -> None:
    questions = [{"q": f"Is {n} one?", "a": n % 2} for n in range(4)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "tiny_choice.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'q.jsonl'}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: ['yes', 'no']\ndoc_to_target: '{{a}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    out = tmp_path / "scores.json"
    evaluate(workspace, "--tasks", str(tmp_path / "tiny_choice.yaml"), "--out", str(out))
    assert 0 <= json.loads(out.read_text())["tasks"]["tiny_choice"]["acc"] <= 1
    with pytest.raises(Exception, match=r"lm-eval cannot run no_such_task .*; check the names"):
        evaluate(workspace, "--tasks", "no_such_task")
