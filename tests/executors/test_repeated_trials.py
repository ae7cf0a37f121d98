"""Some trials of a run are computed once more in other company, and what changed is stored."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import kvpatch as kv
from kvpatch.executors import together
from kvpatch.executors.batch import measure
from kvpatch.executors.local import LocalExecutor
from kvpatch.executors.noise import is_worth_repeating, repeated_trials
from kvpatch.planning import plan as planner
from kvpatch.store.directory import Store

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def first(model: Any, batch: Any) -> list[Any]:
    return measure(model, batch)


def test_float32_repeats_its_trials(model: Any, batch: Any, first: list[Any]):
    found = repeated_trials(model, batch, first, None, measure)
    pairs = math.ceil(len(batch.pairs) / 2)
    assert found["repeated"] >= pairs * len(batch.conditions) and found["of_batch"] == len(batch.trials)
    assert (found["texts_equal"], found["texts_equal_by_condition"]) == (1, {})
    assert max(found["largest_change"].values()) < 1e-3


def test_a_condition_that_depends_on_its_company_is_named(model: Any, batch: Any, first: list[Any]):
    def other(model: Any, part: Any) -> list[Any]:
        """C's trials write something else and force otherwise; E1's js_pull can't be computed."""
        changed = []
        for trial, of in zip(part.trials, measure(model, part), strict=True):
            if trial.condition == "C":
                of = dataclasses.replace(of, output_token_ids=[*of.output_token_ids[:-1], 1], cells=of.cells * 1.1)
            if trial.condition == "E1":
                of = dataclasses.replace(of, js_pull=math.nan)
            changed.append(of)
        return changed

    found = repeated_trials(model, batch, first, None, other)
    assert found["texts_equal_by_condition"] == {"C": 0}
    assert found["texts_equal"] == pytest.approx(1 - 1 / len(batch.conditions))
    assert found["largest_change"]["mode_llr"] > 1e-3
    assert math.isinf(found["largest_change"]["js_pull"])
    assert {"rv_output", "content_llr"} < set(found["largest_change"]) and "nll_own" not in found["largest_change"]
    assert 0 == found["texts_equal_by_condition_at_least"]["C"] < found["texts_equal_at_least"] < found["texts_equal"]


def test_only_what_may_depend_on_its_company_is_repeated_and_once(
    model: Any, small_plan: Any, tmp_path: Any, tiny_dirs: Any, monkeypatch: pytest.MonkeyPatch
):
    calls: list[int] = []

    def noted(*given: Any) -> dict[str, Any]:
        calls.append(1)
        return repeated_trials(*given)

    monkeypatch.setattr(together, "repeated_trials", noted)
    plan = small_plan(n=2)
    half = kv.load(tiny_dirs("llama"), device="cpu", dtype="bfloat16")
    assert half.backbone.dtype == torch.bfloat16
    assert [is_worth_repeating(m) for m in (model, half)] == [False, True]

    def noise_of(of: Any, name: str, known: Any = None) -> Any:
        store = Store(tmp_path / name)
        executor = LocalExecutor({None: of}, noise=known)
        with store.locked():
            executor.run(plan, store, on_tokens=lambda rows: None, on_batch=lambda batch, tokens: None)
        return executor.noise

    assert noise_of(model, "whole") == {} and not calls
    found = noise_of(half, "half")
    assert found[None]["repeated"] > 0 and len(calls) == 1
    assert noise_of(half, "again", found) == found and len(calls) == 1


@pytest.mark.parametrize("rows", [1, 64])
def test_a_run_that_was_ended_while_its_noise_was_measured_measures_it_when_it_is_resumed(
    small_plan: Any, tmp_path: Any, tiny_dirs: Any, monkeypatch: pytest.MonkeyPatch, rows: int
):
    monkeypatch.setattr(planner, "ROWS_PER_BATCH", 3)
    plan = small_plan(n=2)
    assert len([batch for batch in plan.batches if batch.split == "test"]) > 1
    half = kv.load(tiny_dirs("llama"), device="cpu", dtype="bfloat16")
    store = Store(tmp_path / "run")

    def run() -> Any:
        executor = LocalExecutor({None: half}, {None: rows})
        with store.locked():
            executor.run(plan, store, on_tokens=lambda rows: None, on_batch=lambda batch, tokens: None)
        return executor.noise

    def ended(*given: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(together, "repeated_trials", ended)
        with pytest.raises(KeyboardInterrupt):
            run()
    tests = {batch.batch_id for batch in plan.batches if batch.split == "test"}
    assert len(store.done() & tests) == (1 if rows == 1 else 0)
    assert run()[None]["repeated"] > 0
    assert store.done() >= tests
