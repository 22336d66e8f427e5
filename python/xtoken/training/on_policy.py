"""On-policy distillation: the student samples, the teachers score in their own tokens.

The generalized knowledge distillation of Agarwal et al. (2024, arXiv 2306.13649): with
probability lambda a student learns from what it says itself. Here lambda is a share of each step's
examples. Ids stay as they were sampled, whether a tokenizer would produce them or not, and bytes
that are no Unicode text reach the teacher as the tokens that spell them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import GenerationConfig

from xtoken._core import Vocab
from xtoken.data.align_turns import align_by_turns
from xtoken.data.examples import Example, fitting_ends
from xtoken.data.loss_mask import NO_RANGES, Encoded, is_predicted
from xtoken.distillation import MultiBatch
from xtoken.distillation.batch import Batch
from xtoken.distillation.collate import pad_id, predictors
from xtoken.pair import Pair
from xtoken.teachers.forward import check_ids, positions_of
from xtoken.teachers.probe import takes_left_padding
from xtoken.training.routing import unasked
from xtoken.training.settings import DistillSettings
from xtoken.training.teaching import AnyBatch

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class SampleRequest:
    """What a sampler is asked for.

    Attributes:
        prompts: [T] student ids each, without padding.
        max_new_tokens: most tokens of an answer, its stop token included.
        temperature, top_p: as in transformers' generate; temperature 0 takes the likeliest.
        stops: student ids that end an answer.
        seed: the same seed must give the same answers.
    """

    prompts: list[list[int]]
    max_new_tokens: int
    temperature: float
    top_p: float
    stops: tuple[int, ...]
    seed: int


class Sampler(Protocol):
    """Samples answers of the student: ids in, ids out."""

    def __call__(self, request: SampleRequest) -> list[list[int]]:
        """The ids of each answer, with the stop token where it ended by one."""


class GeneratingSampler:
    """The student itself, by transformers' generate, with its weights as they are.

    Args:
        model: the student, or what gives it.
        pad: id of padding.
        sharded: whether all processes must take as many steps as the longest of their answers.
        vocab_size: ids from it on, which pad the model's embeddings, are never sampled.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        pad: int,
        *,
        sharded: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        self._model: Callable[[], nn.Module]
        self._model = (lambda: model) if isinstance(model, nn.Module) else model
        self._pad = pad
        self._sharded = sharded
        self._vocab_size = vocab_size

    @torch.no_grad()
    def __call__(self, request: SampleRequest) -> list[list[int]]:
        """The answers, none longer than the model has positions for; neither dropout nor the global
        random numbers are touched."""
        prompts = request.prompts
        if not prompts:
            if not self._sharded:
                return []
            prompts = [[self._pad]]  # every process takes part
        model = self._model()
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        devices = [device] if device.type == "cuda" else []
        answers: list[list[int]] = [[] for _ in prompts]
        try:
            with torch.random.fork_rng(devices), _plain_generation(model):
                torch.manual_seed(request.seed)
                for places, count in self._together(model, prompts, request.max_new_tokens):
                    rows = [prompts[place] for place in places]
                    found = self._generate(model, rows, count, request)
                    for place, answer in zip(places, found, strict=True):
                        answers[place] = answer
        finally:
            model.train(training)
        return answers[: len(request.prompts)]

    def _together(
        self, model: nn.Module, prompts: Sequence[list[int]], most: int
    ) -> Iterator[tuple[list[int], int]]:
        """The prompts that are answered in one call, and how many tokens: as many as are asked for,
        or as there are positions for after one prompt."""
        limit = positions_of(model)
        rooms = [most if limit is None else min(most, limit - len(each)) for each in prompts]
        if self._sharded:
            # All processes make the same number of calls.
            yield list(range(len(prompts))), max(1, min(rooms))
            return
        # Where padding is read, only prompts of one length.
        alike = [0] * len(prompts) if takes_left_padding(model) else list(map(len, prompts))
        kinds = list(zip(rooms, alike, strict=True))
        for kind in sorted(set(kinds), reverse=True):
            if kind[0] > 0:
                yield [place for place, own in enumerate(kinds) if own == kind], kind[0]

    def _generate(
        self, model: nn.Module, prompts: Sequence[list[int]], count: int, request: SampleRequest
    ) -> list[list[int]]:
        device = next(model.parameters()).device
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad, dtype=torch.int64, device="cpu")
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt, device="cpu")
            mask[row, width - len(prompt) :] = 1
        check_ids(model, {"input_ids": ids, "attention_mask": mask}, "student")
        greedy = request.temperature == 0
        options: dict[str, Any] = {"do_sample": not greedy}
        if not greedy:
            options |= {"temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
        if padding := self._padding(model):
            options["suppress_tokens"] = padding
        # Through Any: transformers' mixin is not in the type of a module.
        found = cast(Any, model).generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=count,
            eos_token_id=list(request.stops) or None,
            pad_token_id=self._pad,
            synced_gpus=self._sharded,
            use_cache=True,
            **options,
        )
        return [until_stop(row, request.stops) for row in found[:, width:].tolist()]

    def _padding(self, model: nn.Module) -> list[int]:
        config = getattr(model, "config", None)
        if self._vocab_size is None or config is None:
            return []
        return list(range(self._vocab_size, config.get_text_config().vocab_size))


@contextlib.contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    """Put a model's own defaults of `generate` aside, such as a penalty or beams: an answer is
    what its next-token distributions give."""
    own = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    # Through Any: transformers declares neither with types.
    plain = cast(Any, GenerationConfig)(cache_implementation=own.cache_implementation)
    # A wrapper such as PEFT's hands its own to the model in it, and leaves it there.
    kept = [(each, vars(each).get("generation_config")) for each in model.modules()]
    cast(Any, model).generation_config = plain
    try:
        yield
    finally:
        for each, config in kept:
            vars(each).pop("generation_config", None)
            if config is not None:
                vars(each)["generation_config"] = config


def until_stop(ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    """The ids up to the first stop token, that one included."""
    end = next((at for at, token in enumerate(ids, 1) if token in stops), len(ids))
    return list(ids[:end])


@dataclass(frozen=True)
class Prompt:
    """Where the prompt of an example ends: a chunk boundary with every teacher.

    Attributes:
        student: tokens of the student's prompt.
        teachers: of each teacher's.
    """

    student: int
    teachers: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Most tokens of a side."""
        return max(self.student, *self.teachers)


def prompt_of(examples: tuple[Example, ...], plain_tokens: int) -> Prompt | None:
    """The prompt of an example: what stands before the tokens that count, or of a text whose
    tokens all count its first `plain_tokens`.

    Args:
        examples: of one text with each teacher.

    Returns: None where nothing to begin with is left.
    """
    mask = examples[0].student_loss_mask
    # Nothing predicts a first token: where it counts, a text does whole.
    first = int(mask[1:].argmax()) + 1
    given = first > 1 or not mask[0]
    limit = first if given else min(plain_tokens, len(mask) - 1)
    ends: list[set[int]] = []
    for example in filter(_is_asked, examples):
        student, teacher = example.alignment.student_bounds, example.alignment.teacher_bounds
        last = len(example.teacher_ids)
        if given:
            last = int(example.teacher_loss_mask.argmax())
        fits = (student >= 1) & (student <= limit) & (teacher >= 1) & (teacher <= last)
        ends.append(set(student[fits].tolist()))
    common = set.intersection(*ends) if ends else set()
    if not common:
        return None
    end = max(common)
    teachers = []
    for example in examples:
        at = int(np.searchsorted(example.alignment.student_bounds, end, side="right")) - 1
        teachers.append(int(example.alignment.teacher_bounds[at]))
    return Prompt(end, tuple(teachers))


def _is_asked(example: Example) -> bool:
    """Whether the example is for this teacher; see `Routes`."""
    return is_predicted(example.teacher_loss_mask)


def answered(
    examples: tuple[Example, ...],
    prompt: Prompt,
    answer: Sequence[int],
    pairs: Sequence[Pair],
    max_tokens: int | None,
) -> tuple[Example, ...] | None:
    """The examples of a prompt with what the student said.

    The student's ids stay as they are. A teacher reads the same bytes in its own tokens, and its
    own stop where the student stopped. Only the answer counts.

    Args:
        examples, prompt: as in `prompt_of`.
        answer: student ids, with the stop token where it ended by one.
        pairs: one per teacher.
        max_tokens: longest example on any side, cut where chunks end.

    Returns: None where a teacher's vocabulary cannot spell the answer, or nothing of it is left.
    """
    vocab = pairs[0].student_vocab
    stopped = len(answer) > 0 and answer[-1] in vocab.stops
    said = answer[:-1] if stopped else answer
    # Not decode_bytes, which takes the space of a first token for a dummy prefix.
    text = b"".join(vocab.token_bytes(token) for token in said)
    head = examples[0].student_ids[: prompt.student]
    student = _turn(np.array([*head, *answer], dtype=np.int64), prompt.student, stopped)
    asked = [pair for pair, each in zip(pairs, examples, strict=True) if _is_asked(each)]
    sides = [student]
    alignments = []
    for example, end, pair in zip(examples, prompt.teachers, pairs, strict=True):
        if not _is_asked(example):
            continue
        stop = _partner(pair, answer[-1]) if stopped else None
        teacher = _spelled(example.teacher_ids[:end], text, stop, pair.teacher_vocab)
        if teacher is None:
            return None
        sides.append(teacher)
        alignments += align_by_turns(pair.aligner, [student], [teacher])
    if max_tokens is not None and any(len(side.ids) > max_tokens for side in sides):
        sides = [
            side.cut(end)
            for side, end in zip(sides, fitting_ends(alignments, max_tokens), strict=True)
        ]
        alignments = [
            align_by_turns(pair.aligner, sides[:1], [side])[0]
            for pair, side in zip(asked, sides[1:], strict=True)
        ]
    if len(sides[0].ids) <= prompt.student:
        return None
    taught = zip(sides[1:], alignments, strict=True)
    made: list[Example] = []
    for example in examples:
        ids, mask = sides[0].ids, sides[0].loss_mask
        if _is_asked(example):
            side, alignment = next(taught)
            made.append(Example(ids, side.ids, mask, side.loss_mask, alignment))
        else:
            made.append(unasked(replace(example, student_ids=ids, student_loss_mask=mask)))
    return tuple(made)


def _turn(ids: Ids, start: int, stopped: bool) -> Encoded:
    """Ids whose answer begins at `start`, and ends in a stop token or not."""
    end = len(ids)
    turns = np.array([[start, end]], dtype=np.int64)
    stops = np.array([[end - int(stopped), end]], dtype=np.int64)
    return Encoded(ids, np.arange(end) >= start, turns, stops)


def _spelled(head: Ids, text: bytes, stop: int | None, vocab: Vocab) -> Encoded | None:
    """The teacher's prompt and the tokens that its tokenizer makes of the answer after it."""
    start = len(head)
    while start > 0 and not vocab.is_special(int(head[start - 1])):
        start -= 1
    tail = head[start:].tolist()
    before = b"".join(vocab.token_bytes(token) for token in tail)
    # As one text with what stands before it; where that is spelled in another way (a dummy prefix)
    # it stays as it is.
    joint = vocab.segment(before) == tail
    pieces = vocab.segment(before + text if joint else text)
    if pieces is None:
        return None
    whole = joint and pieces[: len(tail)] == tail
    kept = head[:start] if joint else head
    answer_from = len(head)
    if joint and not whole:
        ends = np.cumsum([len(vocab.token_bytes(token)) for token in pieces])
        answer_from = start + int(np.searchsorted(ends, len(before), side="right"))
    ids = np.array([*kept, *pieces, *([] if stop is None else [stop])], dtype=np.int64)
    encoded = _turn(ids, answer_from, stop is not None)
    if joint and not whole:
        # A token spells some of the prompt and of the answer: the sides are aligned as one piece.
        return encoded._replace(turns=NO_RANGES, stops=NO_RANGES)
    return encoded


def _partner(pair: Pair, stop: int) -> int | None:
    """What the teacher would say where the student says this stop token; see W's special rows."""
    projection = pair.projection
    start, end = (int(projection.indptr[at]) for at in (stop, stop + 1))
    if start < end:
        return int(projection.indices[start])
    return next(iter(pair.teacher_vocab.stops), None)


class OnPolicy:
    """Replaces a share of each step's examples by the student's own answers.

    Args:
        settings: `on_policy_fraction` and what belongs to it.
        pairs: one per teacher.
        sampler: of the student.
        seed, process: of the run; samples follow from them and the step.
        positions: the fewest that the student or a teacher has, as `max_tokens` is; None for no
            limit.
    """

    def __init__(
        self,
        settings: DistillSettings,
        pairs: Sequence[Pair],
        sampler: Sampler,
        *,
        seed: int,
        process: int,
        positions: int | None = None,
    ) -> None:
        self._settings = settings
        limits = [each for each in (settings.max_tokens, positions) if each is not None]
        self._limit = min(limits, default=None)
        self._pairs = pairs
        self._sampler = sampler
        self._seed = (seed, process)
        self.pad = pad_id(pairs[0].student.source)

    def replaced(
        self, groups: Sequence[Sequence[tuple[Example, ...]]], step: int
    ) -> list[list[tuple[tuple[Example, ...], bool]]]:
        """The examples of a step, some of them with sampled answers.

        Args:
            groups: the examples of each micro-batch.
            step: number of the optimizer step.

        Returns: by micro-batch, each example and whether its answer was sampled.
        """
        settings = self._settings
        made = [[(example, False) for example in group] for group in groups]
        places = [(group, row) for group, rows in enumerate(made) for row in range(len(rows))]
        numbers = np.random.default_rng([*self._seed, step])
        # The share is met in the mean: of 3 examples at 0.5 one or two.
        count = int(len(places) * settings.on_policy_fraction + numbers.random())
        chosen = sorted(numbers.permutation(len(places))[:count].tolist())
        prompts: list[tuple[int, int, Prompt]] = []
        for index in chosen:
            group, row = places[index]
            prompt = prompt_of(made[group][row][0], settings.on_policy_prompt_tokens)
            if prompt is not None and (self._limit is None or prompt.longest < self._limit):
                prompts.append((group, row, prompt))
        most = settings.on_policy_max_new_tokens
        if self._limit is not None and prompts:
            most = min(most, self._limit - min(prompt.student for _, _, prompt in prompts))
        ids = [made[g][r][0][0].student_ids[: p.student].tolist() for g, r, p in prompts]
        answers = self._sampler(
            SampleRequest(
                ids,
                most,
                settings.on_policy_temperature,
                settings.on_policy_top_p,
                self._pairs[0].student_vocab.stops,
                int(numbers.integers(2**31)),
            )
        )
        for (group, row, prompt), answer in zip(prompts, answers, strict=True):
            found = answered(made[group][row][0], prompt, answer, self._pairs, self._limit)
            if found is not None:
                made[group][row] = (found, True)
        return made


def without_cross_entropy(batch: AnyBatch, rows: Sequence[int]) -> AnyBatch:
    """The batch with no cross-entropy of some rows: a student does not learn its own samples by
    heart. Their chunks stay."""
    if isinstance(batch, MultiBatch):
        return MultiBatch(tuple(_without(part, rows) for part in batch.batches))
    return _without(batch, rows)


def _without(batch: Batch, rows: Sequence[int]) -> Batch:
    mask = batch.student_loss_mask.clone()
    mask[list(rows)] = False
    tokens = int(mask[:, 1:].sum())
    return batch.remade(student_loss_mask=mask, tokens=tokens, counted=predictors(mask))
