"""The settings of `xtoken distill`, by file and flag, and as stores and teachers bound them."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from xtoken.cli.distill_data import check_streaming
from xtoken.distillation import DistillLossName
from xtoken.distillation.options import check_teacher_weights
from xtoken.errors import OptionError
from xtoken.teachers import TopKStore
from xtoken.teachers.store_notes import StoreNotes
from xtoken.training.checkpoints import saved_settings
from xtoken.training.config import DistillConfig, read_settings
from xtoken.training.models import ModelPair
from xtoken.training.trainer_options import ALIASES

if TYPE_CHECKING:
    from xtoken.cli.distill_run import Request

COMPARED: tuple[DistillLossName, ...] = ("prefix-kl", "p-kl", "gold", "ce")


def read_config(request: Request) -> DistillConfig:
    """The settings, where those that stores and servers bound are as these have it.

    Raises:
        OptionError: a setting cannot work, or would not be read.
    """
    # Merged before they are checked: the file may need the option beside it.
    settings = {} if request.config is None else read_settings(request.config)
    settings |= request.settings
    own = request.teachers[0].loss if len(request.teachers) == 1 else None
    if own is not None:
        if request.settings.get("loss", own) != own:
            raise OptionError(
                f"--loss {request.settings['loss']} and --teacher-loss {own} are of one teacher; "
                "pass one of them"
            )
        settings["loss"] = own  # by which the run is named, and known again
    given = {ALIASES.get(name, name) for name in settings}
    asked = dict(settings)
    check_streaming(request, settings)
    served = any(each.served is not None for each in request.teachers)
    if request.streaming and not served:
        settings["teacher_top_k"] = None
    stores = [TopKStore.open(each.store) for each in request.teachers if each.store is not None]
    if stores and settings.get("on_policy_fraction"):
        raise OptionError(
            f"--on-policy-fraction {settings['on_policy_fraction']} with --teacher-store: a store "
            "has no predictions of what the student will say; pass --teacher in its place, and "
            "--teacher-top-k none"
        )
    _check_dtype(request)
    if stores:
        _check_idle(asked, stores, request)
        # What is spread is read as full logits are, and bounds no columns.
        settings["teacher_top_k"] = None
    if served:
        # A server gives the likeliest columns: those of the loss, where nothing else is said.
        default = DistillConfig.top_k
        columns = settings.get("teacher_top_k") or settings.get("top_k", default)
        if columns is None:
            raise OptionError(
                "top_k is None, but a server gives the teacher's likeliest columns alone; pass "
                "--top-k"
            )
        if isinstance(columns, int):  # what else there is, the settings refuse
            settings.setdefault("top_k", min(default or columns, columns))
            _check_served(settings, columns, request)
            settings["teacher_top_k"] = columns
    cut = min(
        (store for store in stores if not store.key.is_spread),
        key=lambda store: store.key.top_k,
        default=None,
    )
    if cut is not None:
        stored = cut.key.top_k
        settings = {"top_k": min(DistillConfig.top_k or stored, stored)} | settings
        _check_stored(settings, cut, request)
        settings["teacher_top_k"] = stored
    columns = settings.get("teacher_top_k", DistillConfig.teacher_top_k)
    if isinstance(columns, int) and columns < (DistillConfig.top_k or 0):
        settings.setdefault("top_k", columns)
    config = DistillConfig.from_settings(settings)
    config.check_used(given)
    weights = [each.weight for each in request.teachers]
    check_teacher_weights(weights, config.teacher_weighting)
    if not request.compare:
        # A server is asked for as many columns, and what is stored bounds them.
        bounding = {"top_k"} if served or settings.get("teacher_top_k") is not None else set()
        losses = [each.loss or config.loss for each in request.teachers] or [config.loss]
        config.check_read(given - bounding, losses)
    return config


def dated(config: DistillConfig, request: Request) -> DistillConfig:
    """Fix the day that chat templates print: that of the run that is resumed, of the stored
    predictions, or today."""
    if config.date is not None:
        return config
    earlier = saved_settings(request.out).get("date") if request.resume else None
    if earlier is None:
        stores = [each.store for each in request.teachers if each.store is not None]
        dates = {notes.date for notes in map(StoreNotes.of, stores) if notes is not None}
        if len(dates) > 1:
            raise OptionError(
                f"the teacher stores were filled on {', '.join(sorted(dates))}, which chat "
                'templates may print; name one day in --config, {"date": "YYYY-MM-DD"}'
            )
        earlier = next(iter(dates), None)
    return replace(config, date=str(earlier or datetime.date.today().isoformat()))


def _check_dtype(request: Request) -> None:
    """Refuse a dtype of teachers none of which is loaded; that of an earlier run's settings is
    passed over."""
    name = "teacher_dtype"
    given = request.settings.get(name)
    loaded = any(each.store is None and each.served is None for each in request.teachers)
    if given not in (None, DistillConfig.teacher_dtype) and request.teachers and not loaded:
        raise OptionError(
            f"{name} = {given} is of a teacher that is loaded, and here all are stored or served; "
            "leave it out"
        )


def _check_idle(settings: dict[str, Any], stores: Sequence[TopKStore], request: Request) -> None:
    """Refuse columns to store beside stores, which have theirs; those of a file's defaults are
    passed over."""
    name = "teacher_top_k"
    if name not in settings:
        return
    given = settings[name]
    kept = {None if store.key.is_spread else store.key.top_k for store in stores}
    of_file = name not in request.settings and given == DistillConfig.teacher_top_k
    if given not in kept and not of_file:
        store = stores[0]
        holds = "all columns, spread" if store.key.is_spread else f"{store.key.top_k} columns"
        raise OptionError(
            f"teacher_top_k = {given}, but the store {store.directory} holds {holds}; leave it out"
        )


def _check_stored(settings: dict[str, Any], store: TopKStore, request: Request) -> None:
    """Refuse what needs more of the teacher than a store has."""
    stored = store.key.top_k
    config = DistillConfig.from_settings(settings | {"teacher_top_k": None})
    if config.top_k is not None and config.top_k > stored:
        raise OptionError(
            f"top_k = {config.top_k}, but the store {store.directory} holds {stored} columns; "
            f"lower it to {stored}, or fill another store by xtoken teach --top-k {config.top_k}"
        )
    reason = _needing_all(config, request)
    if reason is not None:
        raise OptionError(
            f"{reason} needs the teacher's full logits, but the store {store.directory} holds its "
            f"likeliest {stored} columns; leave it out, fill a store by xtoken teach --dtype "
            "spread, or pass --teacher in its place, with --teacher-top-k none"
        )


def _check_served(settings: dict[str, Any], columns: int, request: Request) -> None:
    """Refuse what needs more of the teacher than a server gives."""
    config = DistillConfig.from_settings(settings | {"teacher_top_k": None})
    remedy = "leave it out, or pass --teacher without --teacher-url, with --teacher-top-k none"
    sampled = config.trainer.get("on_policy_fraction")
    if sampled:
        raise OptionError(
            f"on_policy_fraction = {sampled} with --teacher-url: the command asks a server about "
            f"the texts alone; {remedy}"
        )
    reason = _needing_all(config, request)
    if reason is not None:
        raise OptionError(
            f"{reason} needs the teacher's full logits, of which a server gives the likeliest "
            f"{columns}; {remedy}"
        )


def _needing_all(config: DistillConfig, request: Request) -> str | None:
    """What needs full logits under a loss that is trained."""
    losses = (config.loss, *(COMPARED if request.compare else ()))
    reasons = (config.with_loss(loss).needs_full_logits for loss in losses)
    return next((reason for reason in reasons if reason is not None), None)


def fit_columns(
    config: DistillConfig, request: Request, models: Sequence[ModelPair], console: Console
) -> DistillConfig:
    """The settings, where defaults ask for no more columns than a teacher has.

    Raises:
        OptionError: what was given asks for more.
    """
    if config.teacher_top_k is None:
        return config
    counts = [
        (_columns(each), each.teacher_source)
        for each in models
        if each.store is None and each.served is None
    ]
    columns, source = min(counts, default=(config.teacher_top_k, ""))
    if columns >= config.teacher_top_k:
        return config
    fitted: dict[str, Any] = {}
    for name in ("teacher_top_k", "top_k"):
        value = getattr(config, name)
        if value is None or value <= columns:
            continue
        if name in request.settings or value != getattr(DistillConfig, name):
            flag = name.replace("_", "-")
            raise OptionError(
                f"{name} = {value}, but the teacher {source} has {columns} columns; pass "
                f"--{flag} {columns} or less"
            )
        fitted[name] = columns
    names = " and ".join(fitted)
    console.print(
        f"{names} = {columns}: the teacher {escape(source)} has no more columns", soft_wrap=True
    )
    return replace(config, **fitted)


def _columns(models: ModelPair) -> int:
    """The columns of a teacher that is not loaded yet."""
    from transformers import AutoConfig

    try:
        described: Any = AutoConfig.from_pretrained(models.teacher_source)
        text = described.get_text_config()
        return int(text.vocab_size)
    except Exception:  # the model's own loading says it better
        return len(models.pair.teacher_vocab)
