"""Exact targets made once from stored predictions, kept beside them on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken._core import __version__
from xtoken._files import remove_unfinished, warn_of_cache
from xtoken._tensor_files import read_tensors, write_tensors
from xtoken.data.examples import Example
from xtoken.data.loss_mask import is_predicted
from xtoken.errors import FormatError, PairError
from xtoken.targets import TargetBuilder, TargetExample, TargetOptions, Targets
from xtoken.targets.rows import within
from xtoken.teachers.predictions import Predictions
from xtoken.teachers.store import TopKStore

FORMAT = "xtoken-targets-3"
TOKENS_PER_FILE = 65_536
FOLDER = "targets"
"""Where the targets of all students are, in the folder of the predictions."""

_Arrays = dict[str, NDArray[Any]]


class TargetStore:
    """The targets of examples for one student, with one choice of corrections.

    They lie in a folder of their own below that of the predictions, named after all that they
    depend on: the teacher, its kept columns, both tokenizers, the options and the version of the
    library. Files are written whole or not at all, with a checksum; one that is damaged is left
    aside, and its examples are made again. An example is found by its ids, its alignment, and
    whether its teacher speaks of it.

    Args:
        predictions: of the teacher.
        builder: of the pair.
        options: the corrections.

    Raises:
        PairError: the predictions are of another teacher tokenizer.
    """

    def __init__(
        self, predictions: TopKStore, builder: TargetBuilder, options: TargetOptions
    ) -> None:
        if predictions.key.tokenizer not in ("", builder.pair.teacher):
            raise PairError(
                f"the predictions in {predictions.directory} are of the teacher tokenizer "
                f"{predictions.key.tokenizer[:12]}, the targets' pair has "
                f"{builder.pair.teacher[:12]}; fill a store with this pair's teacher"
            )
        self.predictions, self.builder, self.options = predictions, builder, options
        self.examples_made = 0
        self.files_discarded = 0
        self._key = json.dumps(
            {
                "predictions": predictions.key.metadata(),
                "pair": builder.fingerprint,
                "options": asdict(options),
                "version": __version__,
            },
            sort_keys=True,
        )
        name = hashlib.blake2b(self._key.encode(), digest_size=12).hexdigest()
        self.directory = predictions.directory / FOLDER / name
        self._places: dict[bytes, tuple[Targets, int]] = {}
        self._opened: set[Path] = set()
        if self.directory.is_dir():
            remove_unfinished(self.directory)
        self.reload()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, example: Example) -> bool:
        return _digest(example) in self._places

    def knows(self, examples: Sequence[Example]) -> bool:
        """Whether `targets` of these examples can be had: kept, or their predictions stored."""
        return all(
            each in self or not _is_taught(each) or each.teacher_ids in self.predictions
            for each in examples
        )

    def reload(self) -> None:
        """Read what another process has written since."""
        for path in sorted(self.directory.glob("*.safetensors")):
            if path not in self._opened:
                self._open(path)

    def fill(
        self,
        examples: Sequence[Example],
        *,
        progress: Callable[[int, int], None] | None = None,
        threads: int = 0,
    ) -> int:
        """Make and keep what is not kept yet; what was written before an interruption stays.

        Args:
            examples: whose teacher ids are all in the predictions.
            progress: called with (examples done, examples to do) after each file.
            threads: as `TargetBuilder.build`.

        Returns: the number of examples that had to be made.

        Raises:
            StoreError: predictions of an example are missing.
        """
        missing = {_digest(each): each for each in examples if each not in self}
        done = 0
        for part in _by_tokens(list(missing.items())):
            digests = [digest for digest, _ in part]
            made = self._make([example for _, example in part], threads)
            self._write(digests, made)
            done += len(part)
            if progress is not None:
                progress(done, len(missing))
        self.examples_made += len(missing)
        return len(missing)

    def targets(self, examples: Sequence[Example], *, threads: int = 1) -> Targets:
        """The targets of examples, in order; those that are not kept are made and not kept.

        Args:
            threads: as `TargetBuilder.build`; 1 for a forked process, as a loader's worker is.

        Raises:
            StoreError: predictions of an example are missing.
        """
        digests = [_digest(example) for example in examples]
        lacking = [at for at, digest in enumerate(digests) if digest not in self._places]
        made: dict[int, Targets] = {}
        if lacking:
            found = self._make([examples[at] for at in lacking], threads)
            made = {at: found.example(index) for index, at in enumerate(lacking)}
            self.examples_made += len(lacking)
        parts = []
        for at, digest in enumerate(digests):
            if at in made:
                parts.append(made[at])
            else:
                targets, index = self._places[digest]
                parts.append(targets.example(index))
        return Targets.joined(parts)

    def _make(self, examples: Sequence[Example], threads: int) -> Targets:
        rows = [
            # What is for another teacher alone was never asked for, and nothing of it counts.
            self.predictions.get(example.teacher_ids)
            if _is_taught(example)
            else _nothing(len(example.teacher_ids))
            for example in examples
        ]
        built = [
            TargetExample(
                example.student_ids,
                example.teacher_ids,
                example.alignment,
                row.log_probs,
                within(row.ids, self.builder.sizes[1]),
                validate=False,
            )
            for example, row in zip(examples, rows, strict=True)
        ]
        return self.builder.build(built, self.options, threads=threads)

    def _write(self, digests: list[bytes], made: Targets) -> None:
        self._places |= {digest: (made, index) for index, digest in enumerate(digests)}
        name = hashlib.blake2b(b"".join(digests), digest_size=12).hexdigest()
        arrays: _Arrays = dict(vars(made))
        arrays["tails"] = made.tails.view(np.int64)
        arrays["open"] = made.open.view(np.uint8)
        arrays["digests"] = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            path = self.directory / f"{name}.safetensors"
            self._opened.add(path)
            write_tensors(path, arrays, {"format": FORMAT, "key": self._key})
        except OSError as error:
            warn_of_cache(self.directory, error)

    def _open(self, path: Path) -> None:
        self._opened.add(path)
        try:
            file = read_tensors(path, FORMAT, "targets", "a file of this store")
            if file.metadata.get("key") != self._key:
                raise FormatError(f"{path} was made for another pair, teacher or setting")
            arrays: _Arrays = dict(file.arrays)
            digests = [row.tobytes() for row in arrays.pop("digests")]
            arrays["tails"] = arrays["tails"].view(np.float64)
            arrays["open"] = arrays["open"].view(np.bool_)
            targets = Targets(**arrays)
        except (FormatError, KeyError, TypeError, OSError):
            # Nothing is lost: its examples are made again, from the predictions.
            self.files_discarded += 1
            return
        if targets.examples != len(digests):
            self.files_discarded += 1
            return
        self._places |= {digest: (targets, index) for index, digest in enumerate(digests)}


def _nothing(tokens: int) -> Predictions:
    """Rows without a column."""
    return Predictions(
        np.zeros((tokens, 1), np.int64),
        np.full((tokens, 1), -np.inf, np.float32),
        np.zeros(tokens, np.float32),
    )


def _is_taught(example: Example) -> bool:
    """Whether its targets are those of the predictions; else it has none."""
    return is_predicted(example.teacher_loss_mask)


def _digest(example: Example) -> bytes:
    # The same text may be for another teacher in one run, and for this one in the next.
    found = hashlib.blake2b(b"taught" if _is_taught(example) else b"untaught", digest_size=16)
    alignment = example.alignment
    for ids in (
        example.student_ids,
        example.teacher_ids,
        alignment.student_bounds,
        alignment.teacher_bounds,
        alignment.kind,
    ):
        array = np.ascontiguousarray(ids)
        found.update(f"{len(array)} ".encode())
        found.update(array.tobytes())
    return found.digest()


def _by_tokens(items: list[tuple[bytes, Example]]) -> list[list[tuple[bytes, Example]]]:
    """Cut into parts of about as many tokens as a file holds."""
    parts: list[list[tuple[bytes, Example]]] = []
    tokens = TOKENS_PER_FILE
    for item in items:
        if tokens >= TOKENS_PER_FILE:
            parts.append([])
            tokens = 0
        parts[-1].append(item)
        tokens += len(item[1].teacher_ids)
    return parts
