"""RoPE whose frequencies depend on the length: right up to where they change, refused past it, whoever ran before."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kvpatch as kv
import tiny
from kvpatch.caches.kvcache import KVCache
from kvpatch.caches.rope import rotate
from kvpatch.engine.attention import AttentionRequest
from kvpatch.engine.decode import decode
from kvpatch.engine.prefill import prefill, prefill_with_attention
from kvpatch.engine.score import score
from kvpatch.errors import KvpatchError, ModelError, ProtocolError
from kvpatch.models.backbone import Backbone
from kvpatch.models.limits import rotary_switch
from kvpatch.models.probe import native_logits
from tiny import prompt_of, random_prompts, tiny_hf, tiny_tokenizer

pytestmark = pytest.mark.model

SWITCH = 64
tiny_of = functools.partial(tiny.tiny_of, hidden_size=64)
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 2 * i for i in range(8)],
    "original_max_position_embeddings": SWITCH,
    "factor": 4.0,
}
STRETCHED = {**LONG, "short_factor": [1.0 + 0.1 * i for i in range(8)], "attention_factor": 1.3}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
MSCALES = {"short_mscale": 1.1, "long_mscale": 1.4}
# name: (class of its configuration, settings)
CHANGING: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3, longrope": ("Phi3Config", {"rope_parameters": LONG, "original_max_position_embeddings": SWITCH}),
    "llama, longrope": ("LlamaConfig", {"rope_parameters": LONG}),
    "llama, short factors not 1": ("LlamaConfig", {"rope_parameters": STRETCHED}),
    "qwen2, longrope": ("Qwen2Config", {"rope_parameters": LONG}),
    "phimoe, scales of its own": (
        "PhimoeConfig",
        {"rope_parameters": {**STRETCHED, **MSCALES}, "num_local_experts": 4, "sliding_window": None},
    ),
    "gemma3, in full layers": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": LONG,
            },
        },
    ),
    "llama, dynamic": ("LlamaConfig", {"rope_parameters": DYNAMIC, "max_position_embeddings": SWITCH}),
    "qwen3, dynamic": ("Qwen3Config", {"rope_parameters": DYNAMIC, "max_position_embeddings": SWITCH, "head_dim": 16}),
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": SWITCH}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STEADY = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": YARN,
    "llama3": LLAMA3,
}
REASON = f"at most {SWITCH} tokens, new ones included: past that its rotary frequencies change with the length"


def changing(name: str):
    kind, settings = CHANGING[name]
    return tiny_of(kind, **settings)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def greedy(hf, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(native_logits(hf, torch.tensor([ids]))[0, -1].argmax())]
    return ids[-count:]


# --- right up to the switch ---


@pytest.mark.parametrize("name", CHANGING)
def test_the_context_ends_where_the_frequencies_change(name: str):
    geometry = Backbone(changing(name)).geometry
    assert geometry.context == SWITCH
    assert REASON in geometry.limit


@pytest.mark.parametrize("name", CHANGING)
def test_logits_up_to_the_switch_equal_native_ones(name: str):
    hf = changing(name)
    backbone = Backbone(hf)
    ids = torch.tensor([random_prompts([SWITCH])[0].token_ids])
    ours = backbone.logits(backbone.forward(ids, torch.arange(SWITCH)[None], backbone.slab(1, SWITCH)))
    assert off(ours, native_logits(hf, ids)) < 1e-5


@pytest.mark.parametrize("name", CHANGING)
def test_a_row_alone_equals_the_row_beside_the_longest(name: str):
    backbone = Backbone(changing(name))
    short, long = random_prompts([10, SWITCH])
    alone, mixed = prefill(backbone, [short]), prefill(backbone, [short, long])[0]
    for one, two in zip(alone.keys, mixed.keys, strict=True):
        assert off(two[:, :, -9:], one) < 1e-5


@pytest.mark.parametrize("name", CHANGING)
def test_moved_keys_equal_a_prefill_at_the_new_positions(name: str):
    backbone = Backbone(changing(name))
    (prompt,) = random_prompts([SWITCH - 20])
    cache = prefill(backbone, [prompt])
    later = prefill(backbone, [prompt_of([5] * 20 + list(prompt.token_ids))])
    moved = rotate(cache.keys[0], torch.full_like(cache.positions, 20), cache.rope[0])
    assert off(moved, later.keys[0][:, :, 20:]) < 1e-5


@pytest.mark.parametrize("name", CHANGING)
def test_decoding_up_to_the_switch_equals_native_greedy(name: str):
    hf = changing(name)
    backbone = Backbone(hf)
    (prompt,) = random_prompts([SWITCH - 12])
    written = decode(backbone, prefill(backbone, [prompt]), max_new_tokens=12, temperature=0, seeds=[0])
    assert written.token_ids[0].tolist() == greedy(hf, list(prompt.token_ids), 12)


# --- whoever ran before ---


@pytest.mark.parametrize("name", CHANGING)
def test_a_longer_pass_of_the_model_itself_leaves_no_trace_in_ours(name: str):
    hf = changing(name)
    backbone = Backbone(hf)
    # As long as the context: transformers itself goes back to its first frequencies for shorter passes only.
    ids = torch.tensor([random_prompts([SWITCH])[0].token_ids])

    def run() -> torch.Tensor:
        return backbone.forward(ids, torch.arange(SWITCH)[None], backbone.slab(1, SWITCH))

    before = run()
    native_logits(hf, torch.tensor([random_prompts([SWITCH + 40])[0].token_ids]))
    assert torch.equal(run(), before)


@pytest.mark.parametrize("name", CHANGING)
def test_a_model_that_has_run_far_before_it_is_probed_is_probed_right(name: str):
    hf = changing(name)
    expected = Backbone(hf).geometry
    native_logits(hf, torch.tensor([random_prompts([SWITCH + 40])[0].token_ids]))
    assert Backbone(hf).geometry == expected


# --- refused past the switch ---


PAST: dict[str, Callable[[Backbone, KVCache], object]] = {
    "prefill": lambda backbone, cache: prefill(backbone, random_prompts([10, SWITCH + 1])),
    "any pass": lambda backbone, cache: backbone.forward(
        torch.tensor([[5]]), torch.tensor([[SWITCH]]), backbone.slab(1, 1)
    ),
    "decode": lambda backbone, cache: decode(backbone, cache, max_new_tokens=6, temperature=0, seeds=[0]),
    "score": lambda backbone, cache: score(backbone, cache, [[[5] * 6]]),
}


@pytest.mark.parametrize("what", PAST)
@pytest.mark.parametrize("name", ["phi3, longrope", "llama, longrope", "llama, dynamic"])
def test_nothing_goes_past_the_switch(name: str, what: str):
    backbone = Backbone(changing(name))
    cache = prefill(backbone, random_prompts([SWITCH - 4]))
    with pytest.raises(ProtocolError, match=REASON):
        PAST[what](backbone, cache)


def test_longer_prompts_can_not_be_watched_either():
    backbone = Backbone(changing("llama, longrope"))
    with pytest.raises(KvpatchError, match=f"prompts of 2 to {SWITCH} tokens can be watched"):
        prefill_with_attention(backbone, random_prompts([SWITCH + 1]), AttentionRequest())


def test_load_takes_such_a_model_and_compares_it_at_the_switch(tmp_path):
    changing("llama, longrope").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = kv.load(tmp_path, device="cpu")
    assert model.opinion is not None
    assert model.opinion.lengths[-1] == SWITCH
    with pytest.raises(ProtocolError, match=REASON):
        model.generate(model.prefill("one two", chat=False), max_new_tokens=SWITCH)


# --- others are left alone ---


@pytest.mark.parametrize("kind", STEADY)
def test_steady_frequencies_do_not_end_the_context(kind: str):
    hf = tiny_of("LlamaConfig", rope_parameters=STEADY[kind])
    backbone = Backbone(hf)
    assert (backbone.geometry.context, backbone.geometry.ends_because) == (256, "")
    ids = torch.tensor([random_prompts([SWITCH + 40])[0].token_ids])
    ours = backbone.logits(backbone.forward(ids, torch.arange(SWITCH + 40)[None], backbone.slab(1, SWITCH + 40)))
    assert off(ours, native_logits(hf, ids)) < 1e-5


def test_the_switch_is_the_first_of_all_kinds_of_layers():
    config = tiny_hf("gemma3").config
    config.rope_parameters = {
        "full_attention": LONG,
        "sliding_attention": {**LONG, "original_max_position_embeddings": 32},
    }
    assert rotary_switch(config) == 32


def test_keys_that_depend_on_the_length_in_another_way_are_refused(monkeypatch: pytest.MonkeyPatch):
    hf: Any = tiny_hf("llama")
    forward = hf.model.rotary_emb.forward

    def stretched(x, position_ids):
        factor = 2 if int(position_ids.max()) >= 100 else 1
        return forward(x, position_ids / factor)

    monkeypatch.setattr(hf.model.rotary_emb, "forward", stretched)
    with pytest.raises(ModelError, match="LlamaForCausalLM: the keys of layer 0 depend on how long the text is"):
        Backbone(hf)
