"""A cache knows the model that made it: no other model of the same shape takes it, and no operation forgets it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvpatch as kv
from kvpatch.caches.kvcache import KVCache
from kvpatch.engine.attention import AttentionRequest
from kvpatch.engine.model import Model
from kvpatch.engine.prefill import prefill, prefill_pass, prefill_with_attention
from kvpatch.engine.score import score
from kvpatch.errors import CacheError
from kvpatch.interventions.cache_steering import steer_cache
from kvpatch.interventions.directions import mean_difference
from kvpatch.interventions.donors import make_donor
from kvpatch.interventions.in_prefill import run_in_prefill
from kvpatch.interventions.joined import without_giver
from kvpatch.interventions.reshape import reshape_cache
from kvpatch.interventions.steering import run_value_steering
from kvpatch.specs.interventions import CacheSteering, InPrefill, Reshape, ValueSteering
from tiny import random_prompts, tiny_tokenizer

pytestmark = pytest.mark.model

PROMPTS = random_prompts([20, 24])
FOREIGN = "different models|another model"


@pytest.fixture(scope="module")
def twin(tiny_dirs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of the tiny Llama's shape with one weight changed."""
    where = tmp_path_factory.mktemp("twin") / "llama"
    shutil.copytree(tiny_dirs("llama"), where)
    tensors = load_file(where / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] += 1
    save_file(tensors, where / "model.safetensors", {"format": "pt"})
    return kv.load(where, device="cpu")


def test_identity_is_that_of_weights_and_tokenizer(tiny, tiny_dirs, twin: Model, tmp_path: Path):
    model, again = tiny("llama"), kv.load(tiny_dirs("llama"), device="cpu")
    again.tokenizer(["a", "b c"], padding=True)
    assert model.backbone.identity == again.backbone.identity
    assert len(model.backbone.identity) == 32
    assert len({m.backbone.identity for m in (model, twin, tiny("qwen3"), tiny("gpt2"))}) == 4
    words = shutil.copytree(tiny_dirs("llama"), tmp_path / "words")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["kvpatch"])
    tokenizer.save_pretrained(words)
    assert kv.load(words, device="cpu").backbone.identity != model.backbone.identity


def test_caches_of_two_loads_of_one_directory_may_be_mixed(tiny, tiny_dirs):
    model, again = tiny("llama"), kv.load(tiny_dirs("llama"), device="cpu")
    ours, theirs = (prefill(m.backbone, PROMPTS) for m in (model, again))
    mixed = kv.Patch(align="replace").apply(theirs, ours)
    assert KVCache.concat([ours, theirs, mixed]).batch == 6
    assert torch.equal(
        model.generate(mixed, max_new_tokens=3).token_ids, again.generate(ours, max_new_tokens=3).token_ids
    )
    again.score(mixed, [[9], [10]])


def test_weights_changed_after_loading_leave_the_model_s_own_caches_valid(tiny_dirs):
    model = kv.load(tiny_dirs("llama"), device="cpu")
    cache = prefill(model.backbone, PROMPTS)
    model.hf.lm_head.weight.data += 0.1
    assert model.score(cache, [[9], [10]]).shape == (2, 1)


def test_another_model_of_the_same_shape_takes_no_cache(tiny, twin: Model):
    model = tiny("llama")
    ours, theirs = (prefill(m.backbone, PROMPTS) for m in (model, twin))
    assert (ours.rope, ours.keys[0].shape) == (theirs.rope, theirs.keys[0].shape)
    for attempt in (
        lambda: twin.generate(ours, max_new_tokens=2),
        lambda: twin.score(ours, [[9], [10]]),
        lambda: score(twin.backbone, ours, [[[9]], [[10]]]),
        lambda: kv.Patch().apply(ours, theirs),
        lambda: kv.Patch(slots=[-1]).apply(theirs[0], ours),
        lambda: kv.Patch(donor="mean").apply(ours, ours, reference=theirs),
        lambda: make_donor("gaussian_fitted", ours, [0, 1], theirs),
        lambda: KVCache.concat([ours, theirs]),
        lambda: reshape_cache(ours, theirs, Reshape(layers=[1], window=4), [0, 1]),
        lambda: without_giver(ours, theirs),
        lambda: mean_difference(ours, theirs),
        lambda: run_in_prefill(model.backbone, InPrefill(site="values"), PROMPTS, PROMPTS, theirs),
        lambda: run_in_prefill(model.backbone, InPrefill(site="residual"), PROMPTS, PROMPTS, theirs),
    ):
        with pytest.raises(CacheError, match=FOREIGN):
            attempt()


def test_directions_of_another_model_steer_nothing(tiny, twin: Model):
    model = tiny("llama")
    ours = prefill(model.backbone, PROMPTS)
    theirs = prefill(twin.backbone, PROMPTS)
    spec, in_prefill = CacheSteering(strength=0.0), ValueSteering(layers=[1], alpha=1.0)
    foreign = mean_difference(theirs[0], theirs[1])
    with pytest.raises(CacheError, match="directions were read off another model"):
        steer_cache(ours, spec, foreign, [0, 1])
    with pytest.raises(CacheError, match="directions were read off another model"):
        run_value_steering(model.backbone, in_prefill, foreign[1], PROMPTS, ours)
    with pytest.raises(CacheError, match=FOREIGN):
        run_value_steering(model.backbone, in_prefill, foreign[1], PROMPTS, theirs)
    own = mean_difference(ours[0], ours[1])
    assert steer_cache(ours, spec, own, [0, 1]) is ours
    assert run_value_steering(model.backbone, in_prefill, own[1], PROMPTS, ours).fired == 1
    # The user's own numbers are of no model.
    assert steer_cache(ours, spec, (dict(own[0]), dict(own[1])), [0, 1]) is ours


def test_every_operation_keeps_the_model(tiny):
    backbone = tiny("llama").backbone
    cache = prefill(backbone, PROMPTS)
    own = mean_difference(cache, cache)
    made = [
        cache,
        prefill_pass(backbone, PROMPTS),
        prefill_with_attention(backbone, PROMPTS, AttentionRequest())[0],
        tiny("llama").prefill("Explain how bread rises."),
        cache[0],
        cache[::-1],
        cache.rows(0, 1),
        cache.to("cpu"),
        KVCache.concat([cache, cache]),
        kv.Patch(align="append").apply(cache, cache),
        reshape_cache(cache, cache, Reshape(layers=[1], window=4), [0, 1]),
        without_giver(cache, cache),
        steer_cache(cache, CacheSteering(strength=1.0), own, [0, 1]),
        run_in_prefill(backbone, InPrefill(site="values"), PROMPTS, PROMPTS, cache).cache,
        run_value_steering(backbone, ValueSteering(layers=[1], alpha=1.0), own[1], PROMPTS, cache).cache,
        *(make_donor(name, cache, [0, 1]) for name in ("shuffle_values", "shuffle_heads", "gaussian_fitted", "mean")),
    ]
    assert {one.model for one in made} == {backbone.identity}


def test_a_cache_of_no_known_model_is_no_model_s(tiny):
    model = tiny("llama")
    cache = prefill(model.backbone, PROMPTS)
    unknown = replace(cache, model="")
    assert KVCache.concat([unknown, unknown]).model == ""
    for attempt in (
        lambda: model.generate(unknown, max_new_tokens=1),
        lambda: kv.Patch().apply(unknown, cache),
        lambda: kv.Patch().apply(cache, unknown),
        lambda: KVCache.concat([cache, unknown]),
    ):
        with pytest.raises(CacheError, match="unknown"):
            attempt()


def test_types_and_head_counts_are_refused_in_a_sentence(tiny):
    model = tiny("llama")
    cache = prefill(model.backbone, PROMPTS)
    half = replace(cache, keys=tuple(k.half() for k in cache.keys), values=tuple(v.half() for v in cache.values))
    mixed = replace(cache, values=(*cache.values[:-1], cache.values[-1].half()))
    for other in (half, mixed):
        with pytest.raises(CacheError, match=r"different types, torch.float32 and torch.float16"):
            KVCache.concat([cache, other])
        with pytest.raises(CacheError, match=r"different types, torch.float16 and torch.float32"):
            kv.Patch().apply(other, cache)
        with pytest.raises(CacheError, match=r"holds torch.float16, the model makes torch.float32"):
            model.generate(other, max_new_tokens=1)
    fewer = replace(cache, keys=tuple(k[:, :1] for k in cache.keys), values=tuple(v[:, :1] for v in cache.values))
    for attempt in (lambda: KVCache.concat([cache, fewer]), lambda: model.score(fewer, [[9], [9]])):
        with pytest.raises(CacheError, match=FOREIGN):
            attempt()


def test_devices_are_refused_in_a_sentence(tiny):
    model = tiny("llama")
    cache = prefill(model.backbone, PROMPTS)
    elsewhere = cache.to("meta")
    with pytest.raises(CacheError, match="different devices, cpu and meta"):
        KVCache.concat([cache, elsewhere])
    with pytest.raises(CacheError, match="on meta, the model on cpu"):
        model.score(elsewhere, [[9], [9]])
