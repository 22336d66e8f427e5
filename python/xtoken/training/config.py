"""The settings of a distillation run: frozen, checked, and the same after a trip through JSON."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from xtoken._checks import expect
from xtoken._files import JsonValue, parse_json, path_to_read, write_text
from xtoken.distillation import Distiller, DistillLossName
from xtoken.distillation.options import (
    not_an_option,
    options_read,
    reads_threshold,
    trains_projection,
)
from xtoken.errors import FormatError, MissingFileError, OptionError
from xtoken.losses.engine.divergence import Direction
from xtoken.losses.inputs import LossOptions
from xtoken.losses.multi_teacher import Confidence
from xtoken.pair import Pair
from xtoken.training.settings import LEARNING_RATE, WARMUP_STEPS, DistillSettings
from xtoken.training.trainer_options import (
    ALIASES,
    OWNED,
    check_trainer_options,
    trainer_fields,
)

TeacherDtype = Literal["float32", "bfloat16", "auto"]


@dataclass(frozen=True)
class DistillConfig:
    """Settings of one run. Equal settings, data and models give equal results on one machine.

    Args:
        loss: a loss of the library by name (`prefix-kl`, `p-kl`, `h-kl`, `gold`, `uld`, `alm`,
            `same-vocab-kl`), `ce` (no teacher at all), or `auto`, what the audit recommends.
        kd_weight: weight of the distillation loss beside the cross-entropy; `balanced` is that of
            the X-Token paper (Eq. 7), `sg(CE / KD) * KD + CE`.
        ce_weight: weight of the cross-entropy.
        direction, beta: of the divergence: `forward` is KL(teacher || student), `reverse` the
            other, `jsd` the generalized Jensen-Shannon divergence at `beta`.
        temperature: divides the logits of both sides; the loss is multiplied by its square. None is
            the loss's own, 1 or, for `alm`, 100.
        merge: how the predictor rows of a chunk become one distribution: `chain`, `last` or `mean`.
        top_k: columns of the loss, the teacher's most probable ones; None for all, which `exact-kl`
            of full logits takes as 512.
        top_k_scope: whether they are chosen per `chunk` or per `microbatch`; the
            latter makes the loss depend on how a step is cut into micro-batches.
        tail_bucket: whether `prefix-kl` and `p-kl` compare all columns outside `top_k` too,
            together as one more, so that no mass hides there; without `top_k` there are none.
        teacher_top_k: columns of the teacher that are computed once and stored; None runs the
            teacher in every step.
        teacher_weighting: of several teachers, whether each sample weights them by their
            confidence: `ce`, `entropy` or `max_prob`; None is by their own weights.
        learnable_projection: whether the weights of W are trained with the student (`p-kl`).
        projection_learning_rate: of these weights.
        projection_top_k, projection_decay, projection_max_pieces: how W is built.
        prefix_max_depth: longest prefix that `prefix-kl` compares; None for no limit.
        prefix_end: whether `prefix-kl` compares where tokens end; False is for ablations.
        steps: optimizer steps.
        batch_size: examples per device and micro-batch.
        accumulation: micro-batches per step; it changes memory, not the gradient.
        learning_rate: peak of AdamW's, which falls along a cosine to a tenth. The default suits a
            pretrained student; one with random weights takes about 3e-3.
        warmup_steps: of a linear warm-up, or their share of all steps below 1.
        weight_decay, max_grad_norm: of AdamW, and clipping by the norm.
        max_tokens: longest example on either side; longer ones are cut at a chunk boundary.
        date: the day that chat templates print, as YYYY-MM-DD; None for today. A resumed run needs
            the same, to learn the same texts.
        eval_every: steps between evaluations on the held-out part; 0 for only before and after.
        eval_batch_size: examples per forward pass of the evaluation.
        checkpoint_every: steps between checkpoints, from which `train(resume=True)` goes on; 0 for
            none. The newest two are kept, each three times the size of the student in float32.
        curves: whether the metrics are drawn into `curves.png` at the end, for which matplotlib
            takes 0.2 s.
        seed: of data order and dropout.
        device: `auto` is a CUDA device where there is one, else the CPU.
        mixed_precision: `bf16` runs the student's forward pass under bfloat16 autocast. Weights,
            gradients, the losses' sums and the evaluation stay float32.
        trainer: further arguments of `transformers.TrainingArguments` and of `DistillSettings` by
            their names, such as `{"optim": "adafactor", "report_to": "tensorboard"}`.
        teacher_dtype: of the teacher's weights: `float32`, `bfloat16`, or `auto` for that of its
            files. Stored predictions of one dtype do not stand in for those of another.
    """

    loss: DistillLossName = "prefix-kl"
    kd_weight: float | Literal["balanced"] = "balanced"
    ce_weight: float = 1.0
    direction: Direction = "forward"
    beta: float = 0.5
    temperature: float | None = None
    merge: Literal["chain", "last", "mean"] = "chain"
    top_k: int | None = 512
    top_k_scope: Literal["chunk", "microbatch"] = "chunk"
    tail_bucket: bool = True
    teacher_top_k: int | None = 512
    teacher_weighting: Confidence | None = None
    learnable_projection: bool = False
    projection_learning_rate: float = 0.01
    projection_top_k: int = 4
    projection_decay: float = 0.1
    projection_max_pieces: int = 4
    prefix_max_depth: int | None = None
    prefix_end: bool = True
    steps: int = 160
    batch_size: int = 3
    accumulation: int = 1
    learning_rate: float = LEARNING_RATE
    warmup_steps: float = WARMUP_STEPS
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_tokens: int = 512
    date: str | None = None
    eval_every: int = 0
    eval_batch_size: int = 16
    checkpoint_every: int = 0
    curves: bool = True
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    mixed_precision: Literal["no", "bf16"] = "no"
    teacher_dtype: TeacherDtype = "float32"
    trainer: dict[str, JsonValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mine: type = type(self)
        hints = _hints(mine)
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if not _has_type(value, hints[each.name]):
                raise OptionError(
                    f"{each.name} = {value!r}, expected {_describe(hints[each.name])}; "
                    f"the default is {'null' if each.default is None else repr(each.default)}"
                )
        check_trainer_options(self.trainer, known_settings())
        for name in _AT_LEAST_ONE:
            self._check(name, lambda value: value >= 1, "at least 1")
        for name in _AT_LEAST_ZERO:
            self._check(name, lambda value: value >= 0, "at least 0")
        for name in _POSITIVE:
            self._check(name, lambda value: value > 0, "more than 0")
        self._check("max_tokens", lambda value: value >= 2, "at least 2")
        self._check("seed", lambda value: value < 2**32, "below 2**32, as NumPy's are")
        self._check(
            "warmup_steps",
            lambda value: value < 1 or value == int(value),
            "a whole number, or a share below 1",
        )
        self._check("beta", lambda value: 0 < value < 1, "a share inside (0, 1)")
        if self.top_k is not None and self.teacher_top_k is not None:
            self._check(
                "top_k",
                lambda value: value <= self.teacher_top_k,
                f"at most teacher_top_k = {self.teacher_top_k}, the columns that are stored",
            )
        reason = self.needs_full_logits
        if reason is not None and self.teacher_top_k is not None:
            other = (
                ""
                if self.merge == "mean"
                else ", or use p-kl without tail_bucket, which renormalizes them"
            )
            raise OptionError(
                f"{reason} needs the teacher's full logits, but teacher_top_k = "
                f"{self.teacher_top_k} stores the likeliest columns; set it to null "
                f"(--teacher-top-k none){other}"
            )
        sampled = self.trainer.get("on_policy_fraction", 0)
        if isinstance(sampled, float | int) and sampled > 0 and self.teacher_top_k is not None:
            raise OptionError(
                f"on_policy_fraction = {sampled} needs a teacher that runs in each step, but "
                f"teacher_top_k = {self.teacher_top_k} stores what it says of the training texts; "
                "set teacher_top_k to null (--teacher-top-k none)"
            )
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError as error:
                raise OptionError(
                    f"date = {self.date!r}, expected a day as YYYY-MM-DD, or null for today"
                ) from error
        if self.merge != "chain" and self.loss == "prefix-kl":
            raise OptionError(
                f"merge = {self.merge!r} under prefix-kl, which starts from the chunk's first "
                "predictor; set it to 'chain', or use p-kl"
            )
        if self.ce_weight == 0 and (self.kd_weight in ("balanced", 0) or self.loss == "ce"):
            raise OptionError(
                f"ce_weight = 0 with kd_weight = {self.kd_weight} and loss = {self.loss!r} leaves "
                "nothing to train on; give one of them a positive weight"
            )

    @property
    def needs_full_logits(self) -> str | None:
        """The setting that the likeliest columns do not suffice for; None where they do."""
        if self.merge == "mean":
            return "merge = 'mean'"
        renormalized = self.loss == "p-kl" and not self.tail_bucket
        # ALM's root is no softmax's.
        if self.temperature in (None, 1) or self.loss in ("ce", "alm") or renormalized:
            return None
        return f"temperature = {self.temperature} under {self.loss}"

    def settings(self) -> dict[str, object]:
        """The settings of the losses by the names of `DistillSettings`; those that the loss does
        not read keep their defaults."""
        values = {option: getattr(self, name) for name, option in _OPTIONS.items()}
        values["tail_bucket"] = "auto" if self.tail_bucket else False
        read = values.keys() if self.loss == "auto" else options_read([self.loss])
        return {
            **{name: value for name, value in values.items() if name in read},
            "loss": self.loss,
            "kd_weight": self.kd_weight,
            "ce_weight": self.ce_weight,
            "teacher_weighting": self.teacher_weighting,
            "learnable_projection": self.learnable_projection,
            "projection_learning_rate": self.projection_learning_rate,
            "max_tokens": self.max_tokens,
        }

    def check_read(self, given: Collection[str], losses: Sequence[str]) -> None:
        """Refuse a setting that was given, is no default, and that no loss reads.

        Args:
            given: the names of the settings that were written down.
            losses: of the teachers; what is read of `auto` is not known yet.

        Raises:
            OptionError: names it.
        """
        if "auto" in losses:
            return
        read = options_read(losses)
        for name, option in _OPTIONS.items():
            value = getattr(self, name)
            if name not in given or option in read:
                continue
            if value != type(self).__dataclass_fields__[name].default:
                raise not_an_option(name, value, losses)

    def check_used(self, given: Collection[str]) -> None:
        """Refuse a setting that was given, is no default, and that another one has to ask for.

        Args:
            given: the names of the settings that were written down.

        Raises:
            OptionError: names both.
        """
        for name, used, wanted in (
            ("beta", self.direction == "jsd", "direction = 'jsd'"),
            ("projection_learning_rate", self.learnable_projection, "learnable_projection"),
        ):
            value = getattr(self, name)
            if (
                name in given
                and not used
                and value != type(self).__dataclass_fields__[name].default
            ):
                raise OptionError(
                    f"{name} = {value} is read with {wanted} alone; set that too, or leave it out"
                )
        sampled = "on_policy_fraction"
        if sampled in given or self.trainer.get(sampled):
            return
        defaults = {each.name: each.default for each in dataclasses.fields(DistillSettings)}
        for name, value in self.trainer.items():
            if name.startswith("on_policy_") and name in given and value != defaults[name]:
                raise OptionError(
                    f"{name} = {value} is read with {sampled} alone; set that too, or leave it out"
                )

    def with_loss(self, loss: DistillLossName) -> DistillConfig:
        """The same with another loss, without what that does not read."""
        if loss == self.loss:
            return self
        options = {each.name for each in dataclasses.fields(LossOptions)}
        idle = options - options_read([loss]) | (set() if reads_threshold(loss) else {"threshold"})
        trainer = {name: value for name, value in self.trainer.items() if name not in idle}
        learned = self.learnable_projection and trains_projection(loss)
        return dataclasses.replace(self, loss=loss, trainer=trainer, learnable_projection=learned)

    def distiller(self, pair: Pair) -> Distiller:
        """The configured losses of a pair."""
        settings = DistillSettings(**cast(dict[str, Any], self.settings()))
        loss = pair.audit().recommendation if self.loss == "auto" else self.loss
        options = settings.distiller_options(loss)
        options["kd_weight"], options["ce_weight"] = self.kd_weight, self.ce_weight
        return Distiller(pair, loss, **options)

    def _check(self, name: str, holds: typing.Callable[[typing.Any], bool], expected: str) -> None:
        value = getattr(self, name)
        if value is None or isinstance(value, str):
            return
        # Larger numbers fit no tensor; a whole one may be too large for a float.
        if not abs(value) <= 1e18 or not math.isfinite(value) or not holds(value):
            default = type(self).__dataclass_fields__[name].default
            expected += "" if abs(value) <= 1e18 else " and at most 1e18"
            raise OptionError(f"{name} = {value}, expected {expected}; the default is {default}")

    def to_json(self) -> str:
        """Return the settings as a JSON object, one key a setting."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DistillConfig:
        """Read settings that `to_json` wrote, or any part of them; the rest have their defaults.

        Raises: OptionError if the text is no JSON object, a key is unknown, or a value cannot work.
        """
        return cls.from_settings(_settings(text, "the configuration"))

    @classmethod
    def from_settings(cls, values: dict[str, JsonValue]) -> DistillConfig:
        """Settings by name, of any part of them; the rest have their defaults.

        Raises: OptionError if a name is unknown, or a value cannot work.
        """
        expect(values, dict, "values", "pass a dict of settings by name")
        known = known_settings()
        settings, trainer = {}, {}
        for name, value in values.items():
            own = ALIASES.get(name, name)
            if own in settings:
                raise OptionError(f"{own} is given twice, also as {name}; pass it once")
            if own in known:
                settings[own] = value
            else:
                trainer[name] = value
        if trainer:
            further = trainer_fields(known)
            for name in trainer:
                if name not in further and name not in OWNED:
                    raise OptionError(
                        f"unknown setting {name!r}; known are {', '.join(sorted(known))}, and "
                        "the arguments of transformers.TrainingArguments"
                    )
            given = settings.get("trainer", {})
            settings["trainer"] = {**given, **trainer} if isinstance(given, dict) else given
        # Their types are checked by the class itself, with its own message.
        return cls(**settings)  # type: ignore[arg-type]

    def save(self, path: Path | str) -> None:
        """Write `to_json` to a file."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> DistillConfig:
        """Read a file that `save` wrote, or that holds a part of the settings.

        Raises: FileNotFoundError if there is no such file; OptionError as `from_json`.
        """
        return cls.from_settings(read_settings(path))


def known_settings() -> frozenset[str]:
    """The names of the settings of a run."""
    return frozenset(each.name for each in dataclasses.fields(DistillConfig))


def read_settings(path: Path | str) -> dict[str, JsonValue]:
    """The settings in a file, by name; neither the names nor the values are checked yet.

    Args:
        path: JSON, or YAML or TOML where its name ends so.

    Raises:
        MissingFileError: there is no such file.
        OptionError: it does not hold names with values, in UTF-8.
    """
    name = f"configuration file {path}"
    hint = "pass a file of settings in JSON, YAML or TOML"
    place = path_to_read("configuration file", path, hint)
    if not place.is_file():
        raise MissingFileError(f"{name} does not exist; {hint}")
    content = place.read_bytes()
    kind = place.suffix.lower()
    if kind not in (".yaml", ".yml", ".toml"):
        return _settings(content, name)
    try:
        found = _of_toml(content) if kind == ".toml" else _of_yaml(content)
    # Both raise kinds of their own besides UnicodeDecodeError, and RecursionError where it is deep.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise OptionError(f"{name} cannot be read ({reason}); correct it") from error
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found):
        raise OptionError(f"{name} is a {type(found).__name__}, expected names with values")
    return cast("dict[str, JsonValue]", _plain(found))


def _of_toml(content: bytes) -> object:
    return tomllib.loads(content.decode())


def _of_yaml(content: bytes) -> object:
    import yaml  # type: ignore[import-untyped]

    return yaml.safe_load(content.decode())


# YAML takes it for a text without a point in it.
_FLOAT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def _plain(value: object) -> object:
    """Values as JSON has them: days as texts, numbers such as 2e-5 as numbers."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, str) and _FLOAT.fullmatch(value):
        return float(value)
    return value


def _settings(content: str | bytes, name: str) -> dict[str, JsonValue]:
    try:
        values = parse_json(content)
    except FormatError as error:
        raise OptionError(f"{name} {error}") from error
    if not isinstance(values, dict):
        raise OptionError(f"{name} is a {type(values).__name__}, expected an object")
    return values


# Settings of the losses, by the names of `LossOptions`.
_OPTIONS = {
    "direction": "direction",
    "beta": "beta",
    "temperature": "temperature",
    "merge": "merge",
    "top_k": "top_k",
    "top_k_scope": "top_k_scope",
    "tail_bucket": "tail_bucket",
    "prefix_max_depth": "max_depth",
    "prefix_end": "end",
}

_AT_LEAST_ONE = (
    *("top_k", "teacher_top_k", "projection_top_k", "projection_max_pieces", "steps"),
    *("batch_size", "accumulation", "eval_batch_size"),
)
_AT_LEAST_ZERO = (
    *("kd_weight", "ce_weight", "projection_decay", "warmup_steps", "weight_decay", "eval_every"),
    *("checkpoint_every", "seed", "prefix_max_depth"),
)
_POSITIVE = (
    "temperature",
    "learning_rate",
    "projection_learning_rate",
    "max_grad_norm",
)


@functools.cache
def _hints(of: type) -> dict[str, typing.Any]:
    return typing.get_type_hints(of)


def _has_type(value: object, hint: typing.Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return any(isinstance(value, type(x)) and value == x for x in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_has_type(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: typing.Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, typing.get_args(hint)))
    # As a file of settings and a flag spell it; YAML takes None for a text.
    return {float: "a number", int: "a whole number", type(None): "null"}.get(hint, str(hint))
