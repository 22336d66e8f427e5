"""Whether what is written would lie over what is read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from xtoken.errors import OptionError

# What models, tokenizers, stores and texts lie in; a page or scores beside them replace nothing.
_READ = re.compile(
    r"(.*config|tokenizer|vocab|added_tokens|special_tokens_map|.*\.index|store|pair)\.json"
    r"|.*\.(safetensors|bin|gguf|pt|model|jinja|jsonl|parquet|csv|txt)"
)


def check_apart(
    out: Path, sources: Iterable[tuple[str, object]], option: str = "--out", *, folder: bool = False
) -> None:
    """Refuse to write over what is read.

    Args:
        sources: options with what each names: a path, the name of a model or dataset on the hub,
            which is no path here, or None.
        folder: whether `out` is a folder, which must not lie over a source either.

    Raises:
        OptionError: names the option whose source would be lost.
    """
    for name, source in sources:
        given = _path(source)
        if given is None:
            continue
        # As it is named, too: what is replaced may be a link to it.
        places = [given.resolve(), Path(os.path.abspath(given))]
        above = [each for place in places for each in (place, *place.parents)]
        if folder and any(_same(out, each) for each in above):
            what = f"is what {name} reads" if _same(out, given) else f"lies over {name} {given}"
        elif not folder and (
            _same(out, given) or (_READ.fullmatch(out.name) and _inside(out, given))
        ):
            what = f"is read by {name} {given}"
        else:
            continue
        raise OptionError(f"{option} {out} {what}, which would be lost; pass another path")


def _path(source: object) -> Path | None:
    """What lies where a source says; None where nothing does."""
    try:
        path = Path(str(source))
        return path if source is not None and path.exists() else None
    except (OSError, ValueError):  # a text that is longer than a name can be
        return None


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _inside(file: Path, folder: Path) -> bool:
    return file.exists() and any(_same(folder, each) for each in file.resolve().parents)
