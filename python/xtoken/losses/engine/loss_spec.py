"""What a loss is called, what it needs and which options it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from xtoken.errors import OptionError
from xtoken.losses.engine.prepared import Prepared
from xtoken.losses.inputs import DEFAULT_OPTIONS, LossInputs, LossOptions
from xtoken.losses.output import LossOutput
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.pair_parts import PARTS_OF_LOSS, LossName, PairParts, Part

# Every loss reads them.
_COMMON = frozenset({"direction", "beta", "temperature", "block_size", "compiled"})


# Of a pair, the chunks that count and both sides' ids.
Prepare = Callable[[PairParts, ChunkBatch, Tensor, Tensor], Prepared]


class LossFunction(Protocol):
    """The signature of every loss."""

    def __call__(
        self, inputs: LossInputs, pair: PairParts, options: LossOptions = DEFAULT_OPTIONS
    ) -> LossOutput: ...


@dataclass(frozen=True)
class LossSpec:
    """One loss of the library.

    Attributes:
        name: as the trainer and the command line call it.
        function: computes it.
        options: the names of the `LossOptions` that it reads.
        needs_ids: whether it reads `student_ids` and `teacher_ids`.
        temperature: what `LossOptions.temperature = None` means.
        prepare: makes `LossInputs.prepared` of a batch on the CPU; None where the loss reads none.
        on_cells: whether `cells` and `consistent` are options beyond its definition, which need a
            part of the pair of their own, and `consistent` what is prepared.
    """

    name: LossName
    function: LossFunction
    options: frozenset[str]
    needs_ids: bool = False
    temperature: float = 1.0
    prepare: Prepare | None = None
    on_cells: bool = False

    @classmethod
    def of(
        cls,
        name: LossName,
        function: LossFunction,
        *options: str,
        needs_ids: bool = False,
        temperature: float = 1.0,
        without: frozenset[str] = frozenset(),
        prepare: Prepare | None = None,
        on_cells: bool = False,
    ) -> LossSpec:
        """A loss that reads `options` and those that all read but `without`."""
        read = (_COMMON | set(options)) - without
        if on_cells:
            read = read | {"cells", "consistent"}
        return cls(name, function, read, needs_ids, temperature, prepare, on_cells)

    @property
    def parts(self) -> frozenset[Part]:
        """What it reads of a pair beside the sizes; see `PairParts.from_projection`."""
        return PARTS_OF_LOSS[self.name]

    def parts_for(self, options: LossOptions) -> frozenset[Part]:
        """`parts`, and what the options need beside them."""
        wanted = self.on_cells and (options.cells or options.consistent)
        return self.parts | {"cells"} if wanted else self.parts

    def prepare_for(self, options: LossOptions) -> Prepare | None:
        """`prepare`, where the options ask for it."""
        return None if self.on_cells and not options.consistent else self.prepare

    def check_options(self, options: LossOptions) -> None:
        """Raise OptionError for an option that is set and that this loss does not read."""
        for name in options.changed():
            if name not in self.options:
                raise unread_option(name, getattr(options, name), self.name, self.options)


def unread_option(
    name: str, value: object, losses: str, read: Iterable[str], reads: str = "it reads"
) -> OptionError:
    """The error of an option that is none of those which some losses read."""
    return OptionError(
        f"{name} = {value!r} is not an option of {losses}; {reads} {', '.join(sorted(read))}"
    )
