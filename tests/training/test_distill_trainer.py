"""The trainer as people use it: their model and dataset, Trainer's own features, several teachers,
a learnable W, and the student's logits never made."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from own_heads import OWN_HEADS, Gaining, Growing, give_head
from tiny_models import tiny_texts
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import HPSearchBackend

from xtoken import Pair
from xtoken.data import load_rows
from xtoken.errors import (
    ArgumentTypeError,
    DataError,
    NonFiniteError,
    OptionError,
    PairError,
    TokenIdError,
)
from xtoken.projection import Projection
from xtoken.teachers import LiveTeacher
from xtoken.training import DistillArguments, DistillTrainer, Teacher
from xtoken.training.fixed_settings import SETTINGS_FILE

TEXTS = tiny_texts(16)
SIDES = ("student", "teacher")


class Watch(TrainerCallback):
    """Keeps the gradient of a step, and the widest logits that the student made."""

    def __init__(self) -> None:
        self.gradient: dict[str, torch.Tensor] = {}
        self.positions = 0

    def see(self, model: nn.Module) -> None:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.positions = max(self.positions, output.logits.shape[1])

        model.register_forward_hook(keep)

    def on_pre_optimizer_step(self, args, state, control, model: nn.Module, **_) -> None:
        self.gradient = {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


def student_of(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)


def arguments(out: Path, **changed: Any) -> DistillArguments:
    options: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "max_grad_norm": 1e9,
        "max_tokens": 64,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "top_k": 32,
    }
    return DistillArguments(str(out), **(options | changed))


def make(folder: Path, out: Path, model: nn.Module | None = None, **given: Any) -> DistillTrainer:
    options = given.pop("options", {})
    if alone := options.get("loss") == "ce":
        options = {"top_k": None, **options}
    named: dict[str, Any] = {
        "teachers": None if alone else [str(folder / "teacher")],
        "train_dataset": TEXTS,
        "processing_class": AutoTokenizer.from_pretrained(folder / "student"),
    }
    return DistillTrainer(model or student_of(folder), arguments(out, **options), **(named | given))


def logged(trainer: DistillTrainer) -> list[dict[str, float]]:
    return [each for each in trainer.state.log_history if "ce" in each]


def test_two_objects_train_an_own_model_on_an_own_dataset(folder: Path, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    trainer = DistillTrainer(
        student_of(folder), args, teachers=str(folder / "teacher"), train_dataset=TEXTS
    )
    trainer.train()
    for record in logged(trainer):
        assert record["loss"] == pytest.approx(
            record["ce"] + record["kd_scale"] * record["kd"], rel=1e-4
        )
        assert {"teacher_mass", "coverage", "chunks", "grad_norm"} <= record.keys()
        assert 0 < record["coverage"] <= 1


@pytest.mark.parametrize("kind", ["texts", "dataset", "stream", "rows"])
def test_datasets_are_taken_as_they_come(folder: Path, tmp_path: Path, kind: str) -> None:
    rows = Dataset.from_dict({"text": TEXTS})
    found = {
        "texts": TEXTS,
        "dataset": rows,
        "stream": rows.to_iterable_dataset(),
        "rows": [{"text": text} for text in TEXTS],
    }[kind]
    options = {"max_steps": 1, "per_device_train_batch_size": 16}
    workers = {"dataloader_num_workers": 2} if kind in ("stream", "rows") else {}
    trainer = make(folder, tmp_path, train_dataset=found, options=options | workers)
    trainer.train()
    whole = make(folder, tmp_path, options=options)
    whole.train()
    for name in ("ce", "kd", "chunks"):
        assert logged(trainer)[0][name] == pytest.approx(logged(whole)[0][name], rel=1e-5)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rows_beyond_the_positions_of_a_model_are_refused(
    folder: Path, tmp_path: Path, side: str
) -> None:
    """As `xtoken distill` refuses them: what a model says beyond its positions is noise."""
    student = student_of(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    model = student if side == "student" else teacher
    model.config.max_position_embeddings = 24
    named = Teacher(teacher, tokenizer=str(folder / "teacher"))
    trainer = make(folder, tmp_path, student, teachers=[named])
    with pytest.raises(OptionError, match=r"a row of \d+ tokens, but the \w+ has 24 positions"):
        trainer.train()
    within = make(
        folder, tmp_path, student, teachers=[named], options={"max_tokens": 24, "max_steps": 1}
    )
    within.train()


@pytest.mark.filterwarnings("ignore:.*count as unused")
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_token_that_a_model_has_no_row_for_is_refused_in_one_line(
    folder: Path, tmp_path: Path, side: str
) -> None:
    """Torch says "index out of range in self", which names neither the token nor the side."""
    student = student_of(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    named = Teacher(teacher, tokenizer=str(folder / "teacher"))
    model = student if side == "student" else teacher
    tokenizer = AutoTokenizer.from_pretrained(folder / side)
    rows = len(tokenizer) - 1
    model.resize_token_embeddings(rows)
    without = [text for text in TEXTS if rows not in tokenizer(text)["input_ids"]]
    holding = [f"{tokenizer.decode([rows])} {text}" for text in without]
    assert rows in tokenizer(holding[0])["input_ids"]
    trainer = make(folder, tmp_path, student, teachers=[named], train_dataset=holding)
    with pytest.raises(
        TokenIdError, match=rf"holds token {rows}, but the {side}'s embedding has {rows} rows; call"
    ):
        trainer.train()
    make(
        folder, tmp_path, student, teachers=[named], train_dataset=without,
        options={"max_steps": 1},
    ).train()  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*count as unused")
def test_a_padding_token_that_was_added_without_a_row_changes_nothing(
    folder: Path, tmp_path: Path
) -> None:
    losses = []
    for added in (False, True):
        tokenizers = [AutoTokenizer.from_pretrained(folder / side) for side in SIDES]
        for tokenizer in tokenizers:
            if added:
                tokenizer.add_special_tokens({"pad_token": "<added>"})
                assert tokenizer.pad_token_id == len(tokenizer) - 1
        pair = Pair(*tokenizers, cache_dir=False)
        teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
        options = {"on_policy_fraction": 0.5, "on_policy_max_new_tokens": 8}
        trainer = make(
            folder, tmp_path, teachers=[Teacher(teacher, tokenizer=pair)], options=options,
            processing_class=tokenizers[0],
        )  # fmt: skip
        trainer.train()
        losses += [[each[name] for each in logged(trainer) for name in ("ce", "kd")]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_narrow_head_is_balanced_beside_the_trainers_own_loss(
    folder: Path, tmp_path: Path
) -> None:
    """The last token has no column; no text holds it."""
    student = student_of(folder)
    student.resize_token_embeddings(student.config.vocab_size - 1)
    options = {
        "label_smoothing_factor": 0.1, "kd_weight": "balanced", "gradient_accumulation_steps": 2,
        "max_steps": 1, "max_tokens": 40,
    }  # fmt: skip
    trainer = make(folder, tmp_path, student, options=options)
    with pytest.warns(UserWarning, match="count as unused"):
        trainer.train()
    (record,) = logged(trainer)
    assert 0 < record["kd_scale"] < 100


def test_smoothed_labels_are_those_that_follow_whatever_the_student_is_called(
    folder: Path, tmp_path: Path
) -> None:
    losses = []
    for renamed in (False, True):
        student = student_of(folder)
        if renamed:
            student.__class__ = type("MyStudent", (type(student),), {})
        options = {"label_smoothing_factor": 0.1, "max_steps": 1}
        trainer = make(folder, tmp_path, student, options=options)
        trainer.train()
        losses.append(logged(trainer)[0]["ce"])
    assert losses[0] == losses[1]


SMOOTHED = pytest.mark.skipif(
    "num_items_in_batch" not in inspect.signature(LabelSmoother.__call__).parameters,
    reason="older transformers smooths by means of micro-batches",
)


def tenfold(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Ten times the cross-entropy."""
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return 10 * nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("options", "named"),
    [
        pytest.param({"label_smoothing_factor": 0.3}, {}, marks=SMOOTHED),
        ({}, {"compute_loss_func": tenfold}),
    ],
)
def test_the_balance_is_with_a_loss_of_ones_own_however_a_batch_is_cut(
    folder: Path, tmp_path: Path, options: dict[str, Any], named: dict[str, Any]
) -> None:
    def run(rows: int) -> dict[str, float]:
        size = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 4 // rows}
        trainer = make(
            folder, tmp_path, train_dataset=TEXTS[:4], **named,
            options={"max_steps": 1, **options, **size},
        )  # fmt: skip
        trainer.train()
        return logged(trainer)[0]

    whole, cut = run(4), run(1)
    for key in ("ce", "kd", "kd_scale", "loss", "grad_norm"):
        assert cut[key] == pytest.approx(whole[key], rel=1e-4)


def test_of_a_prompt_and_its_completion_the_completion_counts(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": text[:60], "completion": text[60:]} for text in TEXTS]
    trainer = make(folder, tmp_path, train_dataset=rows)
    for row, text in zip(rows, TEXTS, strict=True):
        example = trainer.teaching.examples(row)[0][0]
        whole = trainer.teaching.examples(text)[0][0]
        assert np.array_equal(example.student_ids, whole.student_ids)
        pair = trainer.teaching.first.pair
        for side, ids, mask in (
            (pair.student, example.student_ids, example.student_loss_mask),
            (pair.teacher, example.teacher_ids, example.teacher_loss_mask),
        ):
            start = int(mask.argmax())
            assert mask[start:].all()
            spelled = b"".join(side.vocab.token_bytes(int(token)) for token in ids[:start])
            assert text[:60].startswith(spelled.decode().removeprefix("<|begin_of_text|>"))
            assert len(spelled) > 45
    trainer.train()


def test_rows_that_cannot_be_used_are_counted_and_named(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS[:3]] + [{"messages": []}, {"messages": []}]
    with pytest.warns(UserWarning, match="2 of 5 rows are left out; the first, row 3: "):
        trainer = make(folder, tmp_path, train_dataset=rows)
    assert len(trainer.train_dataset) == 3
    with pytest.raises(DataError, match="none of the 1 rows can be used"):
        make(folder, tmp_path, train_dataset=rows[3:4])


def test_rows_of_a_stream_that_cannot_be_used_are_counted_in_the_log(
    folder: Path, tmp_path: Path
) -> None:
    """They would end a long run; where a batch has no other, it counts nothing."""
    good = [{"text": text} for text in TEXTS[:4]]
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    rows = Dataset.from_list([*good[:3], {"text": " "}, {"text": None}, {"text": ""}])
    trainer = make(folder, tmp_path, train_dataset=rows.to_iterable_dataset(), options=options)
    with pytest.warns(UserWarning, match="a row is left out, and others like it will be"):
        trainer.train()
    (found,) = logged(trainer)
    assert found["rows_left_out"] == 3
    alone = make(
        folder, tmp_path, train_dataset=good[:3],
        options={"max_steps": 1, "per_device_train_batch_size": 3},
    )  # fmt: skip
    alone.train()
    (expected,) = logged(alone)
    assert "rows_left_out" not in expected
    for name in ("ce", "kd", "loss", "chunks", "coverage", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    none = Dataset.from_list([{"body": "a"}] * 200).to_iterable_dataset()
    trainer = make(folder, tmp_path, train_dataset=none, options={"max_steps": 100})
    with (
        pytest.warns(UserWarning, match="a row is left out"),
        pytest.raises(DataError, match=r"none of the first 100 rows can be used: .*'text'"),
    ):
        trainer.train()


def test_a_dataset_is_tokenized_once_and_kept_for_later_runs_and_other_processes(
    folder: Path, tmp_path: Path
) -> None:
    Dataset.from_dict({"text": TEXTS, "number": range(16)}).save_to_disk(tmp_path / "rows")
    before = set((tmp_path / "rows").glob("*.arrow"))
    found = []
    for _ in range(2):
        dataset = load_rows(tmp_path / "rows")
        trainer = make(
            folder, tmp_path, train_dataset=dataset,
            options={"max_steps": 1, "dataset_num_proc": 2},
        )  # fmt: skip
        trainer.train()
        made = set((tmp_path / "rows").glob("*.arrow")) - before
        found.append({path: path.stat().st_mtime_ns for path in made})
        (record,) = logged(trainer)
    assert len(found[0]) == 2
    assert found[1] == found[0]
    whole = make(folder, tmp_path, options={"max_steps": 1})
    whole.train()
    assert logged(whole)[0]["loss"] == record["loss"]
    other = make(folder, tmp_path, train_dataset=dataset, options={"max_tokens": 20})
    assert max(len(row["input_ids"]) for row in other.train_dataset) <= 20


def test_what_is_logged_is_seen_by_tensorboard(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"report_to": "tensorboard", "max_steps": 4, "logging_steps": 2}
    trainer = make(folder, tmp_path, options=options)
    trainer.train()
    (log,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(log)).Reload()
    for name in ("loss", "ce", "kd", "kd_scale", "teacher_mass", "coverage"):
        seen = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        expected = [(each["step"], each[name]) for each in logged(trainer)]
        assert [step for step, _ in expected] == [2, 4]
        for mine, other in zip(seen, expected, strict=True):
            assert mine == pytest.approx(other, rel=1e-6)


def test_an_evaluation_before_training_is_logged_beside_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    rows = tiny_texts(2)
    options = {"report_to": "tensorboard", "max_steps": 1}
    trainer = make(folder, tmp_path / "out", eval_dataset=rows, options=options)
    trainer.evaluate()
    trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len({path.parent for path in tmp_path.rglob("events.out.tfevents.*")}) == 1


def test_a_hub_that_cannot_be_reached_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = {"push_to_hub": True, "hub_model_id": "owner/student"}
    with pytest.raises(OptionError, match="push_to_hub = True, but the hub refuses") as raised:
        make(folder, tmp_path, options=options)
    assert "\n" not in str(raised.value)


def test_tokenized_rows_train_as_their_texts_do(folder: Path, tmp_path: Path) -> None:
    pair = Pair(folder / "student", folder / "teacher")
    texts = Dataset.from_dict({"text": [*TEXTS, " "]})
    rows = texts.map(
        pair.tokenize, batched=True, remove_columns=["text"], fn_kwargs={"max_tokens": 64}
    )
    options = {"max_steps": 2, "train_sampling_strategy": "group_by_length"}
    trained = []
    for dataset in (rows, TEXTS):
        if dataset is rows:
            with pytest.warns(UserWarning, match="1 of 17 rows are left out; the first, row 16"):
                trainer = make(folder, tmp_path, train_dataset=rows, options=options)
        else:
            trainer = make(folder, tmp_path, train_dataset=TEXTS, options=options)
        trainer.train()
        trained.append(logged(trainer))
    for found, expected in zip(*trained, strict=True):
        assert found["loss"] == expected["loss"]
        assert found["grad_norm"] == expected["grad_norm"]
    stream = rows.filter(lambda row: not row["left_out"]).to_iterable_dataset()
    make(folder, tmp_path, train_dataset=stream, options={"max_steps": 1}).train()
    both = [str(folder / "teacher"), Teacher(str(folder / "student"), loss="same-vocab-kl")]
    with pytest.raises(TypeError, match=r"rows of Pair\.tokenize have one teacher; pass texts or"):
        make(folder, tmp_path, train_dataset=rows, teachers=both)


def test_what_trainer_does_works_here(folder: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            seen.append(state.global_step)

    trainer = make(
        folder,
        tmp_path,
        eval_dataset=TEXTS[:4],
        callbacks=[Count()],
        compute_metrics=lambda found: {"positions": float(np.prod(found.label_ids.shape))},
        options={
            "max_steps": 4,
            "train_sampling_strategy": "group_by_length",
            "neftune_noise_alpha": 5.0,
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "dataloader_num_workers": 2,
            "gradient_accumulation_steps": 2,
        },
    )
    trainer.train()
    assert seen == [1, 2, 3, 4]
    assert trainer.state.best_metric is not None
    assert len(list(tmp_path.glob("checkpoint-*"))) <= 2
    scores = [each for each in trainer.state.log_history if "eval_loss" in each]
    assert len(scores) == 2
    for score in scores:
        assert {"eval_bits_per_byte", "eval_positions"} <= score.keys()
    assert trainer.state.best_metric == min(each["eval_loss"] for each in scores)


def test_optimizers_of_ones_own_are_used(folder: Path, tmp_path: Path) -> None:
    model = student_of(folder)
    before = copy.deepcopy(model.state_dict())
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(still, lambda step: 1.0)
    trainer = make(folder, tmp_path, model, optimizers=(still, schedule))
    trainer.train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---- The fused path ----


def gradient(
    folder: Path, out: Path, model: nn.Module, **options: Any
) -> tuple[Watch, dict[str, float]]:
    watch = Watch()
    watch.see(model)
    trainer = make(folder, out, model, callbacks=[watch], options={"max_steps": 1, **options})
    trainer.train()
    return watch, logged(trainer)[0]


def family(name: str, vocab: int) -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    if name == "gemma2":  # tied, logits capped
        capped = Gemma2Config(**sizes, head_dim=16, final_logit_softcapping=0.3)
        return Gemma2ForCausalLM(capped)
    if name == "recurrent gemma":  # capped by another name
        del sizes["num_key_value_heads"]
        sizes |= {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64}
        return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes, logits_soft_cap=0.05))
    if name == "cohere":  # tied, logits scaled up or down
        return CohereForCausalLM(CohereConfig(**sizes, logit_scale=3.0))
    return GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=0.25))


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("loss", ["p-kl", "prefix-kl", "exact-kl"])
def test_without_logits_the_gradient_is_the_same(
    folder: Path, tmp_path: Path, name: str, loss: str
) -> None:
    pair = Pair(folder / "student", folder / "teacher")
    found = []
    for fused in (False, True):
        model = student_of(folder) if name == "llama" else family(name, pair.sizes[0])
        found.append(gradient(folder, tmp_path, model, fused=fused, loss=loss))
    (plain, values), (without, others) = found
    assert plain.positions > 2
    assert without.positions == 2  # the model's own logits of the last position, to compare
    for key in ("ce", "kd", "loss"):
        assert others[key] == pytest.approx(values[key], rel=1e-4)
    assert plain.gradient.keys() == without.gradient.keys()
    scale = max(float(value.abs().max()) for value in plain.gradient.values())
    for key, value in plain.gradient.items():
        torch.testing.assert_close(
            without.gradient[key], value, rtol=1e-3, atol=1e-5 * scale, msg=key
        )


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_train_on_the_same_losses_with_and_without_logits(
    folder: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(student_of(folder), config)
        found.append(gradient(folder, tmp_path, model, fused=fused))
    assert found[1][0].positions == 2
    assert found[1][1]["loss"] == pytest.approx(found[0][1]["loss"], rel=1e-4)
    assert all("lora" in name for name in found[1][0].gradient)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 8), reason="an older torch.compile"
)
def test_a_compiled_student_trains_without_logits(folder: Path, tmp_path: Path) -> None:
    options = {"fused": True, "learning_rate": 1e-2, "warmup_steps": 0}
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    found = []
    for more in ({}, compiled):
        trainer = make(folder, tmp_path, options=options | more)
        trainer.train()
        found.append([each[key] for each in logged(trainer) for key in ("ce", "kd", "grad_norm")])
    assert len(found[1]) == 6
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("more", [{"fused": True}, {"label_smoothing_factor": 0.1}])
def test_a_student_that_is_made_anew_in_each_run_has_its_own_head(
    folder: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    trainer = DistillTrainer(
        None,
        arguments(tmp_path, max_steps=1, **more),
        model_init=lambda: student_of(folder),
        teachers=[str(folder / "teacher")],
        train_dataset=TEXTS,
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
    )
    found = []
    for _ in range(2):
        trainer.train()
        (record,) = logged(trainer)
        found.append(record)
    for key in ("ce", "kd", "grad_norm"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-6)


def test_a_cap_is_read_beside_a_loss_of_the_trainers_own(folder: Path, tmp_path: Path) -> None:
    vocab = Pair(folder / "student", folder / "teacher").sizes[0]
    _, plain = gradient(folder, tmp_path, family("recurrent gemma", vocab), kd_weight=1.0)
    _, beside = gradient(
        folder, tmp_path, family("recurrent gemma", vocab), kd_weight=1.0,
        label_smoothing_factor=1e-9,
    )  # fmt: skip
    for key in ("ce", "kd", "loss"):
        assert beside[key] == pytest.approx(plain[key], rel=1e-4)


@pytest.mark.parametrize("kind", OWN_HEADS)
def test_a_head_that_does_more_is_refused_by_name_or_makes_its_logits(
    folder: Path, tmp_path: Path, kind: type[nn.Linear]
) -> None:
    model = student_of(folder)
    give_head(model, kind)
    with pytest.raises(OptionError, match="LlamaForCausalLM does more to its logits than scale"):
        gradient(folder, tmp_path, model, fused=True)
    watch, _ = gradient(folder, tmp_path, model, fused="auto")
    assert watch.positions > 2


@pytest.mark.parametrize("kind", OWN_HEADS)
def test_a_head_that_does_more_is_refused_beside_a_loss_of_the_trainers_own(
    folder: Path, tmp_path: Path, kind: type[nn.Linear]
) -> None:
    model = student_of(folder)
    give_head(model, kind)
    with pytest.raises(OptionError, match="leave out label_smoothing_factor"):
        gradient(folder, tmp_path, model, label_smoothing_factor=0.1)


@pytest.mark.parametrize("where", ["head", "model"])
def test_a_part_behind_the_logits_that_changes_nothing_as_yet_is_trained(
    folder: Path, tmp_path: Path, where: str
) -> None:
    model = student_of(folder)
    if where == "head":
        give_head(model, Growing)
        part = model.lm_head.more
    else:
        plain, model = model, Gaining(model.config)
        model.load_state_dict(plain.state_dict(), strict=False)
        part = model.more
    before = part.detach().clone()
    with pytest.raises(OptionError, match="more, which is neither in its decoder nor its lm_head"):
        gradient(folder, tmp_path, model, fused=True)
    with pytest.raises(OptionError, match="leave out label_smoothing_factor"):
        gradient(folder, tmp_path, model, label_smoothing_factor=0.1)
    gradient(folder, tmp_path, model, fused="auto", max_steps=2)  # the first is all warm-up
    assert not torch.equal(part.detach(), before)


def test_an_unknown_name_of_a_dataset_is_refused(folder: Path, tmp_path: Path) -> None:
    for given, known in ((TEXTS, "a dataset"), ({"own": TEXTS}, r"one of \['own'\]")):
        trainer = make(folder, tmp_path, eval_dataset=given)
        with pytest.raises(OptionError, match=f"eval_dataset = 'other', expected {known}"):
            trainer.evaluate("other")
    assert "eval_own_loss" in trainer.evaluate("own")


def test_the_check_of_the_head_leaves_dropout_as_it_was(folder: Path, tmp_path: Path) -> None:
    found = []
    for checked in (False, True):
        model = student_of(folder)
        model.config.attention_dropout = 0.2
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.2
        options = {"max_steps": 1, "label_smoothing_factor": 0.1}
        trainer = make(folder, tmp_path, model, options=options)
        trainer._usable_head(model)
        trainer._head_checked = checked
        trainer.train()
        found.append(logged(trainer)[0]["loss"])
    assert found[0] == found[1]


# ---- Mixtures of experts ----


def experts(name: str, vocab: int) -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
        "max_position_embeddings": 256, "output_router_logits": True, "router_aux_loss_coef": 10.0,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    if name == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4))
    config = Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=32, head_dim=16)
    return Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
def test_routers_are_trained_as_by_the_models_own_loss(
    folder: Path, tmp_path: Path, name: str, fused: bool
) -> None:
    model = experts(name, Pair(folder / "student", folder / "teacher").sizes[0])
    watch, own = Watch(), copy.deepcopy(model)
    trainer = make(
        folder, tmp_path, model, teachers=(), train_dataset=TEXTS[:4], callbacks=[watch],
        options={"loss": "ce", "max_steps": 1, "fused": fused},
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    trainer.train()
    (record,) = logged(trainer)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    output = own(**inputs)
    output.loss.backward()
    assert record["aux_loss"] == pytest.approx(output.aux_loss.item(), rel=1e-4)
    assert record["loss"] == pytest.approx(output.loss.item(), rel=1e-4)
    assert record["loss"] == pytest.approx(record["ce"] + 10 * record["aux_loss"], rel=1e-4)
    for key, parameter in own.named_parameters():
        torch.testing.assert_close(
            watch.gradient[key], parameter.grad, rtol=1e-3, atol=1e-5, msg=key
        )


def test_the_loss_of_routers_is_a_mean_over_micro_batches(folder: Path, tmp_path: Path) -> None:
    vocab = Pair(folder / "student", folder / "teacher").sizes[0]
    found = []
    for rows in (4, 1):
        size = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 4 // rows}
        trainer = make(
            folder, tmp_path, experts("mixtral", vocab), train_dataset=TEXTS[:4],
            options={"max_steps": 1, **size},
        )  # fmt: skip
        trainer.train()
        (record,) = logged(trainer)
        weighed = record["kd_scale"] * record["kd"] + 10 * record["aux_loss"]
        assert record["loss"] == pytest.approx(record["ce"] + weighed, rel=1e-4)
        found.append(record)
    assert found[1]["kd_scale"] == pytest.approx(found[0]["kd_scale"], rel=1e-4)
    assert found[1]["aux_loss"] == pytest.approx(found[0]["aux_loss"], rel=0.1)


class Unweighed(LlamaForCausalLM):
    """A model of one's own whose config says nothing of its routers."""

    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output["aux_loss"] = self.lm_head.weight.sum()
        return output


def test_a_loss_of_routers_that_cannot_be_had_is_refused(folder: Path, tmp_path: Path) -> None:
    student = student_of(folder)
    student.config.output_router_logits = True
    with pytest.raises(OptionError, match="LlamaForCausalLM returns no aux_loss to train"):
        gradient(folder, tmp_path, student)
    student = Unweighed.from_pretrained(folder / "student", dtype=torch.float32)
    with pytest.raises(OptionError, match="its config says its weight"):
        gradient(folder, tmp_path, student)


# ---- Several teachers, and what they are ----


def test_teachers_are_taken_as_paths_models_and_live_ones(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    records = []
    for teacher in (
        str(folder / "teacher"),
        model,
        LiveTeacher(model),
        Teacher(LiveTeacher(model), tokenizer),
        Teacher(model, Pair(folder / "student", folder / "teacher")),
    ):
        trainer = make(folder, tmp_path, teachers=[teacher], options={"max_steps": 1})
        trainer.train()
        records.append(logged(trainer)[0]["kd"])
    assert max(records) == pytest.approx(min(records), rel=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_teacher_of_the_students_own_parameters_is_refused(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = student_of(folder)
    teacher = Teacher(model, str(folder / "student"))
    options = {"loss": "same-vocab-kl", "top_k": None, "learning_rate": 1e-2, "warmup_steps": 0}
    refused = r"the teacher LlamaForCausalLM holds \d+ parameters of the student itself"
    with pytest.raises(OptionError, match=refused):
        make(folder, tmp_path, model, teachers=[teacher], options=options)
    student = student_of(folder)
    student.model.embed_tokens.weight = model.model.embed_tokens.weight
    with pytest.raises(OptionError, match="holds 1 parameters"):
        make(folder, tmp_path, student, teachers=[teacher], options=options)
    # Adapters over frozen weights that the teacher holds too leave the teacher as it is.
    same = {id(parameter): parameter for parameter in model.parameters()}
    adapted = peft.get_peft_model(copy.deepcopy(model, same), config)
    trainer = make(folder, tmp_path, adapted, teachers=[teacher], options=options)
    trainer.train()
    first, second = logged(trainer)
    assert first["kd"] == pytest.approx(0, abs=1e-6)
    assert second["kd"] > 1e-5
    # Put into the model itself, they are the teacher's.
    with pytest.raises(OptionError, match=refused):
        make(folder, tmp_path, peft.get_peft_model(model, config), teachers=[teacher])


def test_several_teachers_are_a_weighted_sum_however_a_batch_is_cut(
    folder: Path, tmp_path: Path
) -> None:
    def run(teachers: list[Teacher], **options: Any) -> dict[str, float]:
        trainer = make(
            folder,
            tmp_path,
            teachers=teachers,
            options={"max_steps": 1, "top_k": None, "kd_weight": 1.0, **options},
        )
        trainer.train()
        return logged(trainer)[0]

    first = Teacher(str(folder / "teacher"), loss="prefix-kl", weight=0.25)
    second = Teacher(str(folder / "student"), loss="same-vocab-kl", weight=4.0)
    wide = {"per_device_train_batch_size": 16}
    both = run([first, second], **wide)
    cut = run([first, second], gradient_accumulation_steps=4)
    for name in ("kd", "ce", "loss", "grad_norm", "teacher0/kl"):
        assert cut[name] == pytest.approx(both[name], rel=1e-3), name
    balanced = run([first, second], kd_weight="balanced", gradient_accumulation_steps=4)
    assert balanced["kd_scale"] == pytest.approx(balanced["ce"] / balanced["kd"], rel=1e-4)
    plain = [replace(each, weight=1.0) for each in (first, second)]
    by_confidence = run(plain, teacher_weighting="entropy", **wide)
    assert by_confidence["kd"] != pytest.approx(both["kd"], rel=1e-2)


def test_the_loss_auto_is_what_the_audit_recommends(folder: Path, tmp_path: Path) -> None:
    trainer = make(folder, tmp_path, options={"loss": "auto"})
    recommended = Pair(folder / "student", folder / "teacher").audit().recommendation
    assert trainer.teaching.first.loss_name == recommended


@pytest.mark.parametrize(
    ("weights", "weighting", "message"),
    [
        ([0.5], None, "weight = 0.5 weighs several teachers, and 1 is given; set kd_weight"),
        ([1.0], "entropy", "teacher_weighting = 'entropy' weighs several teachers, and 1 is given"),
        ([1.0, 0.5], "entropy", "a teacher has the weight 0.5 beside teacher_weighting = 'entropy"),
    ],
)
def test_a_weight_that_would_not_be_read_is_refused(
    folder: Path, tmp_path: Path, weights: list[float], weighting: str | None, message: str
) -> None:
    teachers = [Teacher(str(folder / "teacher"), weight=weight) for weight in weights]
    with pytest.raises(OptionError, match=message):
        make(folder, tmp_path, teachers=teachers, options={"teacher_weighting": weighting})


def test_teachers_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="loss = 'prefix-kl' needs a teacher"):
        make(folder, tmp_path, teachers=[])
    with pytest.raises(PairError, match="the teacher's pair has student"):
        make(
            folder,
            tmp_path,
            teachers=[
                Teacher(str(folder / "teacher"), Pair(folder / "teacher", folder / "teacher"))
            ],
        )
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    model.config._name_or_path = model.name_or_path = ""
    with pytest.raises(OptionError, match="does not say where its tokenizer is"):
        make(folder, tmp_path, teachers=[model])


# ---- A learnable W ----


def test_a_learned_projection_has_its_own_rate_and_is_saved_and_resumed(
    folder: Path, tmp_path: Path
) -> None:
    options = {
        "loss": "p-kl",
        "learnable_projection": True,
        "projection_learning_rate": 0.5,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make(folder, tmp_path / "whole", options=options)
    whole.train()
    rates = [group["initial_lr"] for group in whole.optimizer.param_groups]
    assert rates == [2e-5] * (len(rates) - 1) + [0.5]
    pair = whole.teaching.first.pair
    saved = Projection.load(tmp_path / "whole" / "checkpoint-4" / "projection.safetensors")
    assert not np.allclose(saved.weights, pair.projection.weights)
    assert np.array_equal(saved.indices, pair.projection.indices)
    resumed = make(folder, tmp_path / "whole", options=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for mine, other in zip(resumed.teaching.parameters(), whole.teaching.parameters(), strict=True):
        assert torch.equal(mine, other)
    for (name, mine), other in zip(
        resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, other), name


def test_scores_are_those_of_the_texts_that_are_given(folder: Path, tmp_path: Path) -> None:
    trainer = make(folder, tmp_path)
    sizes = {}
    # Many, as what is freed between two calls may lie where the next one's rows do.
    for turn in range(24):
        text = TEXTS[turn % 8]
        size = trainer.evaluate([text])["eval_bytes"]
        assert size == sizes.setdefault(text, size)
    assert len(set(sizes.values())) > 4
    assert len(trainer._evaluators) <= 1
    trainer.eval_dataset = {"one": TEXTS[:1], "two": TEXTS[:2]}
    scores = trainer.evaluate()
    assert scores["eval_two_bytes"] > scores["eval_one_bytes"] == sizes[TEXTS[0]]
    assert len(trainer._evaluators) == 2
    trainer.evaluate()
    assert len(trainer._evaluators) == 2


class Numbered(torch.utils.data.IterableDataset[Any]):
    """A stream that says how long it is."""

    def __iter__(self) -> Any:
        return iter([{"text": text} for text in TEXTS])

    def __len__(self) -> int:
        return len(TEXTS)


def test_datasets_of_any_kind_are_read_or_refused_by_name(folder: Path, tmp_path: Path) -> None:
    plain = make(folder, tmp_path)
    plain.train()
    dataset = Dataset.from_dict({"x": TEXTS}).with_transform(lambda batch: {"text": batch["x"]})
    for rows in (dataset, Numbered()):
        trainer = make(folder, tmp_path, train_dataset=rows)
        trainer.train()
        assert all(np.isfinite(each["kd"]) and each["kd"] > 0 for each in logged(trainer))
    parts = DatasetDict(train=Dataset.from_dict({"text": TEXTS}))
    with pytest.raises(ArgumentTypeError, match="a DatasetDict of 'train' was given for one data"):
        make(folder, tmp_path, train_dataset=parts)
    for rows in (Numbered(), {"all": Numbered()}):
        with pytest.raises(OptionError, match="a Numbered cannot be scored more than once"):
            make(folder, tmp_path, eval_dataset=rows)


def test_plain_training_arguments_take_no_column_away(folder: Path, tmp_path: Path) -> None:
    records = []
    for made in (arguments(tmp_path, top_k=512, max_tokens=1024), None):
        args = made or TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1,
            max_grad_norm=1e9, report_to="none", use_cpu=True, disable_tqdm=True,
            save_strategy="no", learning_rate=2e-5, lr_scheduler_type="cosine", warmup_steps=0.03,
        )  # fmt: skip
        trainer = DistillTrainer(
            student_of(folder), args, teachers=[str(folder / "teacher")], train_dataset=TEXTS
        )
        trainer.train()
        records.append(logged(trainer))
    assert [each["kd"] for each in records[0]] == [each["kd"] for each in records[1]]


def test_no_log_has_sums_of_an_earlier_training(folder: Path, tmp_path: Path) -> None:
    options = {"max_steps": 3, "logging_steps": 2, "learning_rate": 0.0}
    trainer = make(folder, tmp_path, options=options)
    trainer.train()
    trainer.train()
    for each in logged(trainer):
        assert each["loss"] == pytest.approx(2 * each["ce"], rel=1e-5)  # the weight is balanced


def test_a_learned_w_is_in_every_optimizer_and_in_the_best_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    options = {
        "loss": "p-kl", "learnable_projection": True, "projection_learning_rate": 0.1,
        "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
        "save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "bits_per_byte",
        "learning_rate": 0.1, "greater_is_better": True,
    }  # fmt: skip
    model = student_of(folder)
    own = torch.optim.SGD(model.parameters(), lr=10.0)
    trainer = make(
        folder, tmp_path, model=model, options=options, eval_dataset=TEXTS[:2],
        optimizers=(own, None),
    )  # fmt: skip
    before = [each.detach().clone() for each in trainer._learned()]
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    saved = torch.load(best / "learned_projection.pt", weights_only=True)
    for now, then, kept in zip(trainer._learned(), before, saved, strict=True):
        assert not torch.equal(now, then)
        assert torch.equal(now, kept)
    schedule = torch.optim.lr_scheduler.LambdaLR(own, lambda _: 1.0)
    refused = make(folder, tmp_path, options=options, eval_dataset=TEXTS[:2],
                   optimizers=(own, schedule))  # fmt: skip
    with pytest.raises(OptionError, match="pass \\(optimizer, None\\)"):
        refused.train()


def test_a_step_that_a_scaler_leaves_out_is_no_divergence(folder: Path, tmp_path: Path) -> None:
    trainer = make(folder, tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.log({"grad_norm": float("nan")})
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    with pytest.raises(NonFiniteError, match="the student diverged"):
        trainer.log({"grad_norm": float("nan")})
    trainer.accelerator.scaler = None
    with pytest.raises(NonFiniteError, match="the student diverged"):
        trainer.log({"grad_norm": float("nan")})


def test_a_search_is_by_the_loss(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(folder, tmp_path, eval_dataset=TEXTS[:2])
    asked: list[Any] = []

    def search(_: Trainer, hp_space: Any, objective: Any, *more: Any, **named: Any) -> None:
        asked.append(objective)

    monkeypatch.setattr(Trainer, "hyperparameter_search", search)
    trainer.hyperparameter_search()
    trainer.hyperparameter_search(None, max)
    scores = trainer.evaluate()
    assert asked[0](scores) == scores["eval_loss"]
    assert asked[1] is max


def test_a_trial_of_a_search_keeps_the_settings_in_its_checkpoints(
    folder: Path, tmp_path: Path
) -> None:
    trainer = make(folder, tmp_path)
    trainer.train()
    # As Optuna's search calls it.
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer._save_checkpoint(trainer.model, SimpleNamespace(number=3))
    (kept,) = Path(str(trainer.args.output_dir)).glob(f"run-3/checkpoint-*/{SETTINGS_FILE}")
    assert json.loads(kept.read_text())["loss"] == trainer.distill_settings.loss


def test_a_setting_that_is_changed_later_is_refused_where_nothing_reads_it(
    folder: Path, tmp_path: Path
) -> None:
    trainer = make(folder, tmp_path)
    trainer.args.kd_weight = 0.5
    trainer.train()
    assert all(each["kd_scale"] == 0.5 for each in logged(trainer))
    for name, value in (("ce_weight", 0.0), ("temperature", 2.0), ("loss", "gold")):
        trainer = make(folder, tmp_path)
        setattr(trainer.args, name, value)
        with pytest.raises(OptionError, match=f"^{name} = .* was set after the trainer was made"):
            trainer.train()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_no_teacher_is_needed_for_cross_entropy_and_virtual_tokens_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    trainer = make(folder, tmp_path, teachers=None, options={"loss": "ce"})
    trainer.train()
    assert all(each["ce"] > 0 for each in logged(trainer))
    for idle, message in (
        ({"direction": "reverse"}, "direction = 'reverse' is not an option of ce"),
        ({"teacher_weighting": "entropy"}, "teacher_weighting = 'entropy' is of teachers"),
        ({"teacher_column": "by"}, "teacher_column = 'by' is of teachers, and none was given"),
    ):
        with pytest.raises(OptionError, match=message):
            make(folder, tmp_path, teachers=None, options={"loss": "ce", **idle})
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(student_of(folder), config)
    with pytest.raises(OptionError, match="peft_type = PROMPT_TUNING puts tokens of its own befo"):
        make(folder, tmp_path, model=model)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bf16_reaches_the_student_whoever_makes_the_loss(
    folder: Path, tmp_path: Path, smoothing: float
) -> None:
    seen: set[torch.dtype] = set()
    model = student_of(folder)
    layer = next(each for each in model.modules() if isinstance(each, nn.Linear))
    options = {"bf16": True, "label_smoothing_factor": smoothing, "max_steps": 1}
    trainer = make(folder, tmp_path, model=model, options=options)
    layer.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}


def test_a_checkpoint_tells_of_settings_that_it_was_not_trained_with(
    folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "loss": "p-kl"}
    make(folder, tmp_path, options=options).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    make(folder, tmp_path, options=options).train(resume_from_checkpoint=checkpoint)
    assert not [each for each in recwarn if "training goes on from" in str(each.message)]
    changed = make(folder, tmp_path, options=options | {"loss": "prefix-kl", "ce_weight": 0.5})
    with pytest.warns(
        UserWarning, match=r"loss = 'prefix-kl' \(it has 'p-kl'\), ce_weight = 0.5 \(it"
    ):
        changed.train(resume_from_checkpoint=checkpoint)
    (tmp_path / "checkpoint-1" / "distill_settings.json").write_text("{")
    with pytest.warns(UserWarning, match="distill_settings.json is damaged"):
        make(folder, tmp_path, options=options).train(resume_from_checkpoint=checkpoint)
