"""Model families beside Llama's: each patched as transformers alone has it, or refused by what it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

import kvpatch as kv
from kvpatch.caches.rope import LayerRope
from kvpatch.checks.identities import check
from kvpatch.engine.head_statistics import CLASSES, Block, block_statistics
from kvpatch.errors import ModelError
from slow_reference import BOUND, Slow, compare
from tiny import CHATML, prompt_of, tiny_tokenizer
from zoo import tiny_causal

pytestmark = pytest.mark.model

MOVING = {
    "gpt_oss": "attention sinks, windows",
    "mimo_v2_flash": "attention sinks in some layers, two rotations",
    "gptj": "interleaved partial rotation from a table of sines",
    "nanochat": "rotation the other way round, a norm without weights behind it",
    "diffllama": "attention twice with one query",
    "llama4_text": "chunks, layers without positions, a decoder that base_model does not name",
    "gemma3": "the text part of a wrapper",
    "qwen2_vl": "a wrapper that no causal class takes, with three-part positions",
}
LATELY = ("gptj",)
"""Kinds whose attention older versions of transformers write out by themselves; docs/models.md says under which."""
BEFORE_5_24 = {"recurrent_gemma": "keeps a state that goes from token to token, not a KV cache, in some of its layers"}
"""What is said of kinds whose configuration did not yet tell which layers keep a state."""
FIXED = {
    "hunyuan_v1_dense": "a norm with weights behind the rotation",
}


@pytest.fixture
def built(tmp_path: Path) -> Callable[[str], Path]:
    """Saves a tiny model of a kind with its tokenizer, and gives the directory."""

    def build(kind: str) -> Path:
        tiny_causal(kind).save_pretrained(tmp_path / kind)
        tiny_tokenizer(CHATML).save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return build


@pytest.mark.parametrize("kind", [*MOVING, *FIXED])
def test_a_family_gives_what_transformers_alone_gives(kind: str, built: Callable[[str], Path]):
    home = tiny_causal(kind).__class__.__module__
    if not hasattr(sys.modules[home], "ALL_ATTENTION_FUNCTIONS") and kind in LATELY:
        pytest.skip(f"transformers {transformers.__version__} writes {kind}'s attention out in code of its own")
    model = kv.load(built(kind), device="cpu")
    assert [i.identity for i in check(model) if i.holds is False] == []
    errors, refused = compare(model, Slow(tiny_causal(kind)))
    assert {name: error for name, error in errors.items() if not error <= BOUND} == {}
    assert {"natural", "whole", "k in place", "v in place", "kv in place"} <= set(errors)
    assert ("moved" in errors) == (kind in MOVING)
    if kind in FIXED:
        assert "parts='v'" in refused["moved"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mamba", "MambaForCausalLM keeps a state that goes from token to token, not a KV cache"),
        ("mamba2", "Mamba2ForCausalLM keeps a state that goes from token to token, not a KV cache"),
        ("rwkv", "RwkvForCausalLM keeps a state that goes from token to token, not a KV cache"),
        ("bamba", "BambaForCausalLM is a hybrid: layers 0 and 2 of 4 keep a state"),
        ("qwen3_next", "Qwen3NextForCausalLM is a hybrid: "),
        ("recurrent_gemma", "RecurrentGemmaForCausalLM is a hybrid: "),
        ("falcon_h1", "all have a KV cache beside it"),
        ("deepseek_v3", "such as the latent and the rotary part of multi-head latent attention"),
        ("deepseek_v32", "keep more than keys and values"),
        ("bart", "BartForCausalLM takes no positions"),
        ("bloom", "BloomForCausalLM takes no positions"),
        ("electra", "something stands between its last layer and its output head"),
        ("doge", "makes a mask of its own"),
        ("gpt_neo", "GPTNeoForCausalLM computes attention in code of its own"),
    ],
)
def test_what_cannot_be_patched_is_refused_by_what_it_is(kind: str, words: str, built: Callable[[str], Path]):
    with pytest.raises(ModelError) as error:
        kv.load(built(kind), device="cpu")
    is_old = Version(transformers.__version__) < Version("5.24")
    assert words in str(error.value) or (is_old and BEFORE_5_24.get(kind, words) in str(error.value))
    assert "\n" not in str(error.value)
    assert "SlabLayer" not in str(error.value)


def test_each_theta_of_gemma_3_turns_the_keys_of_its_own_layers(built: Callable[[str], Path]):
    """Fails where one rotation is used for all layers: moved keys are compared with a prefill at the new positions."""
    model, slow = kv.load(built("gemma3_text"), device="cpu"), Slow(tiny_causal("gemma3_text"))
    local, full = model.geometry.rope[0], model.geometry.rope[-1]
    assert model.geometry.windows[0] is not None and model.geometry.windows[-1] is None
    assert local != full
    assert compare(model, slow)[0]["moved"] <= BOUND
    for one in (local, full):
        object.__setattr__(model.geometry, "rope", (one,) * model.geometry.layers)
        assert compare(model, slow)[0]["moved"] > 10 * BOUND


def test_a_rotation_that_cannot_be_undone_lets_no_key_move(built: Callable[[str], Path]):
    model = kv.load(built("hunyuan_v1_dense"), device="cpu")
    assert set(model.geometry.rope) == {LayerRope("fixed")}
    long, short = (model.prefill([prompt_of(range(20, 20 + n))]) for n in (12, 7))
    with pytest.raises(kv.KvpatchError, match="can't be moved to another position"):
        kv.Patch(slots="all", align="end").apply(long, short)
    values = kv.Patch(slots="all", align="end", parts="v").apply(long, short)
    assert torch.equal(values.keys[0], short.keys[0])
    assert not torch.equal(values.values[0], short.values[0])


def test_a_sink_takes_its_share_of_every_mass():
    """Against probabilities written out: a sink is one more score that belongs to no slot."""
    scores, sinks = torch.randn(2, 4, 3, 5), torch.randn(4)
    bias = torch.zeros(2, 1, 3, 5).masked_fill(torch.ones(3, 5).triu(3).bool(), float("-inf"))
    classes, at = torch.ones(2, len(CLASSES), 5), torch.arange(5).expand(2, 5)
    _, p = block_statistics(Block(scores.clone(), bias, classes, at, at, sinks))
    both = torch.cat([scores + bias, sinks[None, :, None, None].expand(2, 4, 3, 1)], dim=-1)
    assert torch.allclose(p, both.softmax(dim=-1)[..., :5], atol=1e-6)
