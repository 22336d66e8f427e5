"""Every code block of the README and of docs/ runs as printed, on tiny models where it expects its
own, and prints what the page says."""

from __future__ import annotations

import json
import pydoc_data.topics
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from doc_blocks import blocks, commands, faults, run
from real_texts import TOPICS
from served_server import ServedModel
from tiny_models import tiny_texts, write_jsonl, write_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtoken.tensors.pair_parts import PARTS_OF_LOSS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
TEMPLATES = {
    "student": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '\n' + message['role'] + ':\n' }}{{ message['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nassistant:\n' }}{% endif %}"
    ),
    "teacher": (
        "{% for message in messages %}{{ '## ' + message['role'] + '\n' }}"
        "{{ message['content'] | trim + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '## assistant\n' }}{% endif %}"
    ),
}

OLD_COMPILER = tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 8)
# Of the libraries that pages call; ours are of other classes.
pytestmark = [
    pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documentation is not here"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and texts by the names that pages use."""
    folder = tmp_path_factory.mktemp("materials")
    for directory in write_pair(folder):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.chat_template = TEMPLATES[directory.name]
        tokenizer.save_pretrained(directory)
    texts = [text[:200] for text in tiny_texts(48)]
    write_jsonl(folder / "texts.jsonl", texts)
    talks = [
        [
            {"role": "user", "content": text[:60].strip()},
            {"role": "assistant", "content": text[60:].strip()},
        ]
        for text in texts
    ]
    lines = (json.dumps({"messages": talk}) + "\n" for talk in talks)
    (folder / "conversations.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def folder(materials: Path, tmp_path: Path) -> Path:
    shutil.copytree(materials, tmp_path, dirs_exist_ok=True)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    for side in ("student", "teacher"):
        shutil.copytree(tmp_path / side, tmp_path / "runs" / "demo" / side)
    return tmp_path


@pytest.fixture
def server(materials: Path) -> Iterator[str]:
    """What stands for `http://localhost:8000`: the tiny teacher behind vLLM's completions."""
    model = AutoModelForCausalLM.from_pretrained(materials / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(materials / "teacher")
    with ServedModel(model, "vllm", tokenizer=tokenizer) as served:
        yield served.url


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run_as_printed(
    name: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    text = page(name)
    if name == "docs/add-a-loss.md" and OLD_COMPILER:
        pytest.skip("an older torch.compile")
    # Other versions of Python have another text, of which other tokens come.
    monkeypatch.setattr(pydoc_data.topics, "topics", TOPICS)
    # docs/add-a-loss.md adds one, which goes with the page.
    monkeypatch.setitem(PARTS_OF_LOSS, "peak", frozenset())
    if "http://localhost:8000" in text:
        text = text.replace("http://localhost:8000", request.getfixturevalue("server"))
    run(text, name, folder, monkeypatch)


@pytest.mark.parametrize("name", PAGES)
def test_each_block_is_run_or_says_why_not(name: str) -> None:
    assert faults(page(name)) == []


def test_the_pages_have_blocks_that_run() -> None:
    running = [block for name in PAGES for block in blocks(page(name)) if block.not_run is None]
    assert sum(block.language == "python" for block in running) >= 10
    assert sum(block.language == "console" for block in running) >= 5


WRONG = '```python\nprint(1)\n```\n\n```text title="prints"\n2\n```\n'


def test_a_page_that_prints_something_else_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"wrong\.md:6"):
        run(WRONG, "wrong.md", tmp_path, monkeypatch)
    assert run(WRONG.replace("2", "1"), "right.md", tmp_path, monkeypatch) == 1


def test_a_command_that_fails_without_saying_so_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "```console\n$ xtoken vocab nowhere\nerror: {}\n```\n"
    assert run(text.format("...nowhere..."), "right.md", tmp_path, monkeypatch) == 1
    with pytest.raises(pytest.fail.Exception):
        run(text.format("...elsewhere..."), "wrong.md", tmp_path, monkeypatch)


def test_blocks_that_nobody_runs_are_faults() -> None:
    assert faults("```bash\nls\n```\n")
    assert faults("    indented\n")
    assert faults('```text title="prints"\n1\n```\n')
    assert not faults("*Not run by the tests: it needs a GPU.*\n\n```bash\nls\n```\n")
    assert not faults('```json title="a.json"\n{}\n```\n')


def test_the_commands_of_a_console_block() -> None:
    text = "$ one \\\n      --two\nout\n$ three\n"
    assert list(commands(text)) == [("one --two", "out\n"), ("three", "")]


def test_the_example_of_the_readme_is_as_short_as_it_says() -> None:
    (block,) = [each for each in blocks(page("README.md")) if each.language == "python"]
    assert len(re.findall(r"^\S", block.text, flags=re.MULTILINE)) <= 13
