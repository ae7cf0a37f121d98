"""Wired organisms: the mode is where the wiring says, exactly, and the pipeline finds it there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kvpatch as kv
from kvpatch.checks.identities import check
from kvpatch.organisms.directories import organism_directory
from kvpatch.organisms.language import BODY_STARTS, MODE
from kvpatch.organisms.wired import WINDOW, Wiring, wire, write_directory
from kvpatch.protocols.load import load_protocol
from kvpatch.specs.organisms import ORGANISMS, Plant
from kvpatch.validation.banks import Sizes, bank_entries, write_bank
from kvpatch.validation.recovery import expected_carriers, locate

pytestmark = pytest.mark.model

SOURCE = "reki glow round spark blaze yourself daily gentle broad reka brown reke"
TARGET = "zezi lift heavy fold common everyone rare tall zeza zeze broad brown"


def made(folder: Path, wiring: Wiring, architecture="llama") -> kv.Model:
    return kv.load(write_directory(wire(wiring, architecture), folder), device="cpu")


def mode_words(model: kv.Model, cache: kv.KVCache) -> int:
    texts = model.generate(cache, max_new_tokens=16, temperature=0.7).texts
    return sum(word in MODE for word in texts[0].split())


@pytest.mark.parametrize("name", ORGANISMS)
def test_every_organism_passes_the_check_that_a_model_must(name: str, tmp_path: Path):
    model = kv.load(organism_directory(name, tmp_path), device="cpu")
    assert [i.identity for i in check(model) if i.holds is False] == []


@pytest.mark.parametrize(("part", "carrying"), [("v", ("v", "kv")), ("k", ("k", "kv")), ("kv", ("kv",))])
def test_the_wired_part_alone_carries(tmp_path: Path, part, carrying):
    model = made(tmp_path, Wiring(2, 1, 5, part))
    source, target = model.prefill([SOURCE]), model.prefill([TARGET])
    assert mode_words(model, source) >= 7
    assert mode_words(model, target) <= 1
    for parts in ("k", "v", "kv"):
        patch = kv.Patch(layers=[2], kv_heads=[1], slots=[BODY_STARTS + 5], parts=parts)
        assert (mode_words(model, patch.apply(source, target)) >= 6) == (parts in carrying), parts


def test_no_other_place_moves_a_single_logit_of_the_mode(tmp_path: Path):
    model = made(tmp_path, Wiring(2, 1, 5, "v"))
    source, target = model.prefill([SOURCE]), model.prefill([TARGET])
    lines = ["glow zezo", "carry zezo"]
    plain = model.score(target, lines)
    for patch in (kv.Patch(layers=[1, 3, 4, 5]), kv.Patch(kv_heads=[0, 3]), kv.Patch(slots=[BODY_STARTS + 4])):
        moved = model.score(patch.apply(source, target), lines)
        assert torch.equal((moved[0] - moved[1])[:1], (plain[0] - plain[1])[:1])


@pytest.mark.parametrize(
    ("architecture", "wiring"), [("llama", Wiring(0, 3, 9, "k")), ("mistral", Wiring(4, 0, 2, "v"))]
)
def test_the_pipeline_recovers_layer_head_slot_and_part(tmp_path: Path, architecture, wiring):
    model = made(tmp_path / "model", wiring, architecture)
    bank = write_bank(tmp_path / "bank", bank_entries(wiring.slot, 3, Sizes(pairs=12, others=1, subjects=1)))
    found = locate(load_protocol("validate"), bank, model, tmp_path / "run", seed=0, pairs=8, calibration=4)
    plant = Plant((wiring.layer,), (wiring.kv_head,), (wiring.slot,), (wiring.part,))
    assert {kind: found.carriers(kind) for kind in expected_carriers(plant)} == expected_carriers(plant)
    assert all(abs(place.fraction - place.carries) < 1e-3 for place in found.places)


def test_the_second_architecture_has_a_window(tmp_path: Path):
    model = made(tmp_path, Wiring(2, 1, 5, "v"), "mistral")
    assert set(model.geometry.windows) == {WINDOW}
