"""On-policy distillation: the student's own answers, scored by the teacher in its own tokens."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_distill_trainer import arguments, logged, make, student_of
from tiny_models import tiny_texts
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
)

from xtoken import Pair
from xtoken.align import ChunkKind
from xtoken.data import Example
from xtoken.distillation.items import examples_together
from xtoken.errors import OptionError, ServerError
from xtoken.teachers import StoreKey, TopKStore
from xtoken.training import DistillMixin, DistillTrainer, Teacher
from xtoken.training.on_policy import (
    GeneratingSampler,
    SampleRequest,
    answered,
    prompt_of,
)
from xtoken.training.routing import unasked
from xtoken.training.served_sampler import ServedSampler

TEXTS = tiny_texts(16)
TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant: {% endif %}"
)
OPTIONS: dict[str, Any] = {
    "loss": "p-kl",
    "direction": "reverse",
    "kd_weight": 1.0,
    "ce_weight": 0.0,
    "top_k": None,
    "on_policy_fraction": 1.0,
    "on_policy_max_new_tokens": 12,
    "on_policy_prompt_tokens": 8,
    "max_steps": 1,
}


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return Pair(folder / "student", folder / "teacher")


def teacher_of(folder: Path) -> Teacher:
    """One that is sure of itself, as a trained one is."""
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12.0)
    return Teacher(model, tokenizer=str(folder / "teacher"))


# ---- Ids ----


def test_the_prompt_ends_where_the_answer_begins(pair: Pair) -> None:
    rows = pair.distiller("p-kl").examples([{"prompt": TEXTS[0][:60], "completion": TEXTS[0][60:]}])
    prompt = prompt_of((rows[0],), 8)
    assert prompt is not None
    example = rows[0]
    for side, end in (("student", prompt.student), ("teacher", prompt.teachers[0])):
        mask = getattr(example, f"{side}_loss_mask")
        assert not mask[:end].any()
        assert mask[end + 2 :].all()
    (plain,) = pair.distiller("p-kl").examples([TEXTS[0]])
    found = prompt_of((plain,), 8)
    assert found is not None
    assert 2 <= found.student <= 8
    assert prompt_of((plain,), 1) is None  # the BOS alone: the teacher has none


def test_a_prompt_of_one_token_is_no_plain_text(folder: Path) -> None:
    swapped = Pair(folder / "teacher", folder / "student")  # its student writes no BOS
    row = {"prompt": "T", "completion": f" {TEXTS[0]}"}
    (example,) = swapped.distiller("p-kl").examples([row])
    prompt = prompt_of((example,), 32)
    assert prompt is not None
    assert prompt.student == 1


def test_an_answer_of_nothing_leaves_the_row_as_it_was(pair: Pair) -> None:
    (example,) = pair.distiller("p-kl").examples([TEXTS[0]])
    prompt = prompt_of((example,), 8)
    assert prompt is not None
    assert answered((example,), prompt, [], [pair], None) is None


def test_no_answer_is_longer_than_the_student_has_positions(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=1, n_head=2)
    sampler = GeneratingSampler(GPT2LMHeadModel(config), 0)
    prompts = [[5, 6, 7], [8] * 30, [9] * 31, [4] * 32, [3, 2]]
    answers = sampler(SampleRequest(prompts, 64, 1.0, 1.0, (), 0))
    assert [len(answer) for answer in answers] == [29, 2, 1, 0, 30]
    assert sampler(SampleRequest([prompts[1]], 64, 1.0, 1.0, (), 0)) != []


def test_a_student_with_few_positions_is_asked_for_what_fits(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=48, n_embd=32, n_layer=1, n_head=2)
    options = OPTIONS | {"max_tokens": None, "on_policy_max_new_tokens": 64}
    short = [text[:60] for text in TEXTS[:4]]
    student = GPT2LMHeadModel(config)
    trainer = make(
        folder, tmp_path, student, teachers=[teacher_of(folder)], options=options,
        train_dataset=short,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["sampled_tokens"] > 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_what_peft_hands_to_the_model_in_it_is_put_back(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    model.generation_config.eos_token_id = [1, 5]
    own = model.generation_config
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    GeneratingSampler(adapted, 0)(SampleRequest([[5, 6]], 3, 1.0, 1.0, (), 0))
    assert adapted.merge_and_unload().generation_config is own
    assert own.eos_token_id == [1, 5]


@pytest.mark.parametrize("source", ["text", "conversation"])
@pytest.mark.parametrize("case", ["canonical", "not canonical", "invalid UTF-8", "stop at once"])
def test_a_teacher_reads_the_bytes_that_the_student_said(
    folder: Path, source: str, case: str
) -> None:
    student, teacher = (
        AutoTokenizer.from_pretrained(folder / name) for name in ("student", "teacher")
    )
    teacher.add_special_tokens({"bos_token": "<s>"})
    for tokenizer in (student, teacher):
        tokenizer.chat_template = TEMPLATE
    pair = Pair(student, teacher)
    item: Any = TEXTS[0]
    if source == "conversation":
        item = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": TEXTS[0]}]
    (example,) = pair.distiller("p-kl").examples([item])
    prompt = prompt_of((example,), 8)
    assert prompt is not None
    vocab = pair.student_vocab
    eos = student.eos_token_id
    said = {
        "canonical": student(" and so 201 it is", add_special_tokens=False).input_ids,
        # Byte by byte, as no tokenizer would.
        "not canonical": [vocab.id_of(bytes([byte])) for byte in b" and 201"],
        "invalid UTF-8": [vocab.id_of(bytes([byte])) for byte in b"ab\xff\xe4\xb8 2\x80"],
        "stop at once": [],
    }[case]
    assert None not in said
    found = answered((example,), prompt, [*said, eos], [pair], None)
    assert found is not None
    (made,) = found
    assert made.student_ids[prompt.student :].tolist() == [*said, eos]
    assert made.student_loss_mask.tolist() == [
        at >= prompt.student for at in range(len(made.student_ids))
    ]
    text = vocab.decode_bytes(said)
    taught = made.teacher_ids[made.teacher_loss_mask].tolist()
    assert pair.teacher_vocab.decode_bytes(taught).endswith(text)
    assert made.teacher_ids[-1] == teacher.eos_token_id
    sides = (vocab, made.student_ids), (pair.teacher_vocab, made.teacher_ids)
    spelled = [side.decode_bytes(ids.tolist()) for side, ids in sides]
    assert spelled[0].endswith(text)
    assert spelled[0] == spelled[1]
    coverage = made.alignment.coverage
    assert coverage.student_byte_share == coverage.teacher_byte_share == 1.0
    assert made.alignment.kind[-1] == ChunkKind.SPECIAL
    if case == "canonical" and source == "text":
        (whole,) = pair.teacher.encode([spelled[0].decode()])
        assert made.teacher_ids.tolist()[: len(whole)] == whole


def test_an_answer_without_a_stop_and_a_long_one_are_cut_where_both_hold_the_same_text(
    pair: Pair,
) -> None:
    (example,) = pair.distiller("p-kl").examples([TEXTS[0]])
    prompt = prompt_of((example,), 8)
    assert prompt is not None
    said = pair.student_tokenizer(TEXTS[3], add_special_tokens=False).input_ids
    assert len(said) > 40
    found = answered((example,), prompt, said, [pair], 40)
    assert found is not None
    (made,) = found
    assert 20 < max(len(made.student_ids), len(made.teacher_ids)) <= 40
    assert made.alignment.coverage.student_byte_share == 1.0
    assert not np.isin(made.teacher_ids, pair.teacher_vocab.stops).any()


def test_several_teachers_read_one_answer_and_those_that_are_not_asked_learn_nothing(
    folder: Path, pair: Pair
) -> None:
    pairs = [pair, Pair(folder / "student", folder / "student")]
    (examples,) = examples_together([TEXTS[0]], pairs, None)
    said = [300, 17, 900, 5]
    prompt = prompt_of(examples, 8)
    assert prompt is not None
    both = answered(examples, prompt, said, pairs, None)
    assert both is not None
    assert both[1].teacher_ids.tolist() == both[0].student_ids.tolist()
    routed = (examples[0], unasked(examples[1]))
    alone = answered(routed, prompt_of(routed, 8), said, pairs, None)
    assert alone is not None
    assert np.array_equal(alone[0].teacher_ids, both[0].teacher_ids)
    assert np.array_equal(alone[1].student_ids, alone[0].student_ids)
    assert not alone[1].teacher_loss_mask.any()
    assert alone[1].alignment.student_bounds[-1] == len(alone[1].student_ids)


# ---- Training ----


@pytest.mark.parametrize(
    ("changed", "share"),
    [
        ({}, 0.6),
        ({"direction": "jsd"}, 0.95),
        ({"loss": "prefix-kl"}, 0.6),
        ({"top_k": 64, "top_k_by": "student"}, 0.8),
    ],
)
def test_the_divergence_on_the_students_own_answers_falls(
    folder: Path, tmp_path: Path, changed: dict[str, Any], share: float
) -> None:
    options = OPTIONS | {"max_steps": 25, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    trainer = make(folder, tmp_path, teachers=[teacher_of(folder)], options=options | changed)
    trainer.train()
    records = logged_kd(trainer)
    assert np.mean([each["kd"] for each in records[-3:]]) < share * np.mean(
        [each["kd"] for each in records[:3]]
    )
    assert all(record["sampled_tokens"] > 8 for record in records)


def logged_kd(trainer: Any) -> list[dict[str, float]]:
    return [each for each in trainer.state.log_history if "kd" in each]


def test_the_loss_of_samples_is_that_of_their_ids_and_has_no_cross_entropy(
    folder: Path, tmp_path: Path, pair: Pair
) -> None:
    """Against the distiller on the same ids, by hand."""
    requests: list[SampleRequest] = []
    answers = [[5 + at, 300, 17, 900 + at] for at in range(4)]

    def sampler(request: SampleRequest) -> list[list[int]]:
        requests.append(request)
        return answers[: len(request.prompts)]

    teacher = teacher_of(folder)
    trainer = make(
        folder, tmp_path, teachers=[teacher], sampler=sampler, options=OPTIONS,
        train_dataset=TEXTS[:4],
    )  # fmt: skip
    student = student_of(folder)
    trainer.train()
    (request,) = requests
    assert (request.temperature, request.top_p, request.max_new_tokens) == (1.0, 1.0, 12)
    assert request.stops == pair.student_vocab.stops
    (record,) = logged_kd(trainer)
    assert "ce" not in record
    distiller = pair.distiller("p-kl", direction="reverse", top_k=None)
    made: list[Example] = []
    for prompt_ids, answer in zip(request.prompts, answers, strict=True):
        (example,) = (
            each for each in distiller.examples(TEXTS[:4])
            if each.student_ids[: len(prompt_ids)].tolist() == prompt_ids
        )  # fmt: skip
        prompt = prompt_of((example,), 8)
        assert prompt is not None
        found = answered((example,), prompt, answer, [pair], None)
        assert found is not None
        made.append(found[0])
    batch = distiller.collate(made)
    with torch.no_grad():
        expected = distiller(
            student(**batch.student).logits, teacher.source(**batch.teacher).logits, batch
        )
    assert record["kd"] == pytest.approx(float(expected.kd), rel=1e-4)
    assert record["chunks"] == int(expected.num_chunks)
    assert record["sampled_tokens"] == sum(map(len, answers))


def test_a_fraction_of_the_examples_is_sampled_and_the_rest_is_data(
    folder: Path, tmp_path: Path, pair: Pair
) -> None:
    counts: list[int] = []

    def sampler(request: SampleRequest) -> list[list[int]]:
        counts.append(len(request.prompts))
        return [[20, 30] for _ in request.prompts]

    options = OPTIONS | {"on_policy_fraction": 0.3, "ce_weight": 1.0, "max_steps": 10}
    options |= {"gradient_accumulation_steps": 2, "logging_steps": 1}
    trainer = make(folder, tmp_path, sampler=sampler, options=options)
    trainer.train()
    # Of eight examples a step, 2.4 in the mean.
    assert set(counts) <= {2, 3}
    assert 20 <= sum(counts) <= 28
    for record in logged(trainer):
        assert np.isfinite(record["loss"])
        assert record["ce"] > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_samples_what_an_uninterrupted_one_did(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    options = OPTIONS | {
        "on_policy_fraction": 0.5, "kd_weight": "balanced", "ce_weight": 1.0, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3,
        "dataloader_num_workers": workers,
    }  # fmt: skip
    whole = make(folder, tmp_path, teachers=[teacher_of(folder)], options=options)
    whole.train()
    resumed = make(folder, tmp_path, teachers=[teacher_of(folder)], options=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, mine), other in zip(
        resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, other), name
    other_seed = make(
        folder, tmp_path, teachers=[teacher_of(folder)], options=options | {"seed": 7}
    )
    other_seed.train()
    assert logged(other_seed)[0]["sampled_tokens"] != logged(whole)[0]["sampled_tokens"] or (
        logged(other_seed)[0]["kd"] != logged(whole)[0]["kd"]
    )


def test_sampling_leaves_the_random_numbers_and_the_mode_of_the_model_alone(folder: Path) -> None:
    model = student_of(folder).train()
    request = SampleRequest([[0, 5, 6], [0, 7]], 10, 1.0, 1.0, (1,), seed=3)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    sampler = GeneratingSampler(model, 0)
    first = sampler(request)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert sampler(request) == first
    alone = sampler(SampleRequest([[0, 7]], 10, 0.0, 1.0, (1,), seed=3))
    both = sampler(SampleRequest([[0, 5, 6], [0, 7]], 10, 0.0, 1.0, (1,), seed=4))
    assert both[1] == alone[0]  # padding changes nothing
    assert all(1 <= len(answer) <= 10 for answer in first)


def test_what_the_model_says_of_generate_and_rows_of_padding_change_no_answer(
    folder: Path, tmp_path: Path
) -> None:
    model = student_of(folder)
    size = len(AutoTokenizer.from_pretrained(folder / "student"))
    request = SampleRequest([[0, 5, 6], [0, 7]], 12, 0.0, 1.0, (), seed=3)
    plain = GeneratingSampler(model, 0, vocab_size=size)(request)
    model.resize_token_embeddings(size + 60, mean_resizing=False)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        numbers = torch.Generator().manual_seed(0)
        head[size:] = 100 * torch.randn(head[size:].shape, generator=numbers)
    model.generation_config.repetition_penalty = 1.3
    model.generation_config.num_beams = 2
    own = model.generation_config
    assert max(map(max, GeneratingSampler(model, 0)(request))) >= size
    assert GeneratingSampler(model, 0, vocab_size=size)(request) == plain
    assert model.generation_config is own
    # The likeliest token, one after another, by the model itself.
    ids = [0, 7]
    with torch.no_grad():
        for _ in plain[1]:
            logits = model(torch.tensor([ids])).logits[0, -1, :size]
            ids.append(int(logits.argmax()))
    assert ids[2:] == plain[1]
    options = OPTIONS | {"max_steps": 2}
    trainer = make(folder, tmp_path, model=model, options=options)
    trainer.train()
    assert all(each["sampled_tokens"] > 0 for each in logged(trainer))


def test_the_student_that_model_init_makes_is_the_one_that_answers(
    folder: Path, tmp_path: Path
) -> None:
    trainer = DistillTrainer(
        None,
        arguments(tmp_path, **OPTIONS),
        teachers=[str(folder / "teacher")],
        train_dataset=TEXTS,
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
        model_init=lambda: student_of(folder),
    )
    trainer.train()
    assert trainer._on_policy is not None
    sampler = trainer._on_policy._sampler
    assert isinstance(sampler, GeneratingSampler)
    assert sampler._model() is trainer.model


# ---- A server ----


class Server(ThreadingHTTPServer):
    """A student behind OpenAI's completions, with vLLM's ids or without."""

    def __init__(self, folder: Path, *, ids: bool) -> None:
        self.sampler = GeneratingSampler(student_of(folder), 0)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "student")
        self.ids = ids
        self.shift = 0
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Server
    disable_nagle_algorithm = True  # else a body waits 40 ms behind its head

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "student"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "student"
        plain = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        assert {name: body[name] for name in plain} == plain
        stops = tuple(body["stop_token_ids"])
        request = SampleRequest(
            body["prompt"], body["max_tokens"], body["temperature"], body["top_p"], stops,
            body["seed"],
        )  # fmt: skip
        choices = []
        for index, ids in enumerate(self.server.sampler(request)):
            stopped = ids[-1] in stops
            choice = {
                "index": index,
                "text": self.server.tokenizer.decode(ids, skip_special_tokens=True),
                "finish_reason": "stop" if stopped else "length",
            }
            if self.server.ids:
                choice["token_ids"] = [token + self.server.shift for token in ids]
            choices.append(choice)
        self._answer({"choices": choices[::-1]})

    def _answer(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("ids", [True, False])
def test_a_served_student_answers_as_the_one_at_hand(
    folder: Path, tmp_path: Path, pair: Pair, ids: bool
) -> None:
    pytest.importorskip("httpx2")
    server = Server(folder, ids=ids)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        stops = pair.student_vocab.stops
        request = SampleRequest([[0, 5, 6], [0, 7]], 10, 1.0, 1.0, stops, seed=3)
        found = ServedSampler(url, pair.student_vocab)(request)
        expected = GeneratingSampler(student_of(folder), 0)(request)
        if ids:
            assert found == expected
        else:  # the same text, tokenized again; what is no Unicode text is lost on the way
            decode = server.tokenizer.decode
            assert [decode(answer) for answer in found] == [decode(answer) for answer in expected]
        trainer = make(folder, tmp_path, options=OPTIONS | {"on_policy_url": url})
        trainer.train()
        assert logged_kd(trainer)[0]["sampled_tokens"] > 0
        if ids:
            server.shift = 10_000
            with pytest.raises(ServerError, match=r"sampled token \d+, the student has 1700"):
                ServedSampler(url, pair.student_vocab)(request)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def test_settings_that_cannot_work_are_refused(folder: Path, tmp_path: Path, pair: Pair) -> None:
    for changed, message in (
        ({"on_policy_fraction": 1.5}, r"on_policy_fraction = 1\.5, expected between 0 and 1"),
        ({"kd_weight": "balanced"}, "leaves no cross-entropy for kd_weight = 'balanced'"),
        ({"loss": "ce"}, "with loss = 'ce': what the student says is scored by a teacher"),
        ({"on_policy_top_p": 0.0}, r"on_policy_top_p = 0\.0, expected above 0"),
        ({"label_smoothing_factor": 0.1}, "beside a loss of the Trainer's own"),
    ):
        with pytest.raises(OptionError, match=message):
            make(folder, tmp_path, options=OPTIONS | changed)
    store = TopKStore(tmp_path / "store", StoreKey("0" * 32, 8, "float32"))
    with pytest.raises(OptionError, match="has no predictions of what the student will say"):
        make(folder, tmp_path, teachers=[Teacher(store, pair)], options=OPTIONS)

    class Plain(DistillMixin, Trainer):
        pass

    with pytest.raises(OptionError, match="Plain has rows of its own, of which no prompt is known"):
        Plain(
            student_of(folder), arguments(tmp_path, **OPTIONS | {"max_tokens": 1024}),
            teachers=[str(folder / "teacher")], processing_class=pair,
        )  # fmt: skip
