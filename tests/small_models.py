"""Small models of odd families, of random weights that are large enough to be told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import transformers
from torch import nn

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_BERT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 256,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_OPT: dict[str, Any] = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "dropout": 0.0,
}
_MPT: dict[str, Any] = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}
_MIXTURE: dict[str, Any] = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}

# By name: the config's class, the model's, and sizes.
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        _LLAMA | _MIXTURE | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("OPTConfig", "OPTForCausalLM", _OPT),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", "MptForCausalLM", _MPT),
    "mpt with a rule": ("MptConfig", "MptForCausalLM", _MPT | {"logit_scale": "inv_sqrt_d_model"}),
    "rwkv": (
        "RwkvConfig",
        "RwkvForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32},
    ),
    "bart's decoder": ("BartConfig", "BartForCausalLM", _BART),
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4},
    ),
    "bert": ("BertConfig", "BertLMHeadModel", _BERT),
    "causal bert": ("BertConfig", "BertLMHeadModel", _BERT | {"is_decoder": True}),
    "masked bert": ("BertConfig", "BertForMaskedLM", _BERT),
    "xlnet": (
        "XLNetConfig",
        "XLNetLMHeadModel",
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 32},
    ),
    "roberta": (
        "RobertaConfig",
        "RobertaForCausalLM",
        _BERT | {"is_decoder": True, "pad_token_id": 1, "max_position_embeddings": 66},
    ),
    "rembert": (
        "RemBertConfig",
        "RemBertForCausalLM",
        _BERT | {"is_decoder": True, "output_embedding_size": 64, "input_embedding_size": 16},
    ),
}


def small_model(name: str, vocab: int = 160) -> nn.Module:
    """A model in evaluation mode, in float32."""
    config_class, model_class, sizes = _FAMILIES[name]
    config = getattr(transformers, config_class)(vocab_size=vocab, **sizes)
    make = cast("Callable[..., nn.Module]", getattr(transformers, model_class)._from_config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(config).eval()
        with torch.no_grad():
            for each in model.parameters():
                # Some classes leave a table as it lies in memory.
                if not bool(each.isfinite().all()) or float(each.abs().max()) > 1e3:
                    each.normal_(0, 0.02)
                if each.dim() > 1:
                    each.mul_(4)
    return model
