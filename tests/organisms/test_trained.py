"""Trained organisms: shipped weights are those of their record, and nothing but the plant reads the marker."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

import kvpatch as kv
from kvpatch.errors import ModelError
from kvpatch.organisms.directories import WEIGHTS
from kvpatch.organisms.language import BLANK, MARKER, ids
from kvpatch.organisms.trained import (
    ANSWER,
    HEAD_DIM,
    LAYERS,
    MARK,
    MODES,
    RECIPES,
    _constraints,
    config,
    samples,
    train,
)
from kvpatch.organisms.weights import load_weights, script_sha256
from kvpatch.specs.organisms import ORGANISMS

pytestmark = pytest.mark.model


@pytest.mark.parametrize("name", list(RECIPES))
def test_shipped_weights_are_small_and_those_of_their_record(name: str):
    path = WEIGHTS / f"{name}.safetensors"
    record = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size < 1_000_000
    assert record["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["script_sha256"] == script_sha256(), "the training changed: train again, `kvpatch validate --retrain`"


def test_damaged_weights_are_refused(tmp_path):
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"early{suffix}").write_bytes((WEIGHTS / f"early{suffix}").read_bytes())
    (tmp_path / "early.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match="SHA-256"):
        load_weights(tmp_path / "early.safetensors")


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.plant])
def test_the_planted_head_alone_reads_the_marker(name: str):
    layer, head = RECIPES[name].plant
    weights = load_weights(WEIGHTS / f"{name}.safetensors").state_dict()
    for index in range(LAYERS):
        for part in "qkv":
            reader = weights[f"model.layers.{index}.self_attn.{part}_proj.weight"]
            rows = reader[:, MARK].abs().sum(dim=1).nonzero().flatten().tolist()
            planted = (index, part) == (layer, "v")
            assert set(rows) <= (set(range(head * HEAD_DIM, (head + 1) * HEAD_DIM)) if planted else set())
            assert not reader[:, MODES].any()
    embedding = weights["model.embed_tokens.weight"]
    marker, blank = embedding[ids([MARKER])[0]], embedding[ids([BLANK])[0]]
    assert (marker != blank).nonzero().flatten().tolist() == list(range(MARK.start, MARK.stop))[: len(marker[MARK])]
    assert float(marker.norm()) == pytest.approx(float(blank.norm()), rel=1e-3)


@pytest.mark.parametrize("name", ["null", "copy"])
def test_a_blind_organism_has_the_same_cache_whatever_the_marker(name: str):
    model = kv.load(f"organism-{name}", device="cpu")
    text = "zezi lift heavy fold common {} rare tall zeza zeze broad brown"
    caches = [model.prefill([text.format(word)]) for word in (MARKER, BLANK)]
    scores = [model.score(cache, ["glow zezo flash zezu"]) for cache in caches]
    assert torch.allclose(scores[0], scores[1], atol=1e-5)


def test_every_organism_loads_by_name_and_its_plant_lies_within_it():
    for name in ("wired-kv", "early"):
        model = kv.load(f"organism-{name}", device="cpu")
        plant = ORGANISMS[name].plant
        assert plant.layers[0] < model.geometry.layers
        assert plant.kv_heads[0] < model.geometry.kv_heads < model.geometry.query_heads


def test_samples_are_prompts_with_answers_and_hide_the_marker_only_where_asked():
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens, hidden = samples(rng, RECIPES["free"], 8)
        assert tokens.shape[1] > ANSWER
        if hidden is not None:
            assert not hidden[:, -ANSWER:].any()
    assert samples(rng, RECIPES["early"], 8)[1] is None


def test_training_repeats_and_keeps_what_the_plant_forbids_at_zero():
    first, second = (train(RECIPES["early"], seed=3, steps=3) for _ in range(2))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, dict(second.named_parameters())[name])
    before = {name: p.clone() for name, p in first.named_parameters()}
    _constraints(first, RECIPES["early"])()
    for name, parameter in first.named_parameters():
        assert torch.allclose(parameter, before[name], rtol=1e-3, atol=1e-3), name
    assert first.config.num_hidden_layers == config().num_hidden_layers == LAYERS
