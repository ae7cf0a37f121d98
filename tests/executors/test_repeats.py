"""Trials that several phases ask for: computed once where their rows would be the same, and only there."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyarrow.compute as pc
import pytest

from kvpatch.executors import together
from kvpatch.executors.local import LocalExecutor
from kvpatch.executors.optional_columns import OPTIONAL_COLUMNS
from kvpatch.planning import plan as planner
from kvpatch.specs.attention import STAGES
from kvpatch.store.directory import Store
from small import CONDITIONS
from tiny import LAYERS

pytestmark = pytest.mark.model

MARKED = {"of": "body", "keywords": [r"\bhow\b"]}
HEADS = LAYERS * 4 * len(STAGES)  # rows of the table of heads, a trial
WATCHED = {"watched", "again", "unmarked"}


def phase(names: str, **asked: Any) -> dict[str, Any]:
    return {"question": "?", "n": 2, "conditions": names.split(), **asked}


@pytest.fixture(scope="module")
def plan(small_plan):
    """Phases of equal trials: two that ask for nothing, two for the same, one for attention without marks."""
    phases = {
        "first": phase("A B C"),
        "watched": phase("A B C", attention={"marked": MARKED}, geometry=True),
        "second": phase("A B C N1"),
        "again": phase("A B C N1", attention={"marked": MARKED}, geometry=True),
        "unmarked": phase("A B C", attention=True, geometry=True),
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(planner, "ROWS_PER_BATCH", 3)
        return small_plan(
            conditions={name: CONDITIONS[name] for name in ("A", "B", "C", "N1")},
            phases=phases,
            generation={"max_new_tokens": 6, "temperature": 0.7},
            readouts={"r_v": {"window": 6}, "forced_tokens": 8, "likelihood_tokens": 4, "js_positions": 2},
            hypotheses=[],
        )


def run(model, plan, store: Store, on_batch=lambda batch, tokens: None) -> None:
    with store.locked():
        LocalExecutor({None: model}).run(plan, store, on_tokens=lambda rows: None, on_batch=on_batch)


class Whole(NamedTuple):
    """A run that nothing disturbed: its directory, not to be changed, and phase and condition of every trial that was
    computed."""

    store: Store
    measured: list[tuple[str, str]]


@pytest.fixture(scope="module")
def whole(model, plan, tmp_path_factory) -> Whole:
    told: list[tuple[str, str]] = []
    measure = together.measure

    def counted(model, batch, **settings):
        told.extend((batch.phase, trial.condition) for trial in batch.trials)
        return measure(model, batch, **settings)

    store = Store(tmp_path_factory.mktemp("whole") / "run")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(together, "measure", counted)
        run(model, plan, store)
    return Whole(store, told)


def test_a_trial_is_computed_once_for_all_phases_that_ask_for_the_same(whole):
    measured = whole.measured
    by_phase = {name: sorted({c for p, c in measured if p == name}) for name in ("second", "again", "unmarked")}
    assert by_phase == {"second": ["N1"], "again": ["N1"], "unmarked": ["A", "B", "C"]}
    assert len([p for p, _ in measured if p in ("first", "watched", "unmarked")]) == 3 * 6


def test_every_phase_gets_what_it_asks_for(plan, whole):
    store = whole.store
    heads = store.read_attention().group_by(["trial_id"]).aggregate([("head", "count")]).to_pydict()
    of_heads = dict(zip(heads["trial_id"], heads["head_count"], strict=True))
    rows = store.read().to_pylist()
    assert len(rows) == plan.n_trials == len({row["trial_id"] for row in rows})
    for row in rows:
        is_watched = row["phase"] in WATCHED
        assert of_heads.get(row["trial_id"], 0) == (HEADS if is_watched else 0)
        assert (row["attention_entropy"] is not None) is is_watched
        assert (row["pr_v_late"] is not None) is is_watched
        if not is_watched:
            assert {row[name] for name in OPTIONAL_COLUMNS} == {None}
    assert len(of_heads) == len([row for row in rows if row["phase"] in WATCHED])


def test_copied_heads_are_those_of_the_trial_they_were_copied_from(whole):
    store = whole.store
    heads = store.read_attention()
    ids: dict[str, dict[str, str]] = {}
    for row in store.read(["trial_id", "content_id", "phase"]).to_pylist():
        ids.setdefault(row["content_id"], {})[row["phase"]] = row["trial_id"]
    both = [phases for phases in ids.values() if {"watched", "again"} <= phases.keys()]
    assert len(both) == 6
    assert all(phases.keys().isdisjoint({"first", "unmarked"}) for phases in both)
    assert len(heads.filter(pc.field("by_slot").is_valid())) == HEADS * (3 + 4 + 3)  # the first pair of each phase
    for phases in both:
        first, copy = (heads.filter(pc.field("trial_id") == phases[p]).drop(["trial_id"]) for p in ("watched", "again"))
        assert copy.equals(first)


@pytest.mark.parametrize("after", [4, 6, 8])
def test_run_broken_off_copies_the_same(model, plan, whole, tmp_path, after):
    broken = Store(tmp_path / "broken")
    told: list[str] = []

    def stop(batch, tokens):
        told.append(batch.batch_id)
        if len(told) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, plan, broken, stop)
    assert broken.read().num_rows < plan.n_trials
    broken.write_text("run.json", "{}")  # a directory without one is nobody's, and is refused
    run(model, plan, broken)
    for table in ("read", "read_attention"):
        ours, theirs = (sorted(map(repr, getattr(store, table)().to_pylist())) for store in (broken, whole.store))
        assert ours == theirs
    assert broken.done() == whole.store.done()
