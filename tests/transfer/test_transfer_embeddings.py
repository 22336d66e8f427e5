"""A model under another tokenizer: its rows against the definition, and what it then is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

from xtoken import Pair, Vocab
from xtoken.errors import ArgumentTypeError, ModelSourceError, OptionError
from xtoken.transfer import RowCounts
from xtoken.transfer.parts import refuse_too_many

from reference_transfer import new_rows

OLD_SIZE = 800


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    """The new tokenizer packs numerals, the model's own spells them digit by digit."""
    sides = [AutoTokenizer.from_pretrained(folder / name) for name in ("student", "teacher")]
    return Pair(*sides, cache_dir=False)


def even(pair: Pair) -> Pair:
    """The pair whose W has even weights, those of a mean by default."""
    return pair.with_options(decay=1.0)


def own_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)


def sizes(**others: Any) -> dict[str, Any]:
    return {
        "vocab_size": OLD_SIZE,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 0,
        **others,
    }


def untied(seed: int = 3, **others: Any) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**sizes(tie_word_embeddings=False, **others)))


def test_tied_rows_are_w_times_the_old_ones(folder: Path, pair: Pair) -> None:
    model = own_model(folder)
    expected = new_rows(even(pair), model.get_input_embeddings().weight)
    counts = pair.transfer_embeddings(model)
    rows = model.get_input_embeddings().weight
    assert counts.tied
    assert rows is model.get_output_embeddings().weight
    torch.testing.assert_close(rows.double(), expected, rtol=1e-6, atol=1e-7)


def test_other_weights_are_an_option(folder: Path, pair: Pair) -> None:
    for decay, own in ((None, pair), (0.5, pair.with_options(decay=0.5))):
        model = own_model(folder)
        expected = new_rows(own, model.get_input_embeddings().weight)
        pair.transfer_embeddings(model, decay=decay)
        rows = model.get_input_embeddings().weight
        torch.testing.assert_close(rows.double(), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(OptionError, match="decay"):
        pair.transfer_embeddings(own_model(folder), decay=2.0)


def test_a_token_with_the_same_bytes_keeps_its_row_bit_for_bit(folder: Path, pair: Pair) -> None:
    model = own_model(folder)
    old = model.get_input_embeddings().weight.clone()
    pair.transfer_embeddings(model)
    new = model.get_input_embeddings().weight
    new_vocab, old_vocab = pair.student_vocab, pair.teacher_vocab
    kept = 0
    for token in range(len(new_vocab)):
        twin = old_vocab.id_of(spelled) if (spelled := new_vocab.token_bytes(token)) else None
        if twin is not None:
            assert torch.equal(new[token], old[twin])
            kept += 1
    assert kept > 500


def test_rows_are_counted_by_class_and_source(folder: Path, pair: Pair) -> None:
    counts = pair.transfer_embeddings(own_model(folder))
    packed = counts.classes["three-digit numerals"]
    # 111 is three times one token: a mean of pieces all the same, and not that token's row alone.
    assert (packed.copied, packed.averaged, packed.without_source) == (0, packed.tokens, 0)
    assert counts.classes["one-digit numerals"].copied == 10
    assert counts.total.without_source == counts.classes["special tokens"].without_source == 2
    assert counts.total.tokens + counts.unused == len(pair.student_vocab)


def test_an_untied_head_and_its_bias_get_rows_of_their_own(pair: Pair) -> None:
    torch.manual_seed(4)
    model = PhiForCausalLM(PhiConfig(**sizes(tie_word_embeddings=False)))
    torch.nn.init.normal_(model.lm_head.bias)
    old = [model.model.embed_tokens.weight, model.lm_head.weight, model.lm_head.bias]
    expected = [new_rows(even(pair), part.detach()) for part in old]
    assert not pair.transfer_embeddings(model).tied
    new = [model.model.embed_tokens.weight, model.lm_head.weight, model.lm_head.bias]
    for rows, wanted in zip(new, expected, strict=True):
        torch.testing.assert_close(rows.detach().double(), wanted, rtol=1e-6, atol=1e-7)
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids).logits.shape == (1, 3, len(pair.student_vocab))


def test_padding_of_the_old_head_is_left_out_and_the_new_one_is_the_mean(pair: Pair) -> None:
    model = untied(vocab_size=OLD_SIZE + 32)
    with torch.no_grad():
        model.lm_head.weight[OLD_SIZE:] = torch.nan  # nobody may read it
    expected = new_rows(even(pair), model.lm_head.weight.detach())
    counts = pair.transfer_embeddings(model, pad_to_multiple_of=64)
    tokens = len(pair.student_vocab)
    head = model.lm_head.weight.detach()
    assert len(head) == model.config.vocab_size == -(-tokens // 64) * 64
    assert counts.padding == len(head) - tokens > 0
    torch.testing.assert_close(head[:tokens].double(), expected, rtol=1e-6, atol=1e-7)
    missing = next(t for t in range(tokens) if not len(pair.projection.csr.row(t)[0]))
    assert torch.equal(head[tokens:], head[missing].expand(counts.padding, -1))


def test_tokens_whose_pieces_the_narrow_model_lacks_have_no_source() -> None:
    old = Vocab.from_tokens([b"a", b"b", b"c"], ranked=True)
    new = Vocab.from_tokens([b"a", b"b", b"c", b"bc"], ranked=True)
    model = untied(vocab_size=2)
    before = model.lm_head.weight.detach().clone()
    with pytest.warns(UserWarning, match="the model has 2 embedding rows, its tokenizer 3 tokens"):
        counts = Pair(new, old, cache_dir=False).transfer_embeddings(model)
    assert counts.total == RowCounts(copied=2, averaged=1, without_source=1)
    after = model.lm_head.weight.detach()
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 1]])  # of `bc` only `b` is left
    torch.testing.assert_close(after[2], before.mean(0))


def test_one_tokenizer_on_both_sides_changes_nothing(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    model = own_model(folder)
    ids = tokenizer("One text of 2,023 words.", return_tensors="pt").input_ids
    before = model(input_ids=ids).logits
    counts = Pair(tokenizer, tokenizer, cache_dir=False).transfer_embeddings(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert counts.total.copied == counts.total.tokens
    assert counts.changed_ids == ()


def test_a_scaled_embedding_stays_one(pair: Pair) -> None:
    torch.manual_seed(5)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes(head_dim=8)))
    embedding = model.get_input_embeddings()
    expected = new_rows(even(pair), embedding.weight.detach())
    kind = type(embedding)
    pair.transfer_embeddings(model)
    embedding = model.get_input_embeddings()
    assert type(embedding) is kind
    torch.testing.assert_close(
        embedding(torch.arange(9)).double(), expected[:9] * 4, rtol=1e-6, atol=1e-7
    )


def test_the_dtype_and_the_random_numbers_stay(pair: Pair) -> None:
    model = untied(dtype=torch.bfloat16).to(torch.bfloat16)
    expected = new_rows(even(pair), model.lm_head.weight.detach())
    state = torch.random.get_rng_state()
    pair.transfer_embeddings(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(
        model.lm_head.weight.detach().double(), expected, rtol=2**-8, atol=1e-7
    )


def test_a_model_that_was_changed_under_inference_mode_is_trained(pair: Pair) -> None:
    whole, model = untied(), untied()
    pair.transfer_embeddings(whole)
    with torch.inference_mode():
        pair.transfer_embeddings(model)
    ids = torch.tensor([[5, 6, 7]])
    for each in (whole, model):
        each(ids, labels=ids).loss.backward()
    for one, other in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.grad, other.grad)


def test_configurations_name_the_new_tokenizers_tokens(pair: Pair) -> None:
    model = untied(pad_token_id=7)
    model.generation_config.suppress_tokens = [5]
    counts = pair.transfer_embeddings(model)
    tokenizer: Any = pair.student_tokenizer
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == ids
    assert model.config.vocab_size == len(pair.student_vocab)
    # The row of the old padding is a token's, and learns.
    assert model.get_input_embeddings().padding_idx == tokenizer.pad_token_id
    assert model.generation_config.suppress_tokens is None
    assert "generation_config.suppress_tokens: [5] -> None" in counts.changed_ids


def test_generation_stops_at_all_that_stops_the_new_side(pair: Pair) -> None:
    vocab = pair.student_vocab.with_stops([2, 1])
    changed = Pair(vocab, pair.teacher_vocab, cache_dir=False)
    model = untied()
    changed.transfer_embeddings(model)
    assert model.generation_config.eos_token_id == [1, 2]
    assert model.config.eos_token_id == 1


def test_progress_ends_at_the_whole(pair: Pair) -> None:
    told: list[tuple[int, int]] = []
    pair.transfer_embeddings(untied(), progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (2 * len(pair.student_vocab), 2 * len(pair.student_vocab))
    assert told == sorted(told)


def test_a_model_of_another_tokenizer_is_refused(pair: Pair) -> None:
    with pytest.raises(ModelSourceError, match="has 300 embedding rows, its tokenizer 800 tokens"):
        pair.transfer_embeddings(untied(vocab_size=300))


def test_a_model_that_is_none_of_transformers_is_refused(pair: Pair) -> None:
    with pytest.raises(ArgumentTypeError, match="model is a Linear; pass a model of transformers"):
        pair.transfer_embeddings(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_head_that_is_no_plain_table_is_refused_before_anything_changes(pair: Pair) -> None:
    model = untied()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ModelSourceError, match="the head of LlamaForCausalLM is Sequential"):
        pair.transfer_embeddings(model)
    assert model.config.vocab_size == OLD_SIZE


def test_a_further_table_by_token_is_refused(pair: Pair) -> None:
    model = untied()
    model.per_layer = torch.nn.Embedding(OLD_SIZE + 8, 4)
    with pytest.raises(ModelSourceError, match="also has per_layer of 808 rows"):
        pair.transfer_embeddings(model)


@pytest.mark.parametrize("number", [0, 2**17, 1.5, True])
def test_padding_out_of_range_is_refused(pair: Pair, number: Any) -> None:
    with pytest.raises(OptionError, match="pad_to_multiple_of"):
        pair.transfer_embeddings(untied(), pad_to_multiple_of=number)


def test_nothing_is_warned_of_where_nothing_is_wrong(pair: Pair) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair.transfer_embeddings(untied())


@pytest.mark.parametrize("tied", [False, True])
def test_head_and_embedding_are_tied_as_they_were_whatever_the_config_says(
    pair: Pair, tied: bool, tmp_path: Path
) -> None:
    torch.manual_seed(6)
    model = LlamaForCausalLM(LlamaConfig(**sizes(tie_word_embeddings=not tied)))
    table = model.get_input_embeddings().weight
    other = torch.nn.Parameter(torch.randn_like(table))
    model.lm_head.weight = table if tied else other
    expected = [new_rows(even(pair), part.detach()) for part in (table, model.lm_head.weight)]
    assert pair.transfer_embeddings(model).tied == tied
    model.save_pretrained(tmp_path)
    for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        found = (each.get_input_embeddings().weight, each.lm_head.weight)
        assert (found[0] is found[1]) == tied == each.config.tie_word_embeddings
        for rows, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(rows.detach().double(), wanted, rtol=1e-6, atol=1e-7)


class Untieable(LlamaForCausalLM):
    _tied_weights_keys = None


def test_a_tie_that_the_class_does_not_know_is_refused_before_anything_changes(pair: Pair) -> None:
    model = Untieable(LlamaConfig(**sizes(tie_word_embeddings=False)))
    model.lm_head.weight = model.get_input_embeddings().weight
    with pytest.raises(ModelSourceError, match="one parameter, but Untieable has no such tie"):
        pair.transfer_embeddings(model)
    assert not model.config.tie_word_embeddings
    assert model.config.vocab_size == len(model.lm_head.weight) == OLD_SIZE


def test_a_model_without_a_head_gets_an_embedding(pair: Pair) -> None:
    model = LlamaModel(LlamaConfig(**sizes()))
    expected = new_rows(even(pair), model.get_input_embeddings().weight.detach())
    pair.transfer_embeddings(model)
    rows = model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(rows.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [(151_669, 151_936), (50_295, 51_200), (255_029, 256_000), (200_019, 201_088)],
)
def test_padding_of_published_models_is_let_pass(tokens: int, rows: int) -> None:
    refuse_too_many(rows, tokens, new=32_000)


def test_rows_beyond_padding_are_another_tokenizers(pair: Pair) -> None:
    wanted = "has 5000 embedding rows, its tokenizer 800 tokens, where padding adds 64 at most"
    with pytest.raises(ModelSourceError, match=wanted):
        pair.transfer_embeddings(untied(vocab_size=5000))


def test_a_pair_the_wrong_way_round_is_refused() -> None:
    small = Vocab.from_tokens([bytes([i]) for i in range(256)], ranked=True)
    large = Vocab.from_tokens(
        [*(bytes([i]) for i in range(256)), *(b"%03d" % i for i in range(44))], ranked=True
    )
    model = untied(vocab_size=300)
    with pytest.raises(ModelSourceError, match=r"256 tokens, the new one as many.*exchange the"):
        Pair(large, small, cache_dir=False).transfer_embeddings(model)
    Pair(small, large, cache_dir=False).transfer_embeddings(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.parametrize("wrapped", [True, False])
def test_adapters_are_refused_until_they_are_merged(pair: Pair, wrapped: bool) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted: Any = peft.get_peft_model(untied(), config)
    with pytest.raises(ModelSourceError, match=r"has adapters.*merge them first"):
        pair.transfer_embeddings(adapted if wrapped else adapted.get_base_model())
    assert adapted.config.vocab_size == OLD_SIZE
    pair.transfer_embeddings(adapted.merge_and_unload())


def test_of_many_pieces_as_many_as_asked_for_are_averaged() -> None:
    singles = [bytes([i]) for i in range(256)]
    old = Vocab.from_tokens(singles, ranked=True)
    new = Vocab.from_tokens([*singles, b"zyxwvuts"], ranked=True)
    for count in (4, 6, 8):
        model = untied(vocab_size=256)
        rows = model.lm_head.weight.detach().clone()
        Pair(new, old, cache_dir=False, max_pieces=count).transfer_embeddings(model)
        wanted = rows[list(b"zyxwvuts"[:count])].mean(0)
        torch.testing.assert_close(model.lm_head.weight[256].detach(), wanted)


def test_an_id_that_must_be_a_number_stays_with_a_warning(pair: Pair) -> None:
    config = XGLMConfig(
        vocab_size=OLD_SIZE, d_model=16, num_layers=1, attention_heads=2, ffn_dim=24
    )
    model = XGLMForCausalLM(config)
    with pytest.warns(UserWarning, match=r"config.decoder_start_token_id: 2: kept") as told:
        counts = pair.transfer_embeddings(model)
    assert {each.filename for each in told} == {__file__}
    assert counts.kept_ids == ("config.decoder_start_token_id: 2",)
    assert model.config.decoder_start_token_id == 2
    assert model.config.eos_token_id == pair.student_vocab.roles["eos"]


def test_padding_that_must_be_a_number_is_refused_before_anything_changes() -> None:
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 1)
    given = {**sizes(vocab_size=256), **ids, "num_key_value_heads": None}
    try:
        config = ModernBertDecoderConfig(**given)
    except StrictDataclassError as error:
        pytest.skip(f"transformers refuses its own defaults: {error}")
    model = ModernBertDecoderForCausalLM(config)
    singles = [bytes([i]) for i in range(256)]
    new = Vocab.from_tokens([*singles, b"20"], ranked=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    as_it_was = model.config.to_dict()
    with pytest.raises(ModelSourceError, match="needs a pad_token_id, which the new tokenizer"):
        Pair(new, Vocab.from_tokens(singles, ranked=True), cache_dir=False).transfer_embeddings(
            model
        )
    assert model.config.to_dict() == as_it_was
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
