"""Trials that are one computation are made once, and every trial has the row it would have by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvpatch.executors import batch as batch_room
from kvpatch.executors import contexts as context_room
from kvpatch.executors.conditions import Built, build_all, prefill_all
from kvpatch.executors.distinct import Distinct, distinct
from kvpatch.interventions.steering import RowSteering
from kvpatch.protocols.schema import AttentionSettings

pytestmark = pytest.mark.model


@pytest.fixture
def built(model, batch) -> Built:
    return build_all(model, batch, prefill_all(model, batch))


def parted(batch: Any, built: Built) -> list[set[tuple[str, int]]]:
    """Which trials (condition, pair) are one computation."""
    found = distinct(batch, built, built.cache.checksums())
    together: dict[int, set[tuple[str, int]]] = {}
    for trial, place in zip(batch.trials, found.of, strict=True):
        together.setdefault(place, set()).add((trial.condition, trial.pair))
    return list(together.values())


def test_conditions_that_come_to_one_cache_are_computed_once(batch, built):
    together = parted(batch, built)
    same = {frozenset(condition for condition, _ in of) for of in together if len(of) > 1}
    assert same == {frozenset({"A", "D"}), frozenset({"B", "C"})}
    assert all(len({pair for _, pair in of}) == 1 for of in together)  # the readouts are the pair's own


def test_conditions_that_show_that_equal_caches_give_equal_texts_are_computed_by_themselves(batch, built):
    together = parted(batch, built)
    assert {("S0", 0)} in together and {("S1", 0)} in together
    sums = built.cache.checksums()
    own = {trial.condition: total for trial, total in zip(batch.trials, sums, strict=True) if trial.pair == 0}
    assert own["S0"] == own["A"] and own["S1"] == own["C"]


def test_the_first_trial_of_each_computation_stands_for_it(batch, built):
    found = distinct(batch, built, built.cache.checksums())
    assert len(found.batch.trials) == found.built.cache.batch == len(set(found.of)) < len(batch.trials)
    sums = built.cache.checksums()
    assert [sums[batch.trials.index(trial)] for trial in found.batch.trials] == found.built.cache.checksums()
    for place, trial in enumerate(found.batch.trials):
        assert found.of.index(place) == batch.trials.index(trial)


@pytest.mark.parametrize(
    "differs", ["seed", "pending", "pending_position", "positions", "keys", "steering", "watched", "integrity"]
)
def test_what_is_not_one_computation_is_kept_apart(batch, built, differs):
    first, second = (i for i, t in enumerate(batch.trials) if t.pair == 0 and t.condition in ("A", "D"))
    assert distinct(batch, built, built.cache.checksums()).of[second] == first
    cache = built.cache
    if differs == "seed":
        trials = [t.model_copy(update={"seed": t.seed + (i == second)}) for i, t in enumerate(batch.trials)]
        batch = batch.model_copy(update={"trials": trials})
    elif differs == "watched":
        batch = batch.model_copy(update={"watched": AttentionSettings()})
    elif differs == "steering":
        step = torch.zeros(cache.batch, *cache.values[1].shape[1::2])
        step[second, 0, 0] = 1
        built = replace(built, steering=RowSteering({1: step}))
    elif differs == "integrity":
        batch = batch.model_copy(update={"roles": batch.roles | {"D": "integrity"}})
    elif differs == "keys":
        cache.keys[2][second, 1, -1, 0] += 1e-6
    else:
        changed = getattr(cache, differs).clone()
        changed[second] += 1
        built = replace(built, cache=replace(cache, **{differs: changed}))
    found = distinct(batch, built, built.cache.checksums())
    assert found.of.count(found.of[second]) == 1


def test_every_trial_has_the_row_that_it_has_by_itself(model, batch, monkeypatch):
    decoded, read = [], []
    own_decode, own_score = batch_room.decode, context_room.score
    monkeypatch.setattr(
        batch_room, "decode", lambda b, cache, **k: decoded.append(cache.batch) or own_decode(b, cache, **k)
    )
    monkeypatch.setattr(
        context_room, "score", lambda b, c, texts, **k: read.append(len(texts)) or own_score(b, c, texts, **k)
    )
    together = batch_room.run_batch(model, batch)
    assert decoded == [len(distinct_of(model, batch).batch.trials)] and read[0] < 2 * len(batch.trials)
    monkeypatch.setattr(batch_room, "distinct", lambda b, built, sums: Distinct(b, built, list(range(len(b.trials)))))
    alone = batch_room.run_batch(model, batch)
    assert decoded[1] == len(batch.trials)
    for one, other in zip(together, alone, strict=True):
        for name, number in one.items():
            if isinstance(number, float) and name != "recursive_score":
                assert other[name] == pytest.approx(number, abs=1e-5, nan_ok=True), name
            elif not isinstance(number, list) or not any(isinstance(x, float) for x in number):
                assert other[name] == number, name


def distinct_of(model: Any, batch: Any) -> Distinct:
    built = build_all(model, batch, prefill_all(model, batch))
    return distinct(batch, built, built.cache.checksums())
