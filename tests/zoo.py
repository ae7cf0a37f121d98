"""A tiny random model of every causal class that the installed transformers has, by its `model_type`.

A class's own default configuration is taken and its sizes are shrunk by name, sub-configurations too. Where a class
wants sizes that belong together, `TWEAKS` says which.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tiny import VOCABULARY

LAYERS, WINDOW, CONTEXT, WIDTH = 4, 16, 128, 48
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), LAYERS
    ),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "attention_head_size", "kv_channels", "attention_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "dense_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "intermediate_size_mlp", "intermediate_size_expert"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"), CONTEXT),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "local_attention", "window_size"), WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 4),
    **dict.fromkeys(("qk_rope_head_dim",), 8),
    **dict.fromkeys(("qk_nope_head_dim",), 8),
    **dict.fromkeys(("v_head_dim",), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), 1),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "mamba_state_dim"), 8),
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_expand": 2,
    "expand": 2,
    "time_step_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "lru_width": WIDTH,
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 3,
    "max_window_layers": 2,
    "mlp_hidden_size": 64,
    "num_nextn_predict_layers": 0,
}
LIKELY: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
    "init_std": 0.15,
    "tie_word_embeddings": False,
    "is_decoder": True,
    "router_jitter_noise": 0.0,
}
_AS_MANY_KV_HEADS = {"num_key_value_heads": 4}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
TWEAKS: dict[str, dict[str, Any]] = {
    **{
        key: {**_AS_MANY_KV_HEADS, "head_dim": 8}
        for key in ("axk1", "deepseek_v3", "longcat_flash", "youtu", "sarvam_mla")
    },
    **{
        key: {**_AS_MANY_KV_HEADS, "index_n_heads": 4, "index_topk": 16}
        for key in ("axk2", "deepseek_v32", "glm_moe_dsa")
    },
    "bailing_hybrid": {**_AS_MANY_KV_HEADS, "num_experts_per_tok": 2},
    "deepseek_v2": {**_AS_MANY_KV_HEADS, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "helium": {"head_dim": 12},
    "kimi_linear": {"num_experts_per_token": 2, "num_experts_per_tok": 2},
    "mamba2": {"num_heads": 6},
    "falcon_h1": {"mamba_d_ssm": 96},
    "stablelm": {"hidden_size": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_oss": {"num_experts_per_tok": 4},
    **{key: {"text_config": _MROPE} for key in ("qwen2_vl", "qwen2_5_vl")},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "layer_types": ["mamba", "hybrid"] * 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "lfm2_moe": {"num_experts_per_tok": 2, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "xmod": {"default_language": "en_XX"},
    "xlm": {"emb_dim": 48, "n_words": VOCABULARY},
}


def causal_types() -> list[str]:
    """Every `model_type` that transformers has a causal class for."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def multimodal_types() -> list[str]:
    """Every further `model_type` whose class reads images or the like and writes text."""
    return [
        kind for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ]


def small_config(kind: str, **changes: Any) -> Any:
    """The configuration of a tiny model; `changes` replaces what was found."""
    made = CONFIG_MAPPING[kind]
    settings = _shrunk(made, made().to_dict(), TWEAKS.get(kind, {}))
    return made(**{**settings, **changes})


def _shrunk(made: Any, default: Mapping[str, Any], tweaks: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a configuration class with its sizes shrunk; only those that it has."""
    names = getattr(made, "attribute_map", {}) or {}
    settings: dict[str, Any] = {}
    subs = getattr(made, "sub_configs", {}) or {}
    for name, value in default.items():
        if (
            name in ("model_type", "transformers_version", "architectures", "layer_types", "mlp_layer_types")
            or name in names
        ):
            continue
        if name in subs and isinstance(value, Mapping):
            inner = CONFIG_MAPPING[value["model_type"]] if value.get("model_type") in CONFIG_MAPPING else subs[name]
            inside = tweaks.get(name, {})
            settings[name] = _shrunk(inner, value, inside if isinstance(inside, Mapping) else {})
            if value.get("model_type"):
                settings[name]["model_type"] = value["model_type"]
        elif name in SIZES and (isinstance(value, int) or value is None) and not isinstance(value, bool):
            if value is not None or name in ("num_key_value_heads", "head_dim"):
                settings[name] = SIZES[name]
        elif name in LIKELY:
            settings[name] = LIKELY[name]
        elif "drop" in name and isinstance(value, float):
            settings[name] = 0.0
    if isinstance(default.get("layer_types"), list):
        kinds = list(dict.fromkeys(default["layer_types"]))
        settings["layer_types"] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    if isinstance(default.get("mlp_layer_types"), list):
        kinds = list(dict.fromkeys(default["mlp_layer_types"]))
        settings["mlp_layer_types"] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    return {**settings, **{name: value for name, value in tweaks.items() if name not in subs}}


def tiny_causal(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model; norms and biases are neither one nor zero, so that all of them count."""
    config = small_config(kind, **changes)
    auto = AutoModelForCausalLM if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        hf = auto.from_config(config).float().eval()
        for parameter in hf.parameters():
            if not bool(parameter.isfinite().all()):
                parameter.data = torch.zeros_like(parameter)
            if parameter.ndim == 1 or not bool(parameter.any()):
                parameter.data += 0.1 * torch.randn_like(parameter)
    return hf.requires_grad_(False)
