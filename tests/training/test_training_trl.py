"""Distillation inside TRL's SFTTrainer, as the mixin over it: the losses are those of each document
alone, whatever stands around it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from own_heads import OWN_HEADS, give_head
from served_server import ServedModel
from test_distill_trainer import SMOOTHED
from tiny_models import tiny_texts, write_pair
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    TrainerCallback,
)

from xtoken import Pair
from xtoken.errors import DataError, OptionError, TokenIdError
from xtoken.teachers import LiveTeacher, StoreKey, TopKStore
from xtoken.teachers.served import ServedTeacher
from xtoken.training import DistillMixin, DistillSettings, Teacher
from xtoken.training.teacher_columns import add_teacher_side

trl = pytest.importorskip("trl")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

STUDENT_TEMPLATE = (
    "{% for message in messages %}{{ '[' + message.role + ']' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
TEACHER_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
)


class Trainer(DistillMixin, trl.SFTTrainer):
    """What a user writes."""


class KeepGradient(TrainerCallback):
    def __init__(self) -> None:
        self.gradient: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model: torch.nn.Module, **_) -> None:
        self.gradient = {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pair")
    write_pair(made)
    for side, template in (("student", STUDENT_TEMPLATE), ("teacher", TEACHER_TEMPLATE)):
        tokenizer = AutoTokenizer.from_pretrained(made / side)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(made / side)
    return made


TEXTS = tiny_texts(6)
ROWS: dict[str, Callable[[str], dict[str, Any]]] = {
    "text": lambda text: {"text": text},
    "prompt": lambda text: {"prompt": text[:60], "completion": text[60:]},
    "messages": lambda text: {
        "messages": [
            {"role": "user", "content": text[:60]},
            {"role": "assistant", "content": text[60:]},
        ]
    },
}


def rows(kind: str = "text", texts: list[str] = TEXTS) -> Dataset:
    return Dataset.from_list([ROWS[kind](text) for text in texts])


Step = tuple[dict[str, float], dict[str, torch.Tensor]]


def step(
    folder: Path,
    out: Path,
    data: Dataset,
    settings: DistillSettings | None = None,
    trainer: type[Trainer] = Trainer,
    teachers: Any = None,
    **changed: Any,
) -> Step:
    """One optimizer step over the whole dataset: what is logged, and the gradient."""
    names = ("peft_config", "data_collator", "compute_loss_func")
    more = {name: changed.pop(name) for name in names if name in changed}
    model = changed.pop("model", None)
    options: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 6,
        "max_length": 256,
        "logging_steps": 1,
        "max_grad_norm": 1e9,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    keep = KeepGradient()
    made = trainer(
        model or AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32),
        args=trl.SFTConfig(str(out), **(options | changed)),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
        teachers=str(folder / "teacher") if teachers is None else teachers,
        distill=settings or DistillSettings(loss="p-kl", kd_weight=2.0, top_k=32),
        callbacks=[keep],
        **more,
    )
    made.train()
    return next(each for each in made.state.log_history if "kd" in each), keep.gradient


@pytest.fixture(scope="module")
def padded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Step:
    """The step that most others are compared with."""
    return step(folder, tmp_path_factory.mktemp("padded"), rows())


def close(one: dict[str, Any], other: dict[str, Any], *names: str, rel: float = 1e-4) -> None:
    for name in names or ("ce", "kd", "loss", "chunks", "teacher_mass"):
        assert one[name] == pytest.approx(other[name], rel=rel), name


def same_gradient(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    scale = max(float(value.abs().max()) for value in one.values())
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5 * scale, msg=name)


def reference(folder: Path, kind: str, loss_from: int | None = None) -> dict[str, float]:
    """Each text alone, without padding: cross-entropy and P-KL over all, by hand."""
    pair = Pair(folder / "student", folder / "teacher")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / side, dtype=torch.float32).eval()
        for side in ("student", "teacher")
    )
    distiller = pair.distiller("p-kl", top_k=32, tail_bucket="auto")
    sides = (pair.student_tokenizer, pair.teacher_tokenizer)
    nats = kd = 0.0
    tokens = chunks = 0
    for text in TEXTS:
        ids = [side(text)["input_ids"] + [side.eos_token_id] for side in sides]
        batch = distiller.batch([ids[0]], [ids[1]])
        with torch.no_grad():
            logits = student(**batch.student).logits
            output = distiller(logits, teacher(**batch.teacher).logits, batch)
        count = int(output.num_chunks)
        kd, chunks = kd + float(output.kd) * count, chunks + count
        log_probs = logits[0, :-1].log_softmax(-1)
        nats -= float(log_probs.gather(1, torch.tensor(ids[0][1:])[:, None]).sum())
        tokens += len(ids[0]) - 1
    return {"ce": nats / tokens, "kd": kd / chunks, "chunks": chunks}


def test_a_padded_step_has_the_losses_of_each_text_alone(folder: Path, padded: Step) -> None:
    logged, _ = padded
    close(logged, reference(folder, "text"), "ce", "kd", "chunks")
    assert logged["loss"] == pytest.approx(logged["ce"] + 2.0 * logged["kd"], rel=1e-5)
    assert {"entropy", "mean_token_accuracy", "coverage", "kd_scale"} <= logged.keys()


def test_padding_that_the_student_has_no_row_for_is_refused_in_one_line(
    folder: Path, tmp_path: Path
) -> None:
    """TRL pads with the tokenizer's own token; torch says "index out of range in self"."""
    for side in ("student", "teacher"):
        shutil.copytree(folder / side, tmp_path / side)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    tokenizer.save_pretrained(tmp_path / "student")
    pad = len(tokenizer) - 1
    with pytest.raises(
        TokenIdError, match=f"padded with token {pad}, but the student's embedding has {pad} rows;"
    ):
        step(tmp_path, tmp_path / "out", rows())


def test_a_packed_step_has_the_losses_and_the_gradient_of_the_padded_one(
    folder: Path, tmp_path: Path, padded: Step
) -> None:
    logged, gradient = padded
    packed, other = step(folder, tmp_path, rows(), packing=True)
    close(packed, logged)
    same_gradient(gradient, other)


def test_a_collator_of_ones_own_may_pad_on_the_left(folder: Path, tmp_path: Path) -> None:
    """With prompts: of whole texts TRL's own loss has the padding predict the first token."""
    collator = DataCollatorForSeq2Seq(
        AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    )
    right, gradient = step(folder, tmp_path, rows("prompt"))
    left, other = step(folder, tmp_path, rows("prompt"), data_collator=collator)
    close(left, right)
    same_gradient(gradient, other)


def test_accumulation_and_workers_change_nothing(folder: Path, tmp_path: Path) -> None:
    for weight in (2.0, "balanced"):
        settings = DistillSettings(loss="p-kl", kd_weight=weight, top_k=32)
        whole, gradient = step(folder, tmp_path, rows(), settings)
        cut, other = step(
            folder,
            tmp_path,
            rows(),
            settings,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            dataloader_num_workers=2,
        )
        close(cut, whole, "ce", "kd", "loss", "chunks", "kd_scale")
        same_gradient(gradient, other)


@pytest.mark.parametrize("own", ["dft", pytest.param("smoothed", marks=SMOOTHED), "tenfold"])
def test_the_balance_is_with_the_trainers_own_loss_however_a_batch_is_cut(
    folder: Path, tmp_path: Path, own: str
) -> None:
    losses: dict[str, dict[str, Any]] = {
        "dft": {"loss_type": "dft"},
        "smoothed": {"label_smoothing_factor": 0.3},
        "tenfold": {"compute_loss_func": tenfold},
    }
    settings = DistillSettings(loss="p-kl", top_k=32)
    named: dict[str, Any] = {"max_length": 48, **losses[own]}
    data = rows(texts=TEXTS[:4])
    whole, gradient = step(folder, tmp_path, data, settings, **named)
    named |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    cut, other = step(folder, tmp_path, data, settings, **named)
    close(cut, whole, "ce", "kd", "kd_scale", "loss")
    same_gradient(gradient, other)
    # TRL's own metrics count each micro-batch once.
    assert cut["num_tokens"] == whole["num_tokens"]


def tenfold(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Ten times the cross-entropy."""
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return 10 * loss / num_items_in_batch


@pytest.mark.parametrize("kind", OWN_HEADS)
def test_a_head_that_does_more_is_refused(
    folder: Path, tmp_path: Path, kind: type[torch.nn.Linear]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    give_head(model, kind)
    with pytest.raises(OptionError, match="LlamaForCausalLM does more to its logits than scale"):
        step(folder, tmp_path, rows(), model=model)


@pytest.mark.parametrize(("kind", "only"), [("prompt", "completion"), ("messages", "assistant")])
@pytest.mark.parametrize("packing", [False, True])
def test_only_completions_and_answers_are_distilled_where_that_is_asked_for(
    folder: Path, tmp_path: Path, kind: str, only: str, packing: bool
) -> None:
    part = {f"{only}_only_loss": True, "packing": packing}
    whole, _ = step(folder, tmp_path, rows(kind), **(part | {f"{only}_only_loss": False}))
    answers, gradient = step(folder, tmp_path, rows(kind), **part)
    assert 0.3 * whole["chunks"] < answers["chunks"] < 0.9 * whole["chunks"]
    # What stands before the answers is context and no more: other words, as many chunks.
    cut, other = step(
        folder,
        tmp_path,
        rows(kind),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=6,
        **(part | {"packing": False}),
    )
    close(cut, answers)
    same_gradient(gradient, other)


def test_a_conversation_is_printed_by_each_sides_own_template(folder: Path, tmp_path: Path) -> None:
    made: list[Trainer] = []

    class Kept(Trainer):
        def __init__(self, *given: Any, **named: Any) -> None:
            made.append(self)
            super().__init__(*given, **named)

    step(folder, tmp_path, rows("messages"), trainer=Kept, assistant_only_loss=True)
    row = made[0].train_dataset[0]
    teacher = AutoTokenizer.from_pretrained(folder / "teacher")
    printed = teacher.apply_chat_template(rows("messages")[0]["messages"], tokenize=False)
    assert printed.startswith(teacher.decode(row["teacher0_input_ids"][0]))
    assert teacher.decode(row["teacher0_input_ids"][0]).startswith("user: ")


def test_bf16_with_gradient_checkpointing_stays_near_float32(
    folder: Path, tmp_path: Path, padded: Step
) -> None:
    plain, _ = padded
    mixed, _ = step(folder, tmp_path, rows(), bf16=True, gradient_checkpointing=True)
    close(mixed, plain, "ce", "kd", "loss", rel=0.02)
    assert mixed["chunks"] == plain["chunks"]
    assert mixed["kd"] != plain["kd"]


def test_lora_trains_adapters_alone_on_the_same_losses(
    folder: Path, tmp_path: Path, padded: Step
) -> None:
    peft = pytest.importorskip("peft")
    plain, _ = padded
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    logged, gradient = step(folder, tmp_path, rows(), peft_config=adapters)
    close(logged, plain)  # fresh adapters change no output
    assert gradient
    assert all("lora" in name for name in gradient)
    assert any(float(value.abs().max()) > 0 for value in gradient.values())


def test_adapters_that_would_go_into_the_teacher_are_refused(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    teacher = Teacher(model, str(folder / "student"))
    settings = DistillSettings(loss="same-vocab-kl", top_k=None)
    with pytest.raises(OptionError, match=r"holds \d+ parameters of the student"):
        step(
            folder, tmp_path, rows(), settings, teachers=[teacher], model=model, peft_config=config
        )


def test_rows_that_are_tokenized_already_get_their_text_from_the_ids(
    folder: Path, tmp_path: Path, padded: Step
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS]
    from_texts, gradient = padded
    from_ids, other = step(folder, tmp_path, Dataset.from_dict({"input_ids": ids}))
    close(from_ids, from_texts)
    same_gradient(gradient, other)


def test_a_tokenized_stream_that_trl_leaves_as_it_is_is_distilled(
    folder: Path, tmp_path: Path, padded: Step
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    ids = [{"input_ids": tokenizer(text + tokenizer.eos_token)["input_ids"]} for text in TEXTS]
    data = IterableDataset.from_generator(lambda: iter(ids))
    logged, gradient = step(folder, tmp_path, data, dataset_kwargs={"skip_prepare_dataset": True})
    close(logged, padded[0])
    same_gradient(gradient, padded[1])


def test_two_teachers_are_weighted(folder: Path, tmp_path: Path) -> None:
    settings = DistillSettings(kd_weight=1.0, ce_weight=0.0, top_k=None)
    alone = [
        step(folder, tmp_path, rows(), settings, teachers=[Teacher(source, loss=loss)])[0]["kd"]
        for source, loss in (
            (str(folder / "teacher"), "prefix-kl"),
            (str(folder / "student"), "same-vocab-kl"),
        )
    ]
    both, _ = step(
        folder,
        tmp_path,
        rows(),
        settings,
        teachers=[
            Teacher(str(folder / "teacher"), loss="prefix-kl", weight=0.5),
            Teacher(str(folder / "student"), loss="same-vocab-kl", weight=2.0),
        ],
        packing=True,
    )
    assert both["kd"] == pytest.approx(0.5 * alone[0] + 2.0 * alone[1], rel=1e-4)


def test_a_store_teaches_packed_rows_what_the_live_teacher_does(
    folder: Path, tmp_path: Path
) -> None:
    settings = DistillSettings(loss="p-kl", kd_weight=2.0, top_k=None)
    live = LiveTeacher.from_pretrained(folder / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    pair = Pair(folder / "student", folder / "teacher")
    eos = tokenizer.eos_token_id
    store = TopKStore(tmp_path / "store", StoreKey(live.fingerprint, pair.sizes[1], "float32"))
    store.fill(live, [np.array([*tokenizer(text)["input_ids"], eos]) for text in TEXTS])
    first, gradient = step(folder, tmp_path, rows(), settings, packing=True)
    second, other = step(
        folder,
        tmp_path,
        rows(),
        settings,
        teachers=[Teacher(store, pair)],
        packing=True,
        dataset_num_proc=2,
    )
    close(second, first, rel=1e-3)
    same_gradient(gradient, other)


def test_exact_targets_of_stored_predictions_are_made_before_the_step_in_packed_rows_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("targets were made in the step")

    monkeypatch.setattr("xtoken.losses.exact_kl.loss.batch_targets", never)
    settings = DistillSettings(loss="exact-kl", kd_weight=2.0)
    live = LiveTeacher.from_pretrained(folder / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    pair = Pair(folder / "student", folder / "teacher")
    store = TopKStore(tmp_path / "store", StoreKey(live.fingerprint, 64, "float32"))
    eos = tokenizer.eos_token_id
    store.fill(live, [np.array([*tokenizer(text)["input_ids"], eos]) for text in TEXTS])
    teachers = [Teacher(store, pair)]
    first, gradient = step(folder, tmp_path, rows(), settings, teachers=teachers)
    second, other = step(folder, tmp_path, rows(), settings, teachers=teachers, packing=True)
    assert first["kd"] > 0.1
    close(second, first, "ce", "kd", "loss", "chunks")
    same_gradient(gradient, other)


@pytest.mark.parametrize("packing", [False, True])
def test_what_a_loss_would_ask_a_device_for_is_made_by_the_collator(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("prefixes were looked up in the step")

    # `xtoken.losses` has a function of the package's name.
    monkeypatch.setattr(sys.modules["xtoken.losses.prefix_kl.loss"], "prepare_prefixes", never)
    settings = DistillSettings(loss="prefix-kl")
    logged, _ = step(folder, tmp_path, rows(), settings, packing=packing)
    assert logged["kd"] > 0.1


def test_a_row_without_a_text_in_common_is_trained_on_and_not_distilled(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    special = [tokenizer.bos_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    ids = [tokenizer(text)["input_ids"] for text in TEXTS[:3]]
    for packing in (False, True):
        plain, _ = step(folder, tmp_path, Dataset.from_dict({"input_ids": ids}), packing=packing)
        more, _ = step(
            folder, tmp_path, Dataset.from_dict({"input_ids": [*ids, special]}), packing=packing
        )
        assert more["kd"] == pytest.approx(plain["kd"], rel=0.05)
        assert more["chunks"] <= plain["chunks"] + 1
        assert more["ce"] != plain["ce"]


def test_a_stream_is_packed_as_its_rows_are(folder: Path, tmp_path: Path) -> None:
    """TRL tokenizes text into columns of which a stream does not tell."""
    packed, gradient = step(folder, tmp_path, rows(), packing=True)
    streamed, other = step(folder, tmp_path, rows().to_iterable_dataset(), packing=True)
    close(streamed, packed)
    same_gradient(gradient, other)


def test_packing_that_cuts_documents_is_refused(folder: Path, tmp_path: Path) -> None:
    for strategy in ("wrapped", "bfd_split"):
        with pytest.raises(OptionError, match=rf"packing_strategy = '{strategy}' cuts documents"):
            step(folder, tmp_path, rows(), packing=True, packing_strategy=strategy)


def test_evaluation_is_trls_own_and_asks_no_teacher(folder: Path, tmp_path: Path) -> None:
    made = Trainer(
        AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32),
        args=trl.SFTConfig(
            str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True
        ),
        train_dataset=rows(),
        eval_dataset=rows(),
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
        teachers=str(folder / "teacher"),
    )
    before = made.teaching.sources[0].tokens_computed
    assert made.evaluate()["eval_loss"] == pytest.approx(reference(folder, "text")["ce"], rel=0.02)
    assert made.teaching.sources[0].tokens_computed == before


def test_a_resumed_run_gives_the_student_of_an_uninterrupted_one(
    folder: Path, tmp_path: Path
) -> None:
    students = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        made = Trainer(
            AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32),
            args=trl.SFTConfig(
                str(tmp_path),
                max_steps=4,
                save_strategy="steps",
                save_steps=2,
                per_device_train_batch_size=2,
                packing=True,
                max_length=256,
                report_to="none",
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                dataloader_pin_memory=False,
                learning_rate=1e-3,
            ),
            train_dataset=rows(),
            processing_class=AutoTokenizer.from_pretrained(folder / "student"),
            teachers=str(folder / "teacher"),
        )
        made.train(resume_from_checkpoint=resume)
        students.append(made.model.state_dict())
    for name, value in students[0].items():
        assert torch.equal(students[1][name], value), name


def test_the_students_tokenizer_and_checkpoints_are_saved_as_trl_does(
    folder: Path, tmp_path: Path
) -> None:
    step(folder, tmp_path, rows(), save_strategy="steps", save_steps=1)
    saved = tmp_path / "checkpoint-1"
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == 1
    assert len(AutoTokenizer.from_pretrained(saved)) == len(
        AutoTokenizer.from_pretrained(folder / "student")
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_a_row_is_learned_from_the_teachers_that_its_column_names(
    folder: Path, tmp_path: Path, packing: bool, stored: bool
) -> None:
    """The gradient is the sum of each teacher's own on the rows that name it."""
    names = ["digit", ["word"], None, "word", ["digit", "word"], "digit"]
    data = Dataset.from_list(
        [
            {"text": text, "for": [name] if isinstance(name, str) else name}
            for text, name in zip(TEXTS, names, strict=True)
        ]
    )
    chunks = []
    sources: dict[str, Any] = {"digit": str(folder / "teacher"), "word": str(folder / "student")}
    if stored:
        live = LiveTeacher.from_pretrained(folder / "teacher")
        tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
        pair = Pair(folder / "student", folder / "teacher")
        store = TopKStore(tmp_path / "store", StoreKey(live.fingerprint, pair.sizes[1], "float32"))
        eos = tokenizer.eos_token_id
        own = [TEXTS[at] for at in (0, 2, 4, 5)]
        store.fill(live, [np.array([*tokenizer(text)["input_ids"], eos]) for text in own])
        sources["digit"] = store
    tokenizers = {"digit": str(folder / "teacher"), "word": str(folder / "student")}
    losses = {"digit": "p-kl", "word": "same-vocab-kl"}

    def run(rows_of: Dataset, used: list[str], **settings: Any) -> Any:
        found, gradient = step(
            folder, tmp_path, rows_of,
            DistillSettings(kd_weight=1.0, ce_weight=0.0, top_k=None, **settings),
            teachers=[
                Teacher(sources[name], tokenizers[name], loss=losses[name], name=name)
                for name in used
            ],
            packing=packing,
        )  # fmt: skip
        chunks.append(found["chunks"])
        return found["kd"], gradient

    both, gradient = run(data, ["digit", "word"], teacher_column="for")
    parts = [run(data.select([0, 2, 4, 5]), ["digit"]), run(data.select([1, 2, 3, 4]), ["word"])]
    assert chunks[0] == chunks[1] + chunks[2]
    assert both == pytest.approx(parts[0][0] + parts[1][0], rel=1e-4)
    summed = {name: parts[0][1][name] + parts[1][1][name] for name in gradient}
    same_gradient(summed, gradient)


def test_a_name_that_no_teacher_has_ends_the_preparation(folder: Path, tmp_path: Path) -> None:
    data = Dataset.from_list([{"text": text, "for": "nobody"} for text in TEXTS])
    settings = DistillSettings(teacher_column="for", loss="p-kl")
    with pytest.raises(DataError, match="column 'for' names 'nobody', expected one of teacher"):
        step(folder, tmp_path, data, settings)


@pytest.mark.parametrize("stream", [False, True])
def test_a_column_that_no_row_has_ends_the_preparation(
    folder: Path, tmp_path: Path, stream: bool
) -> None:
    data = Dataset.from_list([{"text": text, "for": "teacher"} for text in TEXTS])
    settings = DistillSettings(teacher_column="fro", loss="p-kl")
    with pytest.raises(OptionError, match=r"teacher_column = 'fro', but no row has a column"):
        step(folder, tmp_path, data.to_iterable_dataset() if stream else data, settings)


@pytest.mark.parametrize(
    ("setting", "own"),
    [
        ({"max_tokens": 16}, "max_length"),
        ({"padding_side": "left"}, "tokenizer.padding_side"),
        ({"pad_multiple": 64}, "pad_to_multiple_of"),
        ({"dataset_num_proc": 2}, "SFTConfig: dataset_num_proc"),
        ({"fused": False}, "the head is distilled"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(
    folder: Path, tmp_path: Path, setting: dict[str, Any], own: str
) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(setting))} = .*{own}"):
        step(folder, tmp_path, rows(), DistillSettings(loss="p-kl", **setting))


def test_a_served_teacher_is_asked_for_the_documents_of_packed_rows(
    folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    pair = Pair(folder / "student", folder / "teacher")
    options = {"packing": True, "max_steps": 2, "per_device_train_batch_size": 1}
    data = Dataset.from_dict({"text": tiny_texts(12)})
    live, gradient = step(folder, tmp_path, data, **options)
    with (
        ServedModel(model, "sglang") as server,
        ServedTeacher(
            server.url, vocab=pair.teacher_tokenizer, top_k=len(pair.teacher_vocab)
        ) as teacher,
    ):
        _ = teacher.question
        server.asked.clear()
        served, other = step(folder, tmp_path, data, teachers=[Teacher(teacher, pair)], **options)
        assert set(server.asked.values()) == {1}
        assert len(server.asked) > 2  # more documents than rows
    close(served, live)
    same_gradient(other, gradient)


def test_a_teacher_with_the_students_tokenizer_reads_the_students_ids(
    folder: Path, tmp_path: Path
) -> None:
    """Ids that no tokenizer would make of their text, and special tokens within it, stay."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    text = "the value of the variable"
    odd = [tokenizer.convert_tokens_to_ids(each) for each in ("t", "h", "e")]
    rows = [
        odd + tokenizer(text)["input_ids"],
        [*tokenizer(text)["input_ids"], tokenizer.eos_token_id, *odd],
    ]
    assert tokenizer(tokenizer.decode(rows[0]))["input_ids"] != rows[0]
    data = Dataset.from_dict({"input_ids": rows})
    seen: list[Any] = []

    class Kept(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
            seen.append(inputs["teacher_side"])
            return super().compute_loss(model, inputs, *more, **named)

    settings = DistillSettings(loss="same-vocab-kl", kd_weight=1.0)
    logged, _ = step(folder, tmp_path, data, settings, Kept, teachers=str(folder / "student"))
    (side,) = seen
    lengths = side.teacher["attention_mask"].sum(1).tolist()
    found = [
        row[:end].tolist() for row, end in zip(side.teacher["input_ids"], lengths, strict=True)
    ]
    assert sorted(found) == sorted(rows)
    assert logged["kd"] == pytest.approx(0, abs=1e-6)  # the same model on the same tokens
    assert logged["chunks"] == sum(len(row) - 1 for row in rows)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_have_nothing_in_common_with_the_teacher_are_counted_and_named(
    folder: Path, tmp_path: Path, packing: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    made = [tokenizer(text)["input_ids"] for text in tiny_texts(4)]
    pairs = [Pair(folder / "student", folder / "teacher")]
    data = add_teacher_side(Dataset.from_dict({"input_ids": made}), pairs)
    other = [100] * 5
    data = data.add_item(data[0] | {
        "input_ids": other, "teacher0_input_ids": [[7, 7]],
        "teacher0_student_bounds": [[0, 1, 2, 3, 4, 5, 5, 5]],
        "teacher0_teacher_bounds": [[0, 0, 0, 0, 0, 0, 1, 2]],
        "teacher0_chunk_kinds": [[2, 2, 2, 2, 2, 3, 3]],
        "teacher0_byte_counts": [[5, 2, 0, 0]],
    })  # fmt: skip
    with pytest.warns(UserWarning, match="a row is not distilled") as caught:
        logged, _ = step(
            folder, tmp_path, data, packing=packing, per_device_train_batch_size=8, max_length=256
        )
    assert logged["rows_not_distilled"] == 1
    (told,) = [each for each in caught if "not distilled" in str(each.message)]
    begin = tokenizer.decode(other)
    assert f"it begins {begin!r}" in str(told.message)
    whole, _ = step(folder, tmp_path, data.select(range(4)), packing=packing)
    assert "rows_not_distilled" not in whole
