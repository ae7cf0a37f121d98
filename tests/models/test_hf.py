"""The backbone: geometry is probed right, its forward pass is the model's own, and it leaves no trace in the model."""

from __future__ import annotations

import pytest
import torch

import kvpatch.models.backbone as backbone_room
import kvpatch.models.probe as probe_room
from kvpatch.caches.kvcache import PAD
from kvpatch.caches.rope import LayerRope
from kvpatch.errors import ModelError
from kvpatch.models.backbone import Backbone
from kvpatch.models.probe import native_logits
from tiny import ARCHITECTURES, LAYERS, REFUSED, VOCABULARY, WINDOW, random_prompts, tiny_hf

pytestmark = pytest.mark.model

MIXED = (WINDOW, None, WINDOW, None)
FULL = (None,) * LAYERS
# architecture: (transformers' class, rope layout, rotary_dim, windows, query_heads, kv_heads, head_dim)
EXPECTED = {
    "llama": ("LlamaForCausalLM", "half", 16, FULL, 4, 2, 16),
    "mistral": ("MistralForCausalLM", "half", 16, (WINDOW,) * LAYERS, 4, 2, 16),
    "qwen2": ("Qwen2ForCausalLM", "half", 12, FULL, 4, 2, 12),
    "qwen3": ("Qwen3ForCausalLM", "half", 16, FULL, 4, 2, 16),
    "gemma2": ("Gemma2ForCausalLM", "half", 16, MIXED, 4, 2, 16),
    "gemma3": ("Gemma3ForCausalLM", "half", 16, MIXED, 4, 2, 16),
    "gpt_neox": ("GPTNeoXForCausalLM", "half", 6, FULL, 4, 4, 12),
    "phi3": ("Phi3ForCausalLM", "half", 12, FULL, 4, 2, 12),
    "cohere": ("CohereForCausalLM", "interleaved", 12, FULL, 4, 2, 12),
    "gpt2": ("GPT2LMHeadModel", "absolute", 0, FULL, 4, 4, 12),
}


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def forward(backbone: Backbone, rows: list[list[int]], cuts: tuple[int, ...] = ()) -> torch.Tensor:
    """Logits of our forward pass over left-padded rows, fed in pieces that end at `cuts`."""
    longest = max(len(row) for row in rows)
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    positions = torch.tensor([[PAD] * (longest - len(row)) + list(range(len(row))) for row in rows])
    slab, out = backbone.slab(len(rows), longest), []
    for low, high in zip((0, *cuts), (*cuts, longest), strict=True):
        out.append(backbone.logits(backbone.forward(tokens[:, low:high], positions[:, low:high], slab)))
    return torch.cat(out, dim=1)


# --- geometry ---


def test_every_tiny_architecture_has_its_expected_geometry_here():
    assert set(EXPECTED) == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_geometry_is_probed_right(architecture: str, tiny):
    name, layout, rotary_dim, windows, query_heads, kv_heads, head_dim = EXPECTED[architecture]
    g = tiny(architecture).geometry
    assert (g.architecture, g.layers, g.vocabulary, g.context) == (name, LAYERS, VOCABULARY, 256)
    assert (g.query_heads, g.kv_heads, g.head_dim, g.windows) == (query_heads, kv_heads, head_dim, windows)
    assert [(rope.layout, rope.rotary_dim) for rope in g.rope] == [(layout, rotary_dim)] * LAYERS


def test_each_layer_of_gemma3_gets_the_frequencies_of_its_own_theta(tiny):
    rope = tiny("gemma3").geometry.rope
    for layer, theta in enumerate([100.0, 10_000.0] * 2):
        expected = [theta ** (-2 * i / 16) for i in range(8)]
        assert rope[layer].inv_freq == pytest.approx(expected, rel=1e-6)


# --- the model's own logits ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_equals_native_logits_past_the_window(architecture: str, tiny):
    model = tiny(architecture)
    ids = list(random_prompts([3 * WINDOW + 5])[0].token_ids)
    assert off(forward(model.backbone, [ids]), native_logits(model.hf, torch.tensor([ids]))) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_rows_fed_in_pieces_equal_single_native_rows(architecture: str, tiny):
    model = tiny(architecture)
    rows = [list(p.token_ids) for p in random_prompts([40, 7, 23, 1], seed=1)]
    ours = forward(model.backbone, rows, cuts=(18, 19, 35))
    for row, ids in enumerate(rows):
        assert off(ours[row, -len(ids) :], native_logits(model.hf, torch.tensor([ids]))[0]) < 1e-5


def test_branches_see_what_all_see_and_themselves_but_not_one_another(tiny):
    model = tiny("gemma3")
    ids = list(random_prompts([30], seed=2)[0].token_ids)
    stem, left, right = ids[:20], ids[20:25], ids[25:]
    slab = model.backbone.slab(1, 30)
    model.backbone.forward(torch.tensor([stem]), torch.arange(20)[None], slab)
    positions = torch.tensor([[*range(20, 25), *range(20, 25)]])
    branches = torch.tensor([[1] * 5 + [2] * 5])
    ours = model.backbone.logits(model.backbone.forward(torch.tensor([left + right]), positions, slab, branches))[0]
    assert off(ours[:5], native_logits(model.hf, torch.tensor([stem + left]))[0, 20:]) < 1e-5
    assert off(ours[5:], native_logits(model.hf, torch.tensor([stem + right]))[0, 20:]) < 1e-5


def test_a_full_slab_takes_no_more(tiny):
    backbone = tiny("llama").backbone
    slab = backbone.slab(1, 2)
    with pytest.raises(ModelError, match="a slab of 2 slots can't take 3"):
        backbone.forward(torch.tensor([[9, 9, 9]]), torch.arange(3)[None], slab)


# --- no trace in the model ---


def greedy(hf, ids: list[int]) -> list[int]:
    tokens = torch.tensor([ids])
    mask = torch.ones_like(tokens)
    return hf.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)[0].tolist()


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_the_model_is_untouched_before_and_after_our_forward(architecture: str):
    hf = tiny_hf(architecture)
    ids = list(random_prompts([20])[0].token_ids)
    attention, text = hf.config._attn_implementation, greedy(hf, ids)
    weights = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    backbone = Backbone(hf)
    assert hf.config._attn_implementation == attention
    forward(backbone, [ids])
    assert hf.config._attn_implementation == attention
    assert greedy(hf, ids) == text
    assert all(torch.equal(tensor, weights[name]) for name, tensor in hf.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())


def test_attention_is_restored_after_an_exception_in_our_forward():
    hf = tiny_hf("llama")
    ids = list(random_prompts([20])[0].token_ids)
    attention, text = hf.config._attn_implementation, greedy(hf, ids)
    backbone = Backbone(hf)

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    handle = backbone.blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        forward(backbone, [ids])
    handle.remove()
    assert hf.config._attn_implementation == attention
    assert greedy(hf, ids) == text
    assert off(forward(backbone, [ids]), native_logits(hf, torch.tensor([ids]))) < 1e-5


# --- refusals ---

REASONS = {
    "mamba": "MambaForCausalLM keeps a state that goes from token to token, not a KV cache",
    "bloom": "BloomForCausalLM takes no positions",
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_models_that_cannot_be_patched_are_refused_by_name_in_one_line(architecture: str):
    hf = tiny_hf(architecture)
    attention = hf.config._attn_implementation
    with pytest.raises(ModelError) as refusal:
        Backbone(hf)
    assert str(refusal.value).startswith(REASONS[architecture])
    assert "\n" not in str(refusal.value)
    assert hf.config._attn_implementation == attention


def test_keys_that_turn_in_an_unknown_way_stay_where_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe_room, "rotate", lambda keys, delta, rope: keys)
    assert set(Backbone(tiny_hf("llama")).geometry.rope) == {LayerRope("fixed")}


def test_a_model_whose_logits_we_do_not_give_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Backbone, "scaled", lambda self, logits: logits)
    with pytest.raises(ModelError, match="Gemma2ForCausalLM: our forward pass does not give the model's own logits"):
        Backbone(tiny_hf("gemma2"))


# --- log-probabilities of single tokens ---


@pytest.mark.parametrize("chunk", [1, 100, 384, 16_384])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere"])  # plain; softcapped logits; scaled logits
def test_token_logprobs_equal_log_softmax_whatever_the_chunk(
    architecture: str, chunk: int, tiny, monkeypatch: pytest.MonkeyPatch
):
    model = tiny(architecture)
    ids = torch.tensor([random_prompts([31], seed=3)[0].token_ids])
    hidden = model.backbone.forward(ids, torch.arange(31)[None], model.backbone.slab(1, 31))[0]
    expected = native_logits(model.hf, ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    monkeypatch.setattr(backbone_room, "VOCABULARY_CHUNK", chunk)
    found = model.backbone.token_logprobs(hidden[:-1], ids[0, 1:])
    assert found.dtype == torch.float32
    assert off(found, expected) < 1e-5


def test_token_logprobs_add_the_bias_of_the_output_head():
    hf = tiny_hf("llama")
    hf.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, VOCABULARY), requires_grad=False)
    backbone = Backbone(hf)
    ids = torch.tensor([random_prompts([9])[0].token_ids])
    hidden = backbone.forward(ids, torch.arange(9)[None], backbone.slab(1, 9))[0]
    expected = native_logits(hf, ids)[0].log_softmax(-1).gather(1, ids[0, :, None])[:, 0]
    assert off(backbone.token_logprobs(hidden, ids[0]), expected) < 1e-5
