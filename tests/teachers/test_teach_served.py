"""`xtoken teach --url`: a server's predictions of a corpus, and a run from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from run_command import invoke
from served_server import Faults, ServedModel
from tiny_models import tiny_texts, write_jsonl
from transformers import AutoTokenizer

from xtoken.teachers import LiveTeacher, TopKStore


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_store_of_a_server_is_that_of_the_model_and_is_trained_from(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", tiny_texts(20))
    live = LiveTeacher.from_pretrained(folder / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    common = ("--teacher", folder / "teacher", "--data", data, "--top-k", 16, "--dtype", "float32")
    with ServedModel(live.model, kind, tokenizer=tokenizer, faults=Faults(cap=-1)) as server:
        output = invoke("teach", *common, "--url", server.url, "--out", tmp_path / "served")
        assert "tokens per second" in output
        asked = server.requests
        invoke("teach", *common, "--url", server.url, "--out", tmp_path / "served")
        assert server.requests - asked < asked  # only what tells that it is the same model
    invoke("teach", *common, "--out", tmp_path / "live")
    served, own = (TopKStore.open(tmp_path / name) for name in ("served", "live"))
    assert len(served) == len(own)
    for shard in own._shards:
        for index in range(len(shard.digests)):
            expected, found = shard.read(index), served.get(shard.tokens(index))
            np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)
    output = invoke(
        "distill", "--student", folder / "student", "--teacher-store", tmp_path / "served",
        "--data", data, "--out", tmp_path / "run", "--steps", 1, "--device", "cpu",
        "--max-tokens", 64, "--no-curves",
    )  # fmt: skip
    assert "0 of them computed now" in output


def test_a_server_without_its_tokenizer_or_without_an_answer_is_told(
    folder: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", tiny_texts(3))
    common = ("--data", data, "--out", tmp_path / "store")
    with pytest.raises(Exception, match="--url needs --teacher too, a directory with its tokeni"):
        invoke("teach", *common, "--url", "http://127.0.0.1:1")
    with pytest.raises(Exception, match=r"teacher nowhere does not exist; pass a directory"):
        invoke("teach", *common, "--teacher", "nowhere")
    with pytest.raises(Exception, match=r"model nowhere does not exist; pass a directory"):
        invoke("eval", "--model", "nowhere", "--data", data)
