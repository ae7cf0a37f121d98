"""Each layer attends to what the model's own mask lets it, whether or not its attention module passes a window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.masking_utils import create_chunked_causal_mask

from kvpatch.caches.kvcache import PAD
from kvpatch.engine.backend import fast_of
from kvpatch.engine.decode import decode
from kvpatch.engine.prefill import prefill
from kvpatch.errors import ModelError
from kvpatch.models.backbone import Backbone
from kvpatch.models.masks import LayerMask, classify
from kvpatch.models.probe import native_logits
from tiny import CONTEXT, LAYERS, WINDOW, random_prompts, tiny_hf, tiny_of

pytestmark = pytest.mark.model

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
QWEN_MOE = {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32, "use_sliding_window": True}
W, NONE = WINDOW, None
# name: (class of its configuration, settings, windows by layer)
WINDOWED: dict[str, tuple[str, dict[str, Any], tuple[int | None, ...]]] = {
    "phimoe": ("PhimoeConfig", {"sliding_window": W, "num_local_experts": 4, "num_experts_per_tok": 2}, (W,) * 4),
    "phimoe without": ("PhimoeConfig", {"sliding_window": None, "num_local_experts": 4}, (NONE,) * 4),
    "qwen2_moe": ("Qwen2MoeConfig", {**QWEN_MOE, "sliding_window": W, "max_window_layers": 2}, (W, NONE, NONE, NONE)),
    "qwen2_moe, layers named": (
        "Qwen2MoeConfig",
        {**QWEN_MOE, "sliding_window": W, "layer_types": ["full_attention"] + ["sliding_attention"] * 3},
        (NONE, W, W, W),
    ),
    "qwen2 without": ("Qwen2Config", {"sliding_window": W, "use_sliding_window": False}, (NONE,) * 4),
    "qwen2, last layers": (
        "Qwen2Config",
        {"sliding_window": W, "use_sliding_window": True, "max_window_layers": 2},
        (NONE, NONE, W, W),
    ),
    "mixtral": ("MixtralConfig", {"sliding_window": W, "num_local_experts": 4}, (W,) * 4),
    "starcoder2": ("Starcoder2Config", {"sliding_window": W}, (W,) * 4),
    "phi3": ("Phi3Config", {"sliding_window": W}, (W,) * 4),
    "cohere2": ("Cohere2Config", {"sliding_window": W, "head_dim": 12}, (W, W, W, NONE)),
    "olmo3": ("Olmo3Config", {"sliding_window": W}, (W, W, W, NONE)),
    "smollm3, no positions in the last layer": (
        "SmolLM3Config",
        {"no_rope_layers": [1, 1, 1, 0], "use_sliding_window": True, "sliding_window": W},
        (NONE, NONE, NONE, W),
    ),
}


def made(name: str, **changes: Any):
    kind, settings, _ = WINDOWED[name]
    return tiny_of(kind, **{**settings, **changes})


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# --- equal to transformers past the window ---


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_are_those_of_the_masks(name: str):
    assert Backbone(made(name)).geometry.windows == WINDOWED[name][2]


@pytest.mark.parametrize("name", WINDOWED)
def test_padded_rows_past_the_window_equal_single_native_rows(name: str):
    hf = made(name)
    backbone = Backbone(hf)
    rows = [list(p.token_ids) for p in random_prompts([3 * W + 5, W - 1, W + 1], seed=1)]
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    positions = torch.tensor([[PAD] * (width - len(row)) + list(range(len(row))) for row in rows])
    logits = backbone.logits(backbone.forward(tokens, positions, backbone.slab(len(rows), width)))
    for number, row in enumerate(rows):
        assert off(logits[number, -len(row) :], native_logits(hf, torch.tensor([row]))[0]) < 1e-5


@pytest.mark.parametrize("name", ["phimoe", "qwen2_moe", "qwen2, last layers"])
def test_decoding_across_the_window_equals_native_greedy(name: str):
    hf = made(name)
    backbone = Backbone(hf)
    (prompt,) = random_prompts([W - 3], seed=2)
    written = decode(backbone, prefill(backbone, [prompt]), max_new_tokens=10, temperature=0, seeds=[0])
    ids = [*prompt.token_ids]
    for _ in range(10):
        ids.append(int(native_logits(hf, torch.tensor([ids]))[0, -1].argmax()))
    assert written.token_ids[0].tolist() == ids[-10:]


def test_the_mask_counts_where_a_module_passes_another_window():
    hf: Any = tiny_hf("mistral")
    for block in hf.model.layers:
        block.self_attn.sliding_window = 4  # eager and sdpa attention pay no heed to it
    backbone = Backbone(hf)
    assert backbone.geometry.windows == (WINDOW,) * LAYERS
    ids = torch.tensor([random_prompts([40])[0].token_ids])
    ours = backbone.logits(backbone.forward(ids, torch.arange(40)[None], backbone.slab(1, 40)))
    assert off(ours, native_logits(hf, ids)) < 1e-5


@pytest.mark.parametrize("window", [4096, 32_768])
def test_windows_far_longer_than_what_is_run_are_read(window: int):
    hf = made("phimoe", sliding_window=window, max_position_embeddings=131_072)
    assert Backbone(hf).geometry.windows == (window,) * LAYERS


def test_a_window_as_long_as_the_context_is_none():
    assert Backbone(made("phimoe", sliding_window=CONTEXT)).geometry.windows == (None,) * LAYERS


def test_reading_masks_leaves_no_trace():
    hf = made("phimoe")
    before = hf.config._attn_implementation
    Backbone(hf)
    assert hf.config._attn_implementation == before


# --- kinds of masks ---


def window_of(size: int):
    return lambda row, head, query, slot: (slot <= query) & (slot > query - size)


def chunk_of(size: int):
    return lambda row, head, query, slot: (slot <= query) & (slot // size == query // size)


KNOWN = {
    "full": (lambda row, head, query, slot: slot <= query, LayerMask()),
    "window": (window_of(50), LayerMask(window=50)),
    "window of 1": (window_of(1), LayerMask(window=1)),
    "window one short of the context": (window_of(999), LayerMask(window=999)),
    "chunks": (chunk_of(64), LayerMask(chunk=64)),
}
UNKNOWN = {
    "both ways": (lambda row, head, query, slot: query >= 0, "later ones"),
    "a prefix both ways": (lambda row, head, query, slot: (slot <= query) | (slot < 5), "later ones"),
    "both ways within a window": (lambda row, head, query, slot: (query - slot).abs() < 9, "later ones"),
    "every other slot": (lambda row, head, query, slot: (slot <= query) & ((query - slot) % 2 == 0), "neither full"),
    "sinks before a window": (
        lambda row, head, query, slot: (slot <= query) & ((slot > query - 50) | (slot < 4)),
        "neither full",
    ),
    "a window and a global slot": (
        lambda row, head, query, slot: (slot <= query) & ((slot > query - 50) | (slot == 7)),
        "neither full",
    ),
    "groups of a table": (lambda row, head, query, slot: torch.zeros(3)[query] == torch.zeros(3)[slot], "of its own"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_masks_are_told_by_their_rule(name: str):
    rule, expected = KNOWN[name]
    assert classify(rule, 1000, 0, torch.device("cpu")) == expected


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_masks_are_refused(name: str):
    rule, reason = UNKNOWN[name]
    with pytest.raises(ModelError, match=reason):
        classify(rule, 1000, 3, torch.device("cpu"))


# --- refusals ---


def test_bidirectional_gemma3_is_refused_by_name():
    hf = tiny_of("Gemma3TextConfig", head_dim=12, sliding_window=W, use_bidirectional_attention=True)
    with pytest.raises(ModelError, match=r"^Gemma3ForCausalLM: layer 0 lets tokens see later ones") as refusal:
        Backbone(hf)
    assert "\n" not in str(refusal.value)


def test_doge_whose_mask_depends_on_the_values_is_refused_by_name():
    with pytest.raises(ModelError, match=r"^DogeForCausalLM: layer 0 makes a mask of its own"):
        Backbone(tiny_of("DogeConfig"))


def test_a_layer_that_hides_more_in_longer_texts_only_is_refused(monkeypatch: pytest.MonkeyPatch):
    hf: Any = tiny_hf("llama")
    attention = hf.model.layers[1].self_attn
    forward = attention.forward

    def sparse(hidden_states, position_embeddings=None, attention_mask=None, **rest):
        changed = None if attention_mask is None else attention_mask.clone()
        if changed is not None and hidden_states.shape[1] > 100:
            changed[..., 50] = torch.finfo(changed.dtype).min
        return forward(hidden_states, position_embeddings=position_embeddings, attention_mask=changed, **rest)

    monkeypatch.setattr(attention, "forward", sparse)
    with pytest.raises(ModelError, match="layer 1 makes a mask of its own"):
        Backbone(hf)


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch):
    """A Llama that attends in chunks of 16 tokens."""
    monkeypatch.setattr(transformers.models.llama.modeling_llama, "create_causal_mask", create_chunked_causal_mask)
    hf = tiny_hf("llama")
    hf.config.attention_chunk_size = 16
    return hf


def test_a_model_that_attends_in_chunks_is_followed_past_its_first_chunk(chunked):
    backbone = Backbone(chunked)
    assert (backbone.geometry.windows, backbone.geometry.chunks) == ((None,) * LAYERS, (16,) * LAYERS)
    assert backbone.geometry.context > 40
    ids = torch.tensor([random_prompts([40])[0].token_ids])
    ours = backbone.logits(backbone.forward(ids, torch.arange(40)[None], backbone.slab(1, 40)))
    assert off(ours, native_logits(chunked, ids)) < 1e-5
    assert fast_of(backbone).network is None  # the engine's own step knows no chunks
