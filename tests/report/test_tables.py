"""The small tables agree with what anyone would compute from the trials."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kvpatch.protocols.schema import Protocol
from kvpatch.report import tables


def by_condition(table: pd.DataFrame) -> dict[str, dict]:
    return {row["condition"]: row for row in table.to_dict("records")}


def test_calibration_rows_are_left_out(trials: pd.DataFrame) -> None:
    assert tables.normalised(trials)["pair_id"].nunique() == 12
    assert trials["pair_id"].nunique() == 14


def test_means_are_over_pairs_not_over_samples(protocol: Protocol, trials_of: Callable[..., pd.DataFrame]) -> None:
    trials = tables.normalised(trials_of(n=8, samples=5))
    points, means = tables.condition_means(trials, "recursive_score", protocol)
    (row,) = means[means["condition"] == "B"].to_dict("records")
    by_pair = trials[trials["condition"] == "B"].groupby("pair_id")["recursive_score"].mean()
    low, high = stats.t.interval(0.95, 7, by_pair.mean(), stats.sem(by_pair))
    assert row["n"] == 8
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((by_pair.mean(), low, high))
    assert len(points[points["condition"] == "B"]) == 8


def test_an_interval_needs_two_pairs() -> None:
    assert all(map(math.isnan, tables.interval([])))
    mean, low, high = tables.interval([2.0])
    assert mean == 2 and math.isnan(low) and math.isnan(high)


def test_failed_rows_are_counted_and_not_averaged(trials: pd.DataFrame, protocol: Protocol) -> None:
    rows = by_condition(tables.coherence(tables.normalised(trials), protocol))
    assert [rows["E3"][key] for key in ("rows", "errors", "judged", "share")] == [12, 2, 10, 1.0]
    _, means = tables.condition_means(tables.normalised(trials), "n_tokens", protocol)
    assert by_condition(means)["E3"]["n"] == 10


def test_coherence_counts_the_unjudged_as_not_coherent_and_judges_all_conditions_alike(protocol: Protocol) -> None:
    rows = [
        (name, i, value)
        for name, values in {
            "A": [True] * 9 + [False],
            "C": [True] * 5 + [None] * 5,
            "E1": [True] * 8 + [False] * 2,
            "N1": [None] * 10,
        }.items()
        for i, value in enumerate(values)
    ]
    frame = pd.DataFrame(rows, columns=["condition", "pair_id", "coherent"]).assign(phase="1")
    got = by_condition(tables.coherence(tables.normalised(frame), protocol))
    told = {name: tuple(row[key] for key in ("share", "judged", "is_below")) for name, row in got.items()}
    assert told == {
        "A": (0.9, 10, False),
        "C": (0.5, 5, True),  # a full swap is judged like all others
        "E1": (0.8, 10, False),  # 8 of 10 may be 90% but for chance
        "N1": (0.0, 0, True),
    }
    unsaid = tables.coherence(tables.normalised(frame.drop(columns="coherent")), protocol)
    assert unsaid["share"].isna().all() and not unsaid["is_below"].any()


def test_means_average_pairs_that_share_a_prompt_first(protocol: Protocol) -> None:
    rows = [("p0", "s0", 1.0), ("p1", "s0", 3.0), ("p2", "s1", 8.0)]
    frame = pd.DataFrame(rows, columns=["pair_id", "source_id", "mode_llr"]).assign(phase="1", condition="A")
    frame["target_id"] = frame["pair_id"]
    points, means = tables.condition_means(tables.normalised(frame), "mode_llr", protocol)
    (row,) = means.to_dict("records")
    assert (len(points), row["n"], row["mean"]) == (3, 2, 5.0)


def test_a_role_is_the_one_of_the_phase(protocol: Protocol) -> None:
    assert [tables.role(protocol, phase, "A") for phase in ("1", "2")] == ["experiment", "control"]
    assert tables.role(protocol, "1", "not there") == "control"


def test_conditions_that_must_agree_are_read_off_the_protocol(protocol: Protocol) -> None:
    found = {(name, twin) for name, twin, _ in tables.twins(protocol)}
    assert found == {("S0", "A"), ("S1", "C"), ("C", "B"), ("D", "A"), ("D5", "B")}


def test_sameness_counts_equal_outputs(trials: pd.DataFrame) -> None:
    ready = tables.normalised(trials)
    assert tables.sameness(tables.outputs(ready), "S0", "A") == (12, 12)
    first = (ready["condition"] == "S0") & (ready["pair_id"] == "pair-000")
    ids = [[1, 2, 3] if here else old for here, old in zip(first, ready["output_token_ids"], strict=True)]
    ready = ready.assign(output_token_ids=pd.Series(ids, dtype=object))
    assert tables.sameness(tables.outputs(ready), "S0", "A") == (11, 12)
    assert tables.sameness(tables.outputs(ready), "A", "B")[0] == 0


def test_outputs_compare_alike_as_lists_and_as_arrays() -> None:
    assert tables.output_of({"output_token_ids": [1, 2]}) == tables.output_of({"output_token_ids": np.array([1, 2])})


def test_example_pairs_lie_at_evenly_spaced_ranks_of_the_natural_gap(trials: pd.DataFrame, protocol: Protocol) -> None:
    ready = tables.normalised(trials)
    for readout, rows in (("mode_llr", ready), ("recursive_score", ready.drop(columns="mode_llr"))):
        wide = ready.pivot(index="pair_id", columns="condition", values=readout)
        gap = (wide["B"] - wide["A"]).sort_values()
        chosen = tables.example_pairs(rows, protocol, k=4)
        assert chosen.readout is not None and chosen.readout.name == readout
        assert [pair for pair, _ in chosen.pairs] == [gap.index[i] for i in (0, 4, 7, 11)]
        assert [value for _, value in chosen.pairs] == pytest.approx(gap.iloc[[0, 4, 7, 11]].tolist())


def test_example_pairs_fall_back_on_the_list_of_pairs(trials: pd.DataFrame, protocol: Protocol) -> None:
    rows = tables.normalised(trials.drop(columns=["recursive_score", "mode_llr"]))
    chosen = tables.example_pairs(rows, protocol, k=2)
    assert chosen.readout is None
    assert chosen.pairs == [("pair-000", None), ("pair-011", None)]
