"""The code blocks of a Markdown page, run in order: Python in one namespace, commands in process.

What a fence says of itself decides what becomes of it:

- `python` runs; a fence `text title="prints"` after it is what it prints;
- `console` holds commands after `$`, and under each what it prints; `xtoken` runs in this process;
- any fence whose title is a file name, as `json title="texts.jsonl"`, is laid as that file;
- `text` without a title is no code;
- a paragraph `*Not run by the tests: REASON*` before a fence says why it is not run.

Expected output is compared as doctest does with ELLIPSIS: `...` stands for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from markdown_it import MarkdownIt

RUN = ("python", "console")
# Languages that show something and are not code.
SHOWN = ("text", "html", "mermaid")
_NOT_RUN = re.compile(r"\*Not run by the tests: (?P<reason>[^*]+)\*$")
_TITLE = re.compile(r'title="(?P<title>[^"]*)"')
_CHECKER = doctest.OutputChecker()


@dataclass(frozen=True)
class Block:
    """A fence of a page.

    Attributes:
        language: the first word after the backticks.
        title: of the fence; empty without one.
        text: its content.
        line: of the content's first line in the page, from 1.
        not_run: why it is not run; None where it is.
    """

    language: str
    title: str
    text: str
    line: int
    not_run: str | None

    @property
    def file(self) -> str | None:
        """The file that it is the content of."""
        return self.title if re.fullmatch(r"[\w./-]+\.\w+", self.title) else None


def blocks(markdown: str) -> list[Block]:
    """The fences of a page in order."""
    found, reason = [], None
    for token in MarkdownIt("commonmark").parse(markdown):
        if token.type == "inline":
            match = _NOT_RUN.search(token.content.replace("\n", " "))
            reason = match["reason"] if match else None
        elif token.type == "fence":
            assert token.map is not None
            title = _TITLE.search(token.info)
            words = token.info.split()
            found.append(
                Block(
                    words[0] if words else "",
                    title["title"] if title else "",
                    token.content,
                    token.map[0] + 2,
                    reason,
                )
            )
            reason = None
    return found


def faults(markdown: str) -> list[str]:
    """What no rule above covers: each block must be run, a file, shown, or say why not."""
    tokens = MarkdownIt("commonmark").parse(markdown)
    found = [
        f"line {token.map[0] + 1}: an indented block; write a fence"
        for token in tokens
        if token.type == "code_block" and token.map
    ]
    before: Block | None = None
    for block in blocks(markdown):
        known = block.language in RUN or block.language in SHOWN or block.file or block.not_run
        if not known:
            found.append(
                f"line {block.line}: a block of {block.language!r} is neither run nor a file; say "
                "why in a paragraph before it: *Not run by the tests: ...*"
            )
        if block.title == "prints" and not (before and before.language == "python"):
            found.append(f"line {block.line}: output without a block of Python before it")
        before = block
    return found


def run(markdown: str, page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the blocks of a page in a folder.

    Returns: how many were run.
    """
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    count, printed = 0, ""
    for block in blocks(markdown):
        where = f"{page}:{block.line}"
        if block.file is not None:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.title == "prints" and block.not_run is None:
            _compare(block.text, printed, where)
        elif block.not_run is None and block.language == "python":
            printed = _python(block, page, module)
            count += 1
        elif block.not_run is None and block.language == "console":
            for command, expected in commands(block.text):
                _compare(expected, _command(command, where, monkeypatch), where)
            count += 1
    return count


def commands(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with the lines under it."""
    command: str | None = None
    output: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.startswith("$ "):
            if command is not None:
                yield command, "".join(output)
            command, output = line[2:].rstrip("\n"), []
        elif command is not None and command.endswith("\\"):
            command = command[:-1] + line.strip()
        else:
            output.append(line)
    if command is not None:
        yield command, "".join(output)


def _python(block: Block, page: str, module: ModuleType) -> str:
    # The lines of the page, so that a traceback names them.
    code = compile("\n" * (block.line - 1) + block.text, page, "exec", dont_inherit=True)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, vars(module))
    return out.getvalue()


def _command(command: str, where: str, monkeypatch: pytest.MonkeyPatch) -> str:
    words = shlex.split(command, comments=True)
    assert words[0] == "xtoken", f"{where}: {words[0]} is not run here; say why"
    from xtoken.cli import main

    monkeypatch.setattr(sys, "argv", words)
    terminate, show = signal.getsignal(signal.SIGTERM), warnings.showwarning
    output, code = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            main()
    except SystemExit as stop:
        code = stop.code
    finally:
        signal.signal(signal.SIGTERM, terminate)
        warnings.showwarning = show
    assert bool(code) == ("error: " in output.getvalue()), f"{where}: {output.getvalue()}"
    return output.getvalue()


def _compare(expected: str, found: str, where: str) -> None:
    if not expected:
        return
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if not _CHECKER.check_output(expected, found, flags):
        pytest.fail(f"{where}: expected\n{expected}\nfound\n{found}", pytrace=False)
