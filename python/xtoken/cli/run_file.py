"""The settings file of `xtoken distill run.yaml`: what the flags say, by the same names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtoken.errors import OptionError

_TEXTS = (
    *("student", "out", "split", "text_field", "student_chat_template", "teacher_chat_template"),
    *("teacher_column", "teacher_cache", "teacher_api", "teacher_model"),
)
_LISTS = ("data", "held_out", "teacher", "teacher_store", "teacher_url", "teacher_loss")
_SWITCHES = ("compare", "resume", "overwrite", "streaming")
_NUMBERS = ("shuffle_buffer", "teacher_concurrency", "teacher_timeout")
_TEACHER = ("source", "weight", "store", "url", "loss")


def read_run_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file says of the run, and the settings in it.

    `teacher` is a source or a list of them, each a text as `--teacher` takes it or an object with
    `source`, `weight`, `store`, `url` and `loss`.

    Raises:
        MissingFileError: there is no such file.
        OptionError: it cannot be read, or a value is of another type.
    """
    from xtoken.training.config import read_settings

    settings: dict[str, Any] = dict(read_settings(path))
    run: dict[str, Any] = {}
    for name in _TEXTS:
        if settings.get(name) is not None:
            run[name] = _typed(settings[name], str, name, path)
    for name in _LISTS:
        if settings.get(name) is not None:
            value = settings[name]
            run[name] = value if isinstance(value, list) else [value]
    for name in _SWITCHES:
        if settings.get(name) is not None:
            run[name] = _typed(settings[name], bool, name, path)
    for name in _NUMBERS:
        if settings.get(name) is not None:
            run[name] = _typed(settings[name], int, name, path)
            if isinstance(run[name], bool) or run[name] < 1:
                raise OptionError(f"{path}: {name} = {run[name]}, expected at least 1")
    if any(isinstance(each, Mapping) for each in run.get("teacher", ())):
        run |= _of_objects(run, path)
    for name in _LISTS:
        for each in run.get(name, ()):
            _typed(each, str, name, path)
    taken = (*_TEXTS, *_LISTS, *_SWITCHES, *_NUMBERS)
    rest = {k: v for k, v in settings.items() if k not in taken}
    if "teacher_weights" in rest:
        rest["teacher_weighting"] = rest.pop("teacher_weights")
    return run, rest


def _of_objects(run: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Teachers given as objects, as the flags would name them."""
    sources, stores, urls, losses = [], [], [], []
    for each in run["teacher"]:
        given = each if isinstance(each, Mapping) else {"source": each}
        foreign = sorted(set(given) - set(_TEACHER))
        if foreign:
            raise OptionError(
                f"{path}: a teacher has {foreign[0]!r}, expected some of {', '.join(_TEACHER)}"
            )
        if given.get("source") is not None:
            source = _typed(given["source"], str, "source of a teacher", path)
            sources.append(f"{source}={given['weight']}" if "weight" in given else source)
        stores += [given["store"]] if given.get("store") is not None else []
        urls += [given["url"]] if given.get("url") is not None else []
        losses += [given["loss"]] if given.get("loss") is not None else []
    return {
        "teacher": sources, "teacher_store": stores, "teacher_url": urls, "teacher_loss": losses
    }  # fmt: skip


def _typed(value: object, kind: type, name: str, path: Path) -> Any:
    if not isinstance(value, kind):
        words = {str: "a text", bool: "true or false", int: "a whole number"}
        raise OptionError(f"{path}: {name} = {value!r}, expected {words[kind]}")
    return value
