"""What `make docs` adds to mkdocs: the page of the commands, and a check of the site as built."""

from __future__ import annotations

import html.parser
import importlib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

COMMAND_PAGE = "command-line.md"
_INTRODUCTION = """# Command line

*This page is made from the program itself, by `make docs`.*

Every command has `--help`. An error is one line on stderr; [errors](errors.md) has the cause and
the remedy of each.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | the input is bad, or the work failed; one line says why |
| 2 | the command was called wrongly |
| 130 | ended by Ctrl-C; nothing that was saved is lost |
| 143 | ended by SIGTERM; the same |

`XTOKEN_CACHE` names the folder of W and of teacher predictions, or is `off`; the default is
`xtoken` in the user's cache folder. `XTOKEN_TRACEBACK=1` shows where an error was raised, for
reports of bugs.
"""


_TRAINER = """**Trainer**

Every other argument of `transformers.TrainingArguments` by its name, such as `--adam-beta2 0.95`;
`xtoken distill --help` lists them.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of the commands."""
    files.append(File.generated(config, COMMAND_PAGE, content=command_page()))
    return files


def command_page() -> str:
    """All commands with their arguments and options, in Markdown."""
    app = importlib.import_module("xtoken.cli").app
    parts = [_INTRODUCTION]
    for name, command in _commands(typer.main.get_command(app), "xtoken"):
        parts.append(f"## {name}\n\n{_prose(command.help or '')}\n")
        # Some options are made when they are asked for.
        params = command.get_params(command.context_class(command, info_name=name))
        groups: dict[str, list[Any]] = {}
        for param in params:
            if param.name != "help" and not getattr(param, "hidden", False):
                groups.setdefault(param.rich_help_panel or "", []).append(param)
        for group, members in groups.items():
            if group.startswith("Trainer"):
                parts.append(_TRAINER)
                continue
            heading = f"**{group}**\n\n" if group else ""
            rows = "\n".join(_row(param) for param in members)
            parts.append(f"{heading}| | value | meaning |\n|---|---|---|\n{rows}\n")
    return "\n".join(parts)


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    if getattr(command, "commands", None) is None:
        yield name, command
        return
    # A command is imported where it is asked for.
    context = command.context_class(command, info_name=name)
    for key in command.list_commands(context):
        yield from _commands(command.get_command(context, key), f"{name} {key}")


def _prose(text: str) -> str:
    # A form feed ends what `--help` shows.
    return "\n".join(line.strip() for line in text.split("\f")[0].splitlines())


def _row(param: Any) -> str:
    if param.param_type_name == "argument":
        names = f"`{(param.metavar or param.name).upper()}`"
    else:
        names = ", ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
    kind = "" if getattr(param, "is_flag", False) else _kind(param)
    text = _prose(param.help or "").replace("\n", " ")
    if param.required:
        text += " *Required.*"
    else:
        shown = getattr(param, "show_default", False)
        default = shown if isinstance(shown, str) else param.default if shown else None
        if default not in (None, False, (), "None", "False", ""):
            text += f" Default: `{default}`."
    return "| " + " | ".join(part.replace("|", "\\|") for part in (names, kind, text)) + " |"


def _kind(param: Any) -> str:
    annotation = param.type_descriptor.annotation
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return "may be repeated"
    names = {int: "whole number", float: "number", str: "text", Path: "path"}
    return names.get(annotation, "texts" if param.nargs == -1 else "text")


# ---- The site as built ----


class _Page(html.parser.HTMLParser):
    """The ids and links of a page, and what it loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        loaded = "href" if tag == "link" and values.get("rel") != "canonical" else "src"
        if tag in ("script", "link", "img", "iframe", "source") and values.get(loaded):
            self.loads.append(values[loaded])


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site with a dead link, or one that fetches something from elsewhere.

    Raises:
        PluginError: names each page and link.
    """
    faults = site_faults(Path(config.site_dir))
    if faults:
        raise PluginError("the site has faults:\n" + "\n".join(faults))


def site_faults(site: Path) -> list[str]:
    """Dead links and anchors, malformed addresses, and what pages would load from elsewhere."""
    pages = {path.resolve(): _read(path) for path in sorted(site.rglob("*.html"))}
    faults = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links are absolute, as it is shown at any address
        name = path.relative_to(site.resolve())
        for link in page.loads:
            if urlsplit(link).netloc:
                faults.append(f"{name} loads {link}")
        faults += [
            f"{name}: {fault}"
            for link in [*page.links, *page.loads]
            if (fault := _fault(link, path, pages))
        ]
    return faults


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def _fault(link: str, path: Path, pages: dict[Path, _Page]) -> str | None:
    parts = urlsplit(link)
    if parts.scheme in ("http", "https"):
        return None if "." in parts.netloc and " " not in link else f"{link} is no address"
    if parts.scheme:
        return None if parts.scheme in ("data", "mailto", "javascript") else f"{link} is no address"
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        return f"{link} leads nowhere"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
        # The theme's own, set by its script.
        return None if parts.fragment.startswith("__") else f"{link}: no such anchor"
    return None
