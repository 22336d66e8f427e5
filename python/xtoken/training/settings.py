"""What distillation adds to a Trainer's arguments: losses, teachers, the length of examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

from xtoken._checks import check_choice, check_flag, check_number, token_limit
from xtoken.distillation import DistillerOptions
from xtoken.distillation.options import (
    DEFAULT_THRESHOLD,
    LOSS_NAMES,
    DistillLossName,
    KdWeight,
    check_threshold,
    check_threshold_read,
    not_an_option,
    options_read,
    reads_threshold,
)
from xtoken.errors import OptionError
from xtoken.losses.engine.divergence import Direction
from xtoken.losses.engine.merge import Merge
from xtoken.losses.inputs import DEFAULT_OPTIONS, Chooser, LossOptions, Scope
from xtoken.losses.multi_teacher import Confidence

DEFAULT_TOP_K = 512
_NOTHING = ("none", "null")

# Of a pretrained student. A new one takes a hundred times the rate.
LEARNING_RATE = 2e-5
WARMUP_STEPS = 0.03
"""Below 1 a share of all steps, as transformers has it."""

if TYPE_CHECKING:
    ParsedWeight: TypeAlias = KdWeight
    ParsedWhole: TypeAlias = int
    ParsedNumber: TypeAlias = float
    ParsedSwitch: TypeAlias = Literal[True, False, "auto"]
    ParsedCompiler: TypeAlias = bool | str
else:
    # As a command line spells them: `HfArgumentParser` calls the type of a field, and names it
    # where that fails.

    class ParsedWeight(float):
        """A number, or a word."""

        def __new__(cls, text: str) -> float | str:
            return text if text == "balanced" else float(text)

    class ParsedWhole(int):
        """A whole number, or nothing."""

        def __new__(cls, text: str) -> int | None:
            return None if text.lower() in _NOTHING else int(text)

    class ParsedNumber(float):
        """A number, or nothing."""

        def __new__(cls, text: str) -> float | None:
            return None if text.lower() in _NOTHING else float(text)

    class ParsedSwitch(str):
        """Yes, no or `auto`; what else there is the settings refuse."""

        def __new__(cls, text: str) -> bool | str:
            return {"true": True, "false": False}.get(text.lower(), text)

    class ParsedCompiler(ParsedSwitch):
        """Yes, no or a backend of `torch.compile`."""

    ParsedWhole.__name__, ParsedNumber.__name__ = "int", "float"


@dataclass
class DistillSettings:
    """The settings of a distillation beside those of the Trainer; all have defaults.

    Use it beside any Trainer's own arguments (`DistillMixin(..., distill=DistillSettings(...))`);
    `DistillArguments` is both in one. A `Teacher` may have a loss of its own.

    Raises:
        OptionError: a value outside its range.

    >>> DistillSettings(loss="p-kl", kd_weight=0.5).top_k
    512
    """

    loss: DistillLossName = field(
        default="prefix-kl",
        metadata={
            "help": "Loss of each teacher that names none; ce: no teacher; auto: by the audit."
        },
    )
    kd_weight: ParsedWeight = field(
        default="balanced",
        metadata={
            "help": "Weight of the distillation loss, or 'balanced': sg(CE / KD), X-Token's Eq. 7."
        },
    )
    ce_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy."})
    direction: Direction = field(
        default="forward", metadata={"help": "forward: KL(teacher || student), reverse, or jsd."}
    )
    beta: float = field(default=0.5, metadata={"help": "The teacher's share of the mean in jsd."})
    temperature: ParsedNumber | None = field(
        default=None, metadata={"help": "Divides both sides' logits; None: the loss's own."}
    )
    merge: Merge = field(
        default="chain", metadata={"help": "From the rows of a chunk to one distribution."}
    )
    top_k: ParsedWhole | None = field(
        default=DEFAULT_TOP_K,
        metadata={"help": "Teacher columns kept in the loss; None for all (512 in exact-kl)."},
    )
    top_k_scope: Scope = field(
        default="chunk", metadata={"help": "Whose likeliest columns: each chunk's or the batch's."}
    )
    top_k_by: Chooser = field(
        default="teacher",
        metadata={"help": "Whose likeliest columns: the teacher's, or the student's."},
    )
    tail_bucket: ParsedSwitch = field(
        default="auto", metadata={"help": "Whether all other columns together are one more."}
    )
    common_weight: float = field(
        default=1.0, metadata={"help": "Factor of the partial KL of h-kl and gold."}
    )
    uld_weight: float = field(
        default=1.0, metadata={"help": "Factor of the sorted L1 of h-kl and gold."}
    )
    max_depth: ParsedWhole | None = field(
        default=None,
        metadata={"help": "Longest prefix of prefix-kl, or path of exact-kl; None for no limit."},
    )
    depth_weights: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Weights of the depths of prefix-kl and exact-kl."},
    )
    min_mass: float = field(
        default=0.001, metadata={"help": "Teacher mass below which prefix-kl skips a prefix."}
    )
    end: bool = field(
        default=True, metadata={"help": "Whether prefix-kl compares where tokens end."}
    )
    mirror: bool = field(
        default=True, metadata={"help": "Whether m:1 chunks are compared beyond the root."}
    )
    cells: bool | None = field(
        default=None,
        metadata={
            "help": "Whether mass that W cannot place goes to a cell; None: the loss's own, on in "
            "exact-kl, off in p-kl and prefix-kl."
        },
    )
    consistent: bool | None = field(
        default=None,
        metadata={
            "help": "Whether what the student's tokenizer never emits is left out; None as cells."
        },
    )
    carry_levels: int = field(
        default=1,
        metadata={"help": "Earlier teacher positions that exact-kl carries mass from; 0 for none."},
    )
    min_prob: float = field(
        default=2e-4,
        metadata={"help": "Teacher columns below this are one tail in exact-kl's targets."},
    )
    sure: bool = field(
        default=False, metadata={"help": "Whether exact-kl keeps only groups that are sure."}
    )
    chain_rule: bool | None = field(
        default=None,
        metadata={
            "help": "Weigh exact-kl's depths by their parents' mass; None: in all directions but "
            "forward."
        },
    )
    mismatch_weight: float = field(
        default=1.0,
        metadata={"help": "Factor of partition-kl on chunks that are not one token on both sides."},
    )
    student_top_k: ParsedWhole | None = field(
        default=16, metadata={"help": "Tokens that strict-top-k compares; None for all shared."}
    )
    mask_spaces: bool = field(
        default=True,
        metadata={"help": "Whether bpm leaves out positions that are spaces and tabs alone."},
    )
    full_metrics: bool = field(
        default=False, metadata={"help": "Read whole student rows, for empty_row_mass."}
    )
    block_size: ParsedWhole | None = field(
        default=None, metadata={"help": "Chunks worked on at a time; None chooses."}
    )
    compiled: ParsedCompiler = field(
        default=False,
        metadata={
            "help": "Run the losses' block functions by torch.compile: true, false or a backend."
        },
    )
    threshold: float = field(
        default=DEFAULT_THRESHOLD, metadata={"help": "Least weight of a pair in h-kl's common set."}
    )
    learnable_projection: bool = field(
        default=False, metadata={"help": "Train the weights of W too (p-kl)."}
    )
    projection_learning_rate: float = field(
        default=0.01, metadata={"help": "Learning rate of a learnable W."}
    )
    teacher_weighting: Confidence | None = field(
        default=None,
        metadata={"help": "Weight teachers per sample by confidence; None: by their weights."},
    )
    teacher_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the data that names the teachers of a row; None: all of them."
        },
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "dtype of a teacher loaded by name; auto: that of its files."},
    )
    max_tokens: ParsedWhole | None = field(
        default=1024,
        metadata={
            "help": "Longest example on either side, cut at a chunk boundary; None for no limit."
        },
    )
    dataset_num_proc: ParsedWhole | None = field(
        default=None, metadata={"help": "Processes that tokenize a datasets.Dataset; None: this."}
    )
    padding_side: Literal["right", "left"] = field(
        default="right", metadata={"help": "Side of the padding, of both models."}
    )
    pad_multiple: int = field(
        default=1, metadata={"help": "Round padded lengths up to a multiple of this."}
    )
    fused: ParsedSwitch = field(
        default="auto",
        metadata={
            "help": "Never make the student's logits; auto: on accelerators and under autocast."
        },
    )
    fused_teacher: ParsedSwitch = field(
        default="auto",
        metadata={"help": "Never make a live teacher's logits whole; auto: on accelerators."},
    )

    on_policy_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of each step's examples that the student answers (GKD's lambda)."},
    )
    on_policy_url: str | None = field(
        default=None,
        metadata={"help": "OpenAI-compatible server of the student (vLLM); None: the student."},
    )
    on_policy_max_new_tokens: int = field(
        default=128, metadata={"help": "Most tokens of a sampled answer."}
    )
    on_policy_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of sampling; 0 takes the likeliest token."}
    )
    on_policy_top_p: float = field(
        default=1.0, metadata={"help": "Mass of the likeliest tokens that is sampled from."}
    )
    on_policy_prompt_tokens: int = field(
        default=32, metadata={"help": "First tokens of a text without a prompt that stay as one."}
    )

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise OptionError where a value cannot work."""
        if self.loss not in LOSS_NAMES:
            raise OptionError(f"loss = {self.loss!r}, expected one of {', '.join(LOSS_NAMES)}")
        for name in ("fused", "fused_teacher"):
            if getattr(self, name) not in (True, False, "auto"):
                raise OptionError(
                    f"{name} = {getattr(self, name)!r}, expected True, False or 'auto'"
                )
        self._check_numbers()
        if self.teacher_weighting is not None:
            check_choice("teacher_weighting", self.teacher_weighting, get_args(Confidence))
        check_choice(
            "teacher_dtype", self.teacher_dtype, ("auto", "float32", "bfloat16", "float16")
        )
        check_flag("learnable_projection", self.learnable_projection)
        if not isinstance(self.teacher_column, str | None):
            raise OptionError(
                f"teacher_column = {self.teacher_column!r}, expected the name of a column, or None"
            )
        self._check_on_policy()
        LossOptions(**self._loss_options())

    def _check_numbers(self) -> None:
        rule = "is out of range; expected a number of at least 0"
        if self.kd_weight != "balanced":
            check_number("kd_weight", self.kd_weight, 0, rule=f"{rule} or 'balanced'")
        check_number("ce_weight", self.ce_weight, 0, rule=rule)
        check_threshold(self.threshold)
        for name in ("projection_learning_rate", "on_policy_top_p"):
            value = getattr(self, name)
            check_number(name, value, 0, inside=True, rule=", expected above 0")
        for name in ("on_policy_fraction", "on_policy_temperature"):
            check_number(name, getattr(self, name), 0, rule=", expected at least 0")
        for name in ("on_policy_fraction", "on_policy_top_p"):
            if getattr(self, name) > 1:
                raise OptionError(f"{name} = {getattr(self, name)}, expected between 0 and 1")
        rule = ", expected at least"
        for name in ("on_policy_max_new_tokens", "on_policy_prompt_tokens"):
            check_number(name, getattr(self, name), 1, rule=f"{rule} 1, whole", whole=True)
        if self.dataset_num_proc is not None:
            rule = f"{rule} 1, whole, or None for this process"
            check_number("dataset_num_proc", self.dataset_num_proc, 1, rule=rule, whole=True)
        self.max_tokens = token_limit(self.max_tokens)

    def _check_on_policy(self) -> None:
        if self.on_policy_fraction > 0 and self.loss == "ce":
            raise OptionError(
                f"on_policy_fraction = {self.on_policy_fraction} with loss = 'ce': what the "
                "student says is scored by a teacher; name a loss that reads one"
            )
        if self.on_policy_fraction == 1 and self.kd_weight == "balanced":
            raise OptionError(
                "on_policy_fraction = 1 leaves no cross-entropy for kd_weight = 'balanced' to "
                "balance; pass a number"
            )
        if self.on_policy_url is not None:
            # Here, as most runs need no client.
            from xtoken.teachers.served.client import without_password

            address = without_password(self.on_policy_url)
            if address != self.on_policy_url:
                raise OptionError(
                    f"on_policy_url names a password for {address}, and checkpoints keep it; pass "
                    "sampler=ServedSampler(url, vocab) to the trainer, or set XTOKEN_API_KEY"
                )

    def _loss_options(self) -> dict[str, Any]:
        names = [each.name for each in dataclasses.fields(LossOptions)]
        values = {name: getattr(self, name) for name in names}
        if isinstance(self.depth_weights, list):  # what else there is, the options refuse
            values["depth_weights"] = tuple(self.depth_weights)
        return values

    def distiller_options(self, loss: DistillLossName) -> DistillerOptions:
        """What a `Distiller` of this loss takes, which is known and not `auto`: the options that
        it reads."""
        read = options_read([loss])
        if loss == "same-vocab-kl" and self.top_k_by == "teacher" and self.top_k == DEFAULT_TOP_K:
            read = read - {"top_k"}  # a plain KL needs no choice
        options: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "padding_side": self.padding_side,
            "pad_to_multiple_of": self.pad_multiple,
            "learnable_projection": self.learnable_projection,
            **{name: value for name, value in self._loss_options().items() if name in read},
        }
        if reads_threshold(loss):
            options["threshold"] = self.threshold
        return cast(DistillerOptions, options)

    def check_rows(self) -> None:
        """Raise OptionError where a setting was changed that is of rows which we tokenize and pad,
        and not another Trainer."""
        for name, remedy in _OF_ROWS.items():
            value = getattr(self, name)
            if value != getattr(_DEFAULT_SETTINGS, name):
                raise OptionError(
                    f"{name} = {value!r} is not read where another Trainer makes the rows; {remedy}"
                )

    def check_read(self, losses: Sequence[DistillLossName]) -> None:
        """Raise OptionError where an option was changed that none of the losses reads."""
        taught: list[str] = [loss for loss in losses if loss != "ce"] or ["ce"]
        read = options_read(taught)
        for name, value in self._loss_options().items():
            idle = value in (_DEFAULTS[name], getattr(DEFAULT_OPTIONS, name))
            if name not in read and not idle:
                raise not_an_option(name, value, taught)
        check_threshold_read(self.threshold, taught)


_DEFAULT_SETTINGS = DistillSettings()
_DEFAULTS: dict[str, Any] = _DEFAULT_SETTINGS._loss_options()
# Of the rows, with what decides it in another Trainer.
_OF_ROWS = {
    "max_tokens": "cut them there (SFTConfig: max_length)",
    "padding_side": "set that of the tokenizer, tokenizer.padding_side",
    "pad_multiple": "set that of its collator (SFTConfig: pad_to_multiple_of)",
    "dataset_num_proc": "set its own (SFTConfig: dataset_num_proc)",
}
