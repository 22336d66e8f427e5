"""`python -m benches.targets`: time to build exact targets, on one thread.

The student is SmolLM2's tokenizer, the teacher DeepSeek's, and the other way round; the text is
English prose and Python. SmolLM2's rows are those of SmolLM2-135M-Instruct itself, 512 stored
columns; DeepSeek's are made up with falling probabilities, as many of them above the builder's cut,
the text's own token among the best. Time is CPU time: of a text that is seen for the first time,
after another one, and of the same text again. Beside it, that model's forward pass.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from xtoken import Aligner, Projection
from xtoken.targets import TargetBuilder, TargetExample, TargetOptions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from chat_families import family

from demo.teacher import prepare_teacher

COLUMNS = 512
REPEATS = 5
TEXTS = 4


def rows(
    ids: np.ndarray, size: int, frequent: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """[T, 512] column ids and log-probs after each token."""
    rng = np.random.default_rng(seed)
    shares = 1.0 / np.arange(2, COLUMNS + 2) ** 1.6
    columns = np.empty((len(ids), COLUMNS), np.int64)
    log_probs = np.empty((len(ids), COLUMNS), np.float32)
    for at in range(len(ids)):
        # Half of what a model finds likely is frequent in the text, half is anything.
        some = np.concatenate([rng.permutation(frequent)[:300], rng.integers(0, size, 400)])
        columns[at] = rng.permutation(np.unique(some))[:COLUMNS]
        if at + 1 < len(ids) and ids[at + 1] not in columns[at]:
            columns[at, int(rng.exponential(3)) % COLUMNS] = ids[at + 1]
        scale = shares * rng.gamma(1.0, size=COLUMNS)
        log_probs[at] = np.log(np.sort(scale / scale.sum() * 0.98)[::-1])
    return columns, log_probs


def texts() -> list[str]:
    """Prose and code, a few thousand characters each."""
    prose = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    code = inspect.getsource(inspect)
    return [
        prose[at * 8_000 : (at + 1) * 8_000] + code[at * 4_000 : (at + 1) * 4_000]
        for at in range(TEXTS)
    ]


def pairs(tokens: int | None = None) -> Iterator[tuple[str, Tokenizer, Tokenizer, TargetExample]]:
    """Each direction with its first text, cut at so many student tokens."""
    for name, student, teacher in directions():
        text = texts()[0]
        if tokens is not None:
            offsets = student.encode(text, add_special_tokens=False).offsets
            text = text[: offsets[min(tokens, len(offsets)) - 1][1]]
        yield name, student, teacher, example_of(student, teacher, text)


def directions() -> list[tuple[str, Tokenizer, Tokenizer]]:
    """Student and teacher, both ways."""
    smollm2: Tokenizer = family("smollm2").tokenizer.backend_tokenizer
    deepseek: Tokenizer = family("deepseek").tokenizer.backend_tokenizer
    return [
        ("SmolLM2 <- DeepSeek", smollm2, deepseek),
        ("DeepSeek <- SmolLM2", deepseek, smollm2),
    ]


def example_of(
    student: Tokenizer, teacher: Tokenizer, text: str, model: PreTrainedModel | None = None
) -> TargetExample:
    """A text with a teacher's rows: a model's, or made-up ones."""
    ids = [np.array(side.encode(text, add_special_tokens=False).ids) for side in (student, teacher)]
    if model is None:
        size = teacher.get_vocab_size(with_added_tokens=True)
        columns, log_probs = rows(ids[1], size, np.unique(ids[1]), len(text))
    else:
        columns, log_probs = predictions(model, ids[1])
    alignment = Aligner(student, teacher, threads=1).align(*ids)
    return TargetExample(*ids, alignment, log_probs, columns)


def load_model() -> PreTrainedModel:
    """SmolLM2-135M-Instruct, from its package."""
    from transformers import AutoModelForCausalLM

    folder = prepare_teacher(Path("runs") / "benches" / "smollm2")
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def predictions(model: PreTrainedModel, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[T, 512] column ids and log-probs after each token, read 1,024 at a time."""
    import torch

    found = []
    with torch.no_grad():
        for part in torch.from_numpy(ids).split(1024):
            found.append(model(part[None]).logits[0].log_softmax(-1).topk(COLUMNS))
    columns = torch.cat([each.indices for each in found]).numpy()
    return columns, torch.cat([each.values for each in found]).numpy()


def forward_seconds(model: PreTrainedModel, tokens: int = 256) -> float:
    """CPU seconds per 1,000 tokens of the model's forward pass, one thread."""
    import torch

    torch.set_num_threads(1)
    ids = torch.randint(0, 49_152, (1, tokens))
    with torch.no_grad():
        model(ids)
        started = time.process_time()
        model(ids)
    return (time.process_time() - started) / tokens * 1000


def main() -> None:
    """Print milliseconds per 1,000 student tokens for each switch."""
    model = load_model()
    forward = 1e3 * forward_seconds(model)
    print(f"forward pass of SmolLM2-135M-Instruct: {forward:.0f} ms of CPU per 1,000 tokens")
    for name, student, teacher in directions():
        projection = Projection.build(student, teacher, cache_dir=False)
        started = time.process_time()
        builder = TargetBuilder(projection)
        print(f"{name}: tables of the pair in {time.process_time() - started:.2f} s")
        own = model if name.endswith("<- SmolLM2") else None
        examples = [example_of(student, teacher, text, own) for text in texts()]
        lengths = [len(example.student_ids) for example in examples]
        kept = np.mean([(e.log_probs > np.log(2e-4)).sum(1).mean() for e in examples])
        origin = "made up" if own is None else "the model's"
        print(f"  {sum(lengths)} student tokens; above the cut {kept:.0f} columns, {origin}")
        for label, options in (
            ("with depths", TargetOptions()),
            ("cells", TargetOptions(consistent=False, levels=0, max_depth=0)),
            ("cells, consistent", TargetOptions(levels=0, max_depth=0)),
            ("cells, consistent, carry", TargetOptions(max_depth=0)),
            ("with depths, four levels", TargetOptions(levels=4)),
            ("with depths, above 0.001", TargetOptions(min_prob=1e-3)),
            ("with depths, above 0.03", TargetOptions(min_prob=3e-2)),
        ):
            new, again = [], []
            for example, length in zip(examples, lengths, strict=True):
                for repeat in range(REPEATS):
                    started = time.process_time()
                    targets = builder.build([example], options, threads=1)
                    spent = 1e6 * (time.process_time() - started) / length
                    (again if repeat else new).append(spent)
            print(
                f"  {label:27} {min(again):5.2f} ms per 1,000 tokens ({min(again) / forward:.2%} "
                f"of the forward pass), a text seen first {np.mean(new[1:]):5.2f}; "
                f"{len(targets.probs) / max(len(targets), 1):.0f} groups, "
                f"tail {targets.tails.mean():.4f}, open {targets.open.mean():.3f}"
            )


if __name__ == "__main__":
    main()
