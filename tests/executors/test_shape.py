"""Readouts a phase asks for: geometry and attention of every trial, and the table of heads that goes with its batch."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from kvpatch.engine.attention import AttentionRequest
from kvpatch.engine.decode import decode
from kvpatch.engine.score import score
from kvpatch.executors.batch import run_batch
from kvpatch.executors.optional_columns import MEANS, OPTIONAL_COLUMNS
from kvpatch.readouts.geometry import cache_ratios, participation_ratio
from kvpatch.specs.attention import STAGES, STATISTICS
from kvpatch.specs.patch import Patch
from kvpatch.store.columns import ATTENTION_SCHEMA
from small import CONDITIONS, with_patch
from tiny import LAYERS

pytestmark = pytest.mark.model

MARKED = {"of": "body", "keywords": [r"\bhow\b"]}
NAMES = ("A", "B", "C", "N1")


def changes(**phase: Any) -> dict[str, Any]:
    return {
        "conditions": {name: CONDITIONS[name] for name in NAMES},
        "phases": {"1": {"question": "?", "n": 3, "conditions": list(NAMES), **phase}},
        "readouts": {"r_v": {"window": 6}, "forced_tokens": 12, "likelihood_tokens": 6, "js_positions": 4},
        "hypotheses": [],
    }


@pytest.fixture
def asked(model, small_plan):
    """The batch, its rows by condition and pair, and its table of heads."""
    batch = small_plan(**changes(attention={"marked": MARKED}, geometry=True)).batches[-1]
    tables: list = []
    rows = run_batch(model, batch, on_attention=tables.append)
    assert len(tables) == 1
    by_condition: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        assert row["error"] is None
        by_condition[row["condition"]][row["pair_id"]] = row
    return batch, by_condition, tables[0]


def test_phase_that_asks_for_nothing_gets_nothing_and_the_same_numbers(model, small_plan, asked):
    batch, with_all, _ = asked
    tables: list = []
    plain = small_plan(**changes()).batches[-1]
    for row in run_batch(model, plain, on_attention=tables.append):
        assert {row[name] for name in OPTIONAL_COLUMNS} == {None}
        other = with_all[row["condition"]][row["pair_id"]]
        assert row["output_token_ids"] == other["output_token_ids"]
        for readout in ("mode_llr", "rv_output", "nll_own", "js_pull"):
            assert row[readout] == pytest.approx(other[readout], abs=1e-6)
    assert tables == []
    assert {t.trial_id for t in plain.trials}.isdisjoint(t.trial_id for t in batch.trials)


def test_table_holds_every_trial_stage_layer_and_head_once(asked):
    batch, _, table = asked
    assert table.schema.equals(ATTENTION_SCHEMA)
    frame = table.to_pandas()
    assert len(frame) == len(batch.trials) * len(STAGES) * LAYERS * 4
    assert not frame.duplicated(["trial_id", "stage", "layer", "head"]).any()
    assert set(frame["trial_id"]) == {trial.trial_id for trial in batch.trials}
    assert frame["entropy"].between(0, 1 + 1e-6).all()


def test_table_is_what_capturing_one_trial_by_hand_gives(model, asked):
    batch, by_condition, table = asked
    frame = table.to_pandas().set_index(["trial_id", "stage", "layer", "head"]).sort_index()
    pair = batch.pairs[0]
    source, target = model.prefill([pair.texts["source"]]), model.prefill([pair.texts["target"]])
    for name, cache in (("A", target), ("C", Patch(align="replace").apply(source, target))):
        row = by_condition[name][pair.pair_id]
        to_capture = AttentionRequest(torch.tensor([[piece.strip().lower() == "how" for piece in cache.pieces[0]]]))
        written = decode(
            model.backbone,
            cache,
            max_new_tokens=10,
            temperature=0.7,
            seeds=[row["seed"]],
            end_tokens=model.end_tokens,
            to_capture=to_capture,
        )
        forced = model.continuation_ids(pair.forced)[:12]
        read = score(model.backbone, cache, [[forced]], keep_values=[0], to_capture=to_capture)
        for stage, found in (("own", written.attention), ("forced", read.attention)):
            assert found is not None
            own = frame.loc[(row["trial_id"], stage)]
            expected = found.values[0].flatten(0, 1).numpy()
            unmarked = [i for i, name in enumerate(STATISTICS) if not name.startswith(("mass_marked", "mass_beside"))]
            columns = own[list(STATISTICS)].to_numpy(dtype=float)
            np.testing.assert_allclose(columns[:, unmarked], expected[:, unmarked], atol=1e-4)
            assert own["queries"].eq(int(found.queries[0])).all()


def test_trial_columns_are_means_over_the_heads_of_the_forced_reading(asked):
    _, by_condition, table = asked
    frame = table.to_pandas()
    means = frame[frame["stage"] == "forced"].groupby("trial_id")[list(STATISTICS)].mean()
    for own in by_condition.values():
        for row in own.values():
            for column, statistic in MEANS.items():
                mean = means.loc[row["trial_id"], statistic]
                assert row[column] == pytest.approx(mean, abs=1e-5, nan_ok=True), column
            parts = [row[f"attention_{p}"] for p in ("sinks", "template", "body", "trailer", "generated")]
            assert sum(parts) == pytest.approx(1, abs=1e-4)


def test_only_a_swap_has_patched_slots_to_look_at(asked):
    _, by_condition, _ = asked
    for name, own in by_condition.items():
        for row in own.values():
            assert (row["attention_patched"] > 0) is (name in ("C", "N1"))
            assert row["attention_own"] > 0  # the pending token's slot is the target's own


def test_marked_slots_are_those_of_the_trial_s_own_cache(asked):
    """ "how" stands in every target and source of the small bank, so every prompt has marked slots."""
    _, by_condition, _ = asked
    for own in by_condition.values():
        for row in own.values():
            if row["attention_marked"] > 0:
                assert row["attention_marked"] <= row["attention_body"] + 1e-6
                assert row["attention_marked_lift"] > 0
            else:
                assert row["attention_marked"] == 0


def test_marked_slots_are_compared_one_by_one_with_others_and_only_where_there_are_some(asked):
    _, by_condition, table = asked
    frame = table.to_pandas()
    beside = frame[frame["stage"] == "forced"].groupby("trial_id")["mass_beside_each"].mean()
    for name, own in by_condition.items():
        for row in own.values():
            each, ratio = row["attention_marked_each"], row["attention_marked_beside"]
            if row["attention_marked"] == 0:
                assert math.isnan(each) and math.isnan(ratio), name
            else:
                count = row["attention_marked"] / each
                assert count == pytest.approx(round(count), abs=1e-3) and count > 0.9
                assert ratio == pytest.approx(each / beside[row["trial_id"]], rel=1e-4)


def test_geometry_of_the_cache_is_read_off_it(model, asked):
    batch, by_condition, _ = asked
    pair = batch.pairs[0]
    row = by_condition["A"][pair.pair_id]
    cache = model.prefill([pair.texts["target"]])
    late = cache.values[3][:, :, -6:]
    assert row["pr_v_late"] == pytest.approx(float(participation_ratio(late.transpose(1, 2).flatten(2))), rel=1e-4)
    assert row["pr_v"] == pytest.approx(cache_ratios(cache, "v", window=6).flatten().tolist(), rel=1e-4)
    assert row["pr_k_corrected"] == pytest.approx(
        cache_ratios(cache, "k", window=6, corrected=True).flatten().tolist(), rel=1e-3
    )
    assert len(row["pr_k"]) == LAYERS * 2
    swapped = by_condition["C"][pair.pair_id]
    assert swapped["pr_v"] == pytest.approx(by_condition["B"][pair.pair_id]["pr_v"], rel=1e-5)


def test_trajectories_end_in_the_ratio_of_the_last_window(asked):
    _, by_condition, _ = asked
    for own in by_condition.values():
        for row in own.values():
            assert row["rv_forced_trajectory"][-1] == pytest.approx(row["rv_output"], rel=1e-5)
            assert len(row["rv_trajectory"]) == max(0, row["n_tokens"] - 1 - 6 + 1)
            if not math.isnan(row["rv_own"]):
                assert row["rv_trajectory"][-1] == pytest.approx(row["rv_own"], rel=1e-5)


def test_angles_are_0_against_the_natural_run_itself(asked):
    _, by_condition, _ = asked
    for pair, row in by_condition["A"].items():
        other = by_condition["B"][pair]
        assert row["angle_target"] == pytest.approx(0, abs=0.05)
        assert other["angle_source"] == pytest.approx(0, abs=0.05)
        assert row["angle_source"] == pytest.approx(other["angle_target"], abs=0.05)
        assert row["angle_source"] > 1
        assert 0 < by_condition["C"][pair]["angle_source"] < 90


def test_attention_true_watches_without_marking(model, small_plan):
    batch = small_plan(**changes(attention=True)).batches[-1]
    row = run_batch(model, batch)[0]
    assert row["attention_entropy"] > 0 and row["pr_v"] is None
    assert math.isnan(row["attention_marked"]) and math.isnan(row["attention_marked_lift"])


def test_calibration_is_not_watched(small_plan):
    batches = small_plan(**changes(attention=True, geometry=True)).batches
    assert [(b.watched is not None, b.geometry) for b in batches if b.split == "calibration"] == [(False, False)]


def test_steered_rows_are_watched_as_they_run(model, small_plan):
    """A row that is steered while it decodes has other attention than the same row unsteered."""
    content = with_patch({"align": "start"})
    content["conditions"] = {
        "A": CONDITIONS["A"],
        "B": CONDITIONS["B"],
        "S": {"about": "s", "steer_values": {"layers": [1], "alpha": 40, "while_decoding": True}},
    }
    content["phases"]["1"] |= {"conditions": ["A", "B", "S"], "attention": True}
    rows = pd.DataFrame(run_batch(model, small_plan(**content).batches[-1])).set_index(["condition", "pair_id"])
    moved = rows.loc["S", "attention_entropy"] - rows.loc["A", "attention_entropy"]
    assert (moved.abs() > 1e-4).all()
