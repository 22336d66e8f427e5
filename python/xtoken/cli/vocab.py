"""`xtoken vocab`: what a vocabulary is, and the traps that it holds."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from xtoken._core import Vocab
from xtoken.cli.command import App
from xtoken.cli.plain_console import plain_console
from xtoken.vocab import Side, read_content
from xtoken.vocab.display import BYTE_ALPHABET, is_utf8, printable, visible
from xtoken.vocab.load import is_hub_name

_EXAMPLES = 3


def register(app: App) -> None:
    """Add the command."""
    app.command()(vocab)


def vocab(
    path: Annotated[
        str,
        typer.Argument(
            metavar="TOKENIZER",
            help="Directory, tokenizer.json (.xz too), tekken or tiktoken file, or a hub name "
            "(owner/model).",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for machines.")] = False,
) -> None:
    """Show what a vocabulary is: family, size, special tokens by role, traps found."""
    side = Side("student", path)
    content = b"" if is_hub_name(path) else read_content(path)[1]
    facts = describe(side.vocab, content)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        plain_console().print(_view(path, facts))


def describe(vocab: Vocab, content: bytes = b"") -> dict[str, Any]:
    """The facts of a vocabulary that decide how it can be aligned.

    Args:
        vocab: what is described.
        content: the tokenizer.json that it was read from, which names further traps.

    Returns: `family`, `size`, counts of each kind of id, `dummy_prefix`, `model`, `fingerprint`,
        `roles` ({role: {id, text}}) and `traps` ({name: {count, examples}}), the traps with at
        least one case only.
    """
    size = len(vocab)
    tokens = [vocab.token_bytes(token_id) for token_id in range(size)]
    special = {token_id: printable(text) for token_id, text in vocab.special_tokens.items()}
    unused = [i for i in range(size) if vocab.is_unused(i)]
    fallback = [i for i in range(size) if vocab.is_byte_fallback(i)]
    first: dict[bytes, int] = {}
    duplicates = []
    for token_id, token in enumerate(tokens):
        if token and first.setdefault(token, token_id) != token_id:
            duplicates.append(token_id)
    parts = [i for i, token in enumerate(tokens) if token and not is_utf8(token)]
    spelled = [text for text in special.values() if text]
    traps = {
        "bytes that more than one id spells": [
            f"{visible(tokens[i])} ({first[tokens[i]]}, {i})" for i in duplicates
        ],
        "ids without a token": [str(i) for i in unused],
        "tokens that are not UTF-8 alone": [f"{visible(tokens[i])} ({i})" for i in parts],
        "special strings that text may contain": spelled,
        "characters that become a space": ["▁"] if vocab.family == "sentencepiece" else [],
        **_file_traps(vocab, content),
    }
    return {
        "family": vocab.family,
        "lossy": vocab.is_lossy,
        "size": size,
        "normal": size - len(special) - len(unused) - len(fallback),
        "byte_fallback": len(fallback),
        "special": len(special),
        "unused": len(unused),
        "longest_token_bytes": max(map(len, tokens), default=0),
        "dummy_prefix": vocab.dummy_prefix,
        "model": vocab.model,
        "fingerprint": vocab.fingerprint,
        "roles": {
            role: {"id": token_id, "text": special.get(token_id, visible(tokens[token_id]))}
            for role, token_id in vocab.roles.items()
        },
        "traps": {
            name: {"count": len(cases), "examples": cases[:_EXAMPLES]}
            for name, cases in traps.items()
            if cases
        },
    }


def _file_traps(vocab: Vocab, content: bytes) -> dict[str, list[str]]:
    """What only a tokenizer.json says; nothing for files of other kinds."""
    file = json.loads(content) if content.lstrip()[:1] == b"{" else {}
    if "model" not in file:
        return {}
    added = file.get("added_tokens") or []
    alphabet = set(BYTE_ALPHABET.values())
    names = {token["content"] for token in added}
    surfaces = file["model"].get("vocab", {}) if vocab.family == "byte-level" else {}
    return {
        "added tokens that are plain text": [
            f"{visible(token['content'].encode())} ({token['id']})"
            for token in added
            if not token.get("special")
        ],
        "keys outside the byte alphabet": [
            f"{printable(surface)} ({token_id})"
            for surface, token_id in surfaces.items()
            if surface not in names and not alphabet.issuperset(surface)
        ],
        "changes of text before it is tokenized": _normalizers(file.get("normalizer")),
    }


def _normalizers(section: dict[str, Any] | None) -> list[str]:
    """The names of a normalizer's parts, but for those that only spell spaces."""
    if section is None:
        return []
    if "normalizers" in section:
        return [name for part in section["normalizers"] for name in _normalizers(part)]
    spells_spaces = section["type"] == "Prepend" or section.get("content") == "▁"
    return [] if spells_spaces else [section["type"]]


def _view(path: str, facts: dict[str, Any]) -> RenderableType:
    table = Table(title=escape(path), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    lossy = "; lossy: the tokens do not determine the text" if facts["lossy"] else ""
    table.add_row("family", facts["family"] + lossy)
    table.add_row("ids", f"{facts['size']:,}")
    for kind in ("normal", "byte_fallback", "special", "unused"):
        if facts[kind]:
            table.add_row(f"  {kind.replace('_', ' ')}", f"{facts[kind]:,}")
    table.add_row("longest token", f"{facts['longest_token_bytes']} bytes")
    table.add_row("dummy prefix", facts["dummy_prefix"])
    table.add_row("tokenization model", facts["model"] or "none")
    table.add_row("fingerprint", facts["fingerprint"])
    roles = Table(
        title="special tokens by role", title_justify="left", show_header=False, min_width=30
    )
    for role, token in facts["roles"].items():
        roles.add_row(role, str(token["id"]), Text(token["text"]))
    traps = Table(title="traps", title_justify="left", show_header=False)
    traps.add_column()
    traps.add_column(justify="right")
    traps.add_column(overflow="fold")
    for name, cases in facts["traps"].items():
        more = ", …" if cases["count"] > len(cases["examples"]) else ""
        # Text, as a token may look like markup.
        traps.add_row(name, f"{cases['count']:,}", Text(", ".join(cases["examples"]) + more))
    shown: list[RenderableType] = [table]
    shown += [part for part in (roles, traps) if part.row_count]
    return Group(*shown)
