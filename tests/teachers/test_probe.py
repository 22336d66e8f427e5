"""What a model makes of packed and padded rows, and of the tokens that follow, is tried, not
believed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from small_models import small_model
from torch import Tensor, nn

from xtoken.errors import ModelSourceError, OptionError
from xtoken.teachers import LiveTeacher, causal_logits
from xtoken.teachers.forward import check_positions
from xtoken.teachers.probe import check_causal, keeps_documents_apart, takes_left_padding
from xtoken.training.signals import teacher_signal

DOCUMENTS = [torch.arange(40, 49), torch.arange(20, 34) * 3]


def alone(model: nn.Module, ids: Tensor) -> Tensor:
    return causal_logits(model, ids[None], torch.ones_like(ids)[None])[0]


def forward_passes(model: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of the ids of all calls from here on."""
    found: list[tuple[int, ...]] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        found.append(tuple(args[0].shape))

    cast(Any, model).get_input_embeddings().register_forward_pre_hook(keep)
    return found


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt-oss", "opt", "bloom", "mpt", "rwkv", "bart's decoder", "roberta"]
)
@pytest.mark.parametrize("fused", [False, True])
def test_each_packed_document_is_predicted_as_if_alone(name: str, fused: bool) -> None:
    model = small_model(name)
    with torch.no_grad():
        expected = torch.cat([alone(model, ids) for ids in DOCUMENTS])
    packed = {
        "input_ids": torch.cat(DOCUMENTS)[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in DOCUMENTS])[None],
    }
    batch = cast(Any, SimpleNamespace(teacher=packed, asked_tokens=None))
    found = teacher_signal(LiveTeacher(model), batch, "auto" if not fused else _fused(name))
    if not isinstance(found, Tensor):
        found = cast(Any, found).rows(torch.arange(len(expected)), width=expected.shape[1])[None]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def _fused(name: str) -> Any:
    return False if name in ("rwkv", "roberta") else True


def test_a_model_that_keeps_documents_apart_reads_the_packed_row_itself() -> None:
    assert keeps_documents_apart(small_model("llama"))
    assert not keeps_documents_apart(small_model("gpt-oss"))
    assert not keeps_documents_apart(nn.Linear(2, 2))


def test_a_model_is_tried_once_and_left_as_it_was() -> None:
    model = small_model("llama").train()
    model.get_submodule("model.norm").eval()
    modes = [each.training for each in model.modules()]
    passes = forward_passes(model)
    hooks = [len(each._forward_hooks) for each in model.modules()]
    own: list[nn.Module] = []
    model.register_forward_pre_hook(lambda module, args: own.append(module))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for _ in range(2):
        assert keeps_documents_apart(model)
        check_causal(model)
        assert takes_left_padding(model)
    assert torch.equal(torch.rand(3), expected)
    assert [each.training for each in model.modules()] == modes
    assert [len(each._forward_hooks) for each in model.modules()] == hooks
    assert not own
    assert len(passes) == 6
    assert max(rows * width for rows, width in passes) <= 24


def test_a_model_that_cannot_be_asked_is_asked_no_second_time() -> None:
    model = small_model("llama")
    asked: list[bool] = []

    def lacks(module: nn.Module, args: Any) -> None:
        asked.append(True)
        raise ValueError("lacks an image")

    cast(Any, model).get_input_embeddings().register_forward_pre_hook(lacks)
    for _ in range(2):
        assert not keeps_documents_apart(model)
        check_causal(model)
        assert not takes_left_padding(model)
    assert len(asked) == 6  # 3, 1 and 2 passes


@pytest.mark.parametrize("name", ["bert", "masked bert", "xlnet"])
def test_a_model_that_sees_the_tokens_that_follow_is_refused(name: str) -> None:
    teacher = LiveTeacher(small_model(name))
    ids = DOCUMENTS[0][None]
    message = f"the teacher {type(teacher.model).__name__} sees the tokens that follow"
    with pytest.raises(ModelSourceError, match=message):
        teacher.logits(ids, torch.ones_like(ids))
    with pytest.raises(ModelSourceError, match="sees the tokens that follow"):
        causal_logits(teacher.model, ids, torch.ones_like(ids))


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_an_encoder_decoder_is_no_teacher(name: str) -> None:
    with pytest.raises(ModelSourceError, match=r"the teacher \w+ is an encoder-decoder"):
        LiveTeacher(small_model(name))


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "rwkv", "causal bert", "bart's decoder"])
def test_a_causal_model_is_none_of_these(name: str) -> None:
    check_causal(small_model(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "rwkv", "bart's decoder", "opt", "roberta"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_row_has_the_same_logits_whatever_its_padding(name: str, fused: bool) -> None:
    """RWKV has neither positions nor a mask, Bart's decoders count from the padding on."""
    model = small_model(name)
    short, long = DOCUMENTS
    missing = len(long) - len(short)
    ids = torch.stack([torch.cat([short.new_zeros(missing), short]), long])
    mask = torch.ones_like(ids)
    mask[0, :missing] = 0
    batch = cast(Any, SimpleNamespace(teacher={"input_ids": ids, "attention_mask": mask}))
    batch.asked_tokens = None
    found: Any = teacher_signal(LiveTeacher(model), batch, fused and _fused(name))
    with torch.no_grad():
        expected = [alone(model, each) for each in DOCUMENTS]
    if not isinstance(found, Tensor):
        rows = found.rows(torch.arange(ids.numel()), width=expected[0].shape[1])
        found = rows.view(*ids.shape, -1)
    torch.testing.assert_close(found[0, missing:], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 3}),
        ("PromptEncoderConfig", {"num_virtual_tokens": 3}),
        (
            "CPTConfig",
            {"cpt_token_ids": [4, 5], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
        ),
    ],
)
def test_a_teacher_with_tokens_of_its_own_before_the_text_is_refused(
    config: str, options: dict[str, Any]
) -> None:
    peft = pytest.importorskip("peft")
    adapter = getattr(peft, config)(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(small_model("llama"), adapter)
    message = f"peft_type = {adapter.peft_type.value} puts tokens of its own before the"
    with pytest.raises(OptionError, match=message):
        LiveTeacher(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.filterwarnings("ignore:`past_key_values`:FutureWarning")
def test_a_prefix_tuned_teacher_has_the_logits_of_its_tokens() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(small_model("llama"), config)
    ids = DOCUMENTS[0][None]
    assert LiveTeacher(model).logits(ids, torch.ones_like(ids)).shape[:2] == ids.shape


def test_a_model_that_makes_more_positions_than_tokens_is_refused() -> None:
    class Longer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(160, 8)

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            logits = self.table(input_ids)
            return SimpleNamespace(logits=torch.cat([logits[:, :1], logits], 1))

    ids = DOCUMENTS[0][None]
    with pytest.raises(ModelSourceError, match="Longer gives 10 positions for 9 tokens"):
        LiveTeacher(Longer()).logits(ids, torch.ones_like(ids))


@pytest.mark.parametrize(("name", "limit"), [("mpt", 256), ("roberta", 64)])
def test_a_row_has_as_many_tokens_as_the_model_has_usable_positions(name: str, limit: int) -> None:
    model = small_model(name)
    ids = torch.arange(limit)[None] % 100 + 20
    assert causal_logits(model, ids, torch.ones_like(ids)).shape[1] == limit
    longer = torch.cat([ids, ids[:, :1]], 1)
    with pytest.raises(OptionError, match=f"has {limit} positions; cut the texts at {limit} tok"):
        check_positions(model, {"input_ids": longer})
