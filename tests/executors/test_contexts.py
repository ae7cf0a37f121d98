"""An output is judged fluent under the prompt whose words its cache holds, and under no other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvpatch.engine.score import score
from kvpatch.executors.batch import run_batch
from kvpatch.executors.conditions import build_all, prefill_all
from kvpatch.executors.contexts import held_prompts
from kvpatch.executors.equal_texts import equal_texts
from kvpatch.planning.plan import Batch
from small import CONDITIONS

pytestmark = pytest.mark.model

S, F = {"from": "source"}, {"from": "foreign"}
HELD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "A": ({}, ("target",)),
    "B": ({"into": "source"}, ("source",)),
    "C": (S | {"patch": {"align": "replace"}}, ("source",)),
    "D": ({"into": "source", "from": "target", "patch": {"align": "replace"}}, ("target",)),
    "N1": (F | {"patch": {"align": "replace"}}, ("foreign",)),
    "N2": ({"from": "neutral", "patch": {"align": "replace"}}, ("neutral",)),
    "S1": ({"text_of": "source"}, ("source",)),
    "by_stretch": (S | {"patch": {"align": "stretch"}}, ("source",)),
    "strength_0": (S | {"patch": {"align": "end", "strength": 0}}, ("target",)),
    "shuffled": (S | {"patch": {"align": "replace", "donor": "shuffle_values"}}, ("source",)),
    "random": (F | {"patch": {"align": "replace", "donor": "gaussian_isotropic"}}, ("foreign",)),
    "half": (S | {"patch": {"align": "end", "strength": 0.5}}, ("target", "source")),
    "values": (F | {"patch": {"align": "end", "parts": "v"}}, ("target", "foreign")),
    "late": (S | {"patch": {"slots": "body", "align": "stretch", "layers": {"band": [0.5, 1]}}}, ("target", "source")),
    "joined": (F | {"joined": {"keep": "receiver"}}, ("target", "foreign")),
    "one_layer": (S | {"in_prefill": {"site": "residual", "layers": [2]}}, ("target", "source")),
    "steered": ({"steer_cache": {"slots": "body", "strength": 2}}, ("target", "source")),
    "into_source": ({"into": "source", **F, "patch": {"align": "end", "layers": [1]}}, ("source", "foreign")),
}


@pytest.fixture(scope="module")
def batch(small_plan: Callable) -> Batch:
    conditions = {name: CONDITIONS[name] for name in ("A", "B")}
    conditions |= {name: {"about": name, **way} for name, (way, _) in HELD.items() if name not in conditions}
    phases = {"1": {"question": "?", "n": 4, "conditions": list(conditions)}}
    plan = small_plan(conditions=conditions, phases=phases, hypotheses=[])
    return next(batch for batch in plan.batches if batch.split == "test")


@pytest.fixture(scope="module")
def rows(model: Any, batch: Batch) -> list[dict[str, Any]]:
    return run_batch(model, batch)


def test_the_prompts_whose_words_a_cache_holds(model: Any, batch: Batch):
    natural = prefill_all(model, batch)
    built = build_all(model, batch, natural)
    held = held_prompts(batch, built, equal_texts(batch, natural, built.cache))
    found: dict[str, set[tuple[str, ...]]] = {}
    for trial, roles in zip(batch.trials, held, strict=True):
        found.setdefault(trial.condition, set()).add(roles)
    assert found == {name: {roles} for name, (_, roles) in HELD.items()}


def test_the_surprise_in_context_is_the_smallest_under_these_prompts(model: Any, batch: Batch, rows: Any):
    natural = prefill_all(model, batch)
    for trial, row in zip(batch.trials, rows, strict=True):
        under = {}
        for role in {"target", *HELD[trial.condition][1]}:
            place = natural.row[trial.pair, role]
            logprobs = score(model.backbone, natural.cache[[place]], [[row["output_token_ids"]]], of=[0]).logprobs
            under[role] = -float(torch.nanmean(logprobs))
        assert row["nll_target"] == pytest.approx(under["target"], abs=1e-4)
        entropy = row["nll_context"] - row["excess_context"]
        assert 0 < entropy < math.log(model.geometry.vocabulary) + 1
        assert row["nll_context"] == pytest.approx(min(under[role] for role in HELD[trial.condition][1]), abs=1e-4)


@pytest.mark.parametrize("name", ["A", "B", "C", "D", "N1", "S1"])
def test_a_text_is_judged_by_its_own_run_and_not_by_the_targets(rows: Any, name: str):
    own = [row for row in rows if row["condition"] == name]
    for row in own:
        assert row["nll_context"] == pytest.approx(row["nll_own"], abs=1e-3)
    apart = np.mean([abs(row["nll_target"] - row["nll_own"]) for row in own])
    assert (apart < 1e-3) == (name in "AD")


def test_an_output_that_could_not_be_read_is_not_called_fluent(rows: Any):
    assert not any(math.isnan(row["nll_context"]) for row in rows)


def test_the_excess_is_the_surprise_less_the_entropy_of_the_full_distributions(model: Any, batch: Batch, rows: Any):
    natural = prefill_all(model, batch)
    for trial, row in zip(batch.trials, rows, strict=True):
        if trial.condition not in "ABC":
            continue
        place = natural.row[trial.pair, HELD[trial.condition][1][0]]
        ids = row["output_token_ids"]
        read = score(model.backbone, natural.cache[[place]], [[ids]], of=[0], keep_logits=len(ids))
        log_p = read.logits[0].double().log_softmax(dim=-1)
        expected = -float(read.logprobs[0, 0].nanmean()) + float((log_p.exp() * log_p).sum(dim=-1).mean())
        assert row["excess_context"] == pytest.approx(expected, abs=1e-4)
