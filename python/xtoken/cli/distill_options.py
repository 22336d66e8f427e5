"""The flags of `xtoken distill`: every setting of a run, with its default, in groups."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any, cast

import typer
from typer.core import TyperOption

from xtoken.cli.command import Command
from xtoken.cli.distill_settings import Setting, Settings, kept_settings

TRAINER = "Trainer (transformers.TrainingArguments)"
# A parameter of the command belongs to the first group that names it.
_GROUPS: dict[str, tuple[str, ...]] = {
    "Run": (
        *("student", "data", "out", "held_out", "split", "streaming", "shuffle_buffer"),
        *(
            "text_field",
            "student_chat_template",
            "teacher_chat_template",
            "config",
            "compare",
            "dry_run",
            "resume",
            "overwrite",
            "date",
            "device",
        ),
        *("steps", "eval_every", "eval_batch_size", "checkpoint_every", "curves", "seed"),
        "max_tokens",
    ),
    "Teachers": (
        *("teacher", "teacher_store", "teacher_url", "teacher_api", "teacher_model"),
        *("teacher_concurrency", "teacher_timeout", "teacher_loss", "teacher_weights"),
        *("teacher_column", "teacher_cache", "teacher_dtype", "teacher_top_k"),
    ),
    "Loss": (
        *("loss", "direction", "beta", "temperature", "merge", "kd_weight", "ce_weight", "top_k"),
        *("top_k_scope", "tail_bucket", "prefix_max_depth", "prefix_end"),
    ),
    "W": (
        *("learnable_projection", "projection_learning_rate", "projection_top_k"),
        *("projection_decay", "projection_max_pieces"),
    ),
    "Optimizer": (
        *("batch_size", "accumulation", "learning_rate", "warmup_steps", "weight_decay"),
        *("max_grad_norm", "mixed_precision"),
    ),
}
_META = "xtoken.further"


class DistillCommand(Command):
    """Takes the settings that its function does not name as further flags.

    They are found when the command runs or prints its help, as they come from transformers.
    """

    _further: list[TyperOption] | None = None

    def get_params(self, ctx: typer.Context) -> list[Any]:  # type: ignore[override]
        """The parameters of the function, and all other settings."""
        own = list(super().get_params(ctx))
        if self._further is None:
            settings = _settings(frozenset(each.name or "" for each in own))
            self._further = _further_options(settings)
            _describe(own, settings)
        return [*own[:-1], *self._further, own[-1]]  # --help is the last

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Call the function, with the further settings beside it."""
        names = {each.name for each in self._further or ()}
        given = {name: ctx.params.pop(name) for name in list(ctx.params) if name in names}
        ctx.meta[_META] = {name: value for name, value in given.items() if value is not None}
        return super().invoke(ctx)


def further_settings(context: typer.Context) -> dict[str, Any]:
    """The settings that were given as further flags, by name, parsed.

    Raises:
        OptionError: a value cannot be read.
    """
    from xtoken.training.config import known_settings
    from xtoken.training.trainer_options import OWNED, parse_trainer_option

    known = known_settings()
    # The settings refuse the owned ones, by name.
    return {
        name: _value(text) if name in known or name in OWNED else parse_trainer_option(name, text)
        for name, text in context.meta.get(_META, {}).items()
    }


def _value(text: str) -> object:
    """A setting as JSON has it; the settings check its type."""
    words: dict[str, object] = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _settings(named: frozenset[str]) -> Settings:
    """The settings beside those `named`, and the defaults; kept on disk, as transformers, which
    some come from, takes seconds to import."""
    return kept_settings(lambda: _find_settings(named))


def _find_settings(named: frozenset[str]) -> Settings:
    from xtoken.training.config import DistillConfig, known_settings
    from xtoken.training.config_arguments import SCHEDULE
    from xtoken.training.settings import DistillSettings
    from xtoken.training.trainer_options import ALIASES, OWNED, trainer_fields

    aliases = {own: name for name, own in ALIASES.items()}
    made: list[Setting] = []
    documented = _documented(DistillConfig.__doc__ or "")
    for each in dataclasses.fields(DistillConfig):
        # Two are spelled otherwise on the command line: the first by itself, the other below.
        if each.name in named or each.name in ("teacher_weighting", "trainer"):
            continue
        flags = [_flag(each.name)]
        if each.name in aliases:
            flags.append(_flag(aliases[each.name]))
        text = _sentence(documented.get(each.name, ""))
        made.append(Setting(each.name, flags, text, str(each.default), _group(each.name)))
    losses = {each.name for each in dataclasses.fields(DistillSettings)}
    for name, each in sorted(trainer_fields(known_settings()).items()):
        default = each.default
        if default is dataclasses.MISSING:
            factory = each.default_factory
            default = None if factory is dataclasses.MISSING else factory()
        # argparse's escape.
        text = _sentence(str(each.metadata.get("help", "")).replace("%%", "%"))
        panel = "Loss" if name in losses else TRAINER
        default = SCHEDULE.get(name, str(getattr(default, "value", default)))
        made.append(Setting(name, [_flag(name)], text, default, panel))
    refused = sorted(OWNED.keys() - named - {each.name for each in made})
    made.extend(Setting(name, [_flag(name)], None, None, None) for name in refused)
    defaults = {name: str(value) for name, value in dataclasses.asdict(DistillConfig()).items()}
    return Settings(made, defaults, aliases)


def _further_options(settings: Settings) -> list[TyperOption]:
    made: dict[str, Any] = {}
    for each in settings.further:
        shown: dict[str, Any] = {"hidden": True}
        if each.panel is not None:
            shown = {
                "help": each.help,
                "show_default": each.default,
                "rich_help_panel": each.panel,
            }
        made[each.name] = typer.Option(*each.flags, **shown)
    return _options(made)


def _options(made: dict[str, Any]) -> list[TyperOption]:
    """Options as typer makes them of a function's parameters."""

    def holder() -> None:
        """Never called."""

    hints = {name: Annotated[str | None, option] for name, option in made.items()}
    holder.__annotations__ = hints
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
        for name, hint in hints.items()
    ]
    # Through Any: functions have no such attribute until it is set.
    cast(Any, holder).__signature__ = inspect.Signature(parameters)
    app = typer.Typer(add_completion=False)
    app.command()(holder)
    found = typer.main.get_command(app).params
    return [each for each in found if isinstance(each, TyperOption) and each.name in made]


def _describe(own: list[Any], settings: Settings) -> None:
    """Groups and defaults of the function's own parameters."""
    for each in own:
        if isinstance(each, TyperOption) and each.name != "help":
            name = each.name or ""
            each.rich_help_panel = _group(name)
            if name in settings.defaults and each.default is None:
                each.show_default = settings.defaults[name]
            if name in settings.aliases:
                each.opts.append(_flag(settings.aliases[name]))


def _group(name: str) -> str:
    return next((group for group, names in _GROUPS.items() if name in names), "Run")


def _sentence(text: str) -> str:
    words = " ".join(text.split())
    return words[:1].upper() + words[1:]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _documented(docstring: str) -> dict[str, str]:
    """The sentences of `Args:` by setting."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in docstring.partition("Args:")[2].splitlines():
        indent = len(line) - len(line.lstrip())
        head, mark, rest = line.strip().partition(": ")
        if indent == 8 and mark:
            names = [name.strip() for name in head.split(",")]
            found |= dict.fromkeys(names, rest)
        elif indent > 8:
            for name in names:
                found[name] += " " + line.strip()
    return found
