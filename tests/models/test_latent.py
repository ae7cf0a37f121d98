"""What a model caches are keys and values, or it is refused by name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import kvpatch as kv
import tiny
from kvpatch.caches.rope import LayerRope, rotate
from kvpatch.errors import ModelError
from kvpatch.models.backbone import Backbone
from kvpatch.models.probe import _layer_rope
from tiny import tiny_hf, tiny_tokenizer

pytestmark = pytest.mark.model

tiny_of = functools.partial(tiny.tiny_of, num_hidden_layers=2, num_key_value_heads=4)
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
OF_LATENT = {
    "DeepseekV2ForCausalLM": ("DeepseekV2Config", {**LATENT, **ROUTED}),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", {**LATENT, **ROUTED}),
    "MiniCPM3ForCausalLM": ("MiniCPM3Config", LATENT),
    "YoutuForCausalLM": ("YoutuConfig", LATENT),
    "Glm4MoeLiteForCausalLM": ("Glm4MoeLiteConfig", {**LATENT, **ROUTED}),
}
# One head, and a latent and a rotary part of the shape of its keys and values.
LOOKS_RIGHT = {"num_attention_heads": 1, "num_key_value_heads": 1, "kv_lora_rank": 16, "q_lora_rank": 16}
LOOKS_RIGHT |= {"qk_rope_head_dim": 16, "qk_nope_head_dim": 0, "v_head_dim": 16}


@pytest.mark.parametrize("name", OF_LATENT)
def test_a_cache_of_latents_is_refused_by_name_in_one_sentence(name: str):
    kind, settings = OF_LATENT[name]
    with pytest.raises(ModelError, match=f"^{name} caches other things than the keys and values") as refusal:
        Backbone(tiny_of(kind, **settings))
    assert "latent" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_load_refuses_it_too(tmp_path):
    kind, settings = OF_LATENT["DeepseekV3ForCausalLM"]
    tiny_of(kind, **settings).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="latent"):
        kv.load(tmp_path, device="cpu")


def test_a_latent_of_the_shape_of_keys_is_told_by_what_it_holds():
    with pytest.raises(ModelError, match=r"^YoutuForCausalLM caches other things"):
        Backbone(tiny_of("YoutuConfig", **LOOKS_RIGHT))


def test_keys_and_values_of_unlike_shape_are_refused():
    hf = tiny_of(
        "MiMoV2FlashConfig",
        head_dim=12,
        v_head_dim=16,
        swa_head_dim=12,
        swa_v_head_dim=16,
        num_key_value_heads=2,
        **ROUTED,
    )
    with pytest.raises(ModelError, match=r"^MiMoV2FlashForCausalLM caches keys of . heads of 12 numbers, but values"):
        Backbone(hf)


def test_cached_heads_that_attention_repeats_are_taken():
    geometry = Backbone(tiny_of("JetMoeConfig", num_key_value_heads=2, kv_channels=12, num_local_experts=4)).geometry
    assert (geometry.kv_heads, geometry.query_heads) == (2, 4)


# --- keys that a model makes of a latent before it caches them ---


class Slab:
    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.slab_layers = [self]
        self.keys, self.values = keys, values


@pytest.mark.parametrize("size", [1.0, 1e-2])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_with_a_rotary_part_at_its_end_stays_where_it_is_however_small_the_part(
    layout, size: float, dtype: torch.dtype
):
    backbone = Backbone(tiny_hf("llama").to(dtype))
    rope = LayerRope(layout, backbone.geometry.rope[0].inv_freq)
    torch.manual_seed(0)
    still, part, values = torch.randn(1, 2, 1, 16), size * torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 32)
    turned = rotate(part, torch.tensor([[37]]), rope)
    slabs: Any = [Slab(torch.cat([still, x], dim=3).to(dtype), values.to(dtype)) for x in (part, turned)]
    assert _layer_rope(backbone, 0, slabs) == LayerRope("fixed")
