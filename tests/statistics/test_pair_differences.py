"""Pair means, contrasts, dropped pairs, independent units."""

from __future__ import annotations

import math
import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvpatch.errors import StoreError
from kvpatch.statistics.grid import grid_step, on_grid
from kvpatch.verdicts.pairs import contrast_differences, independent_units, pair_means, prepare, rows_of

CELLS = [
    ("p1", "A", 1.0), ("p1", "A", 3.0), ("p1", "B", 10.0), ("p1", "B", 20.0), ("p1", "B", 60.0),
    ("p2", "A", 4.0), ("p2", "B", 5.0), ("p2", "B", 5.0),
]  # fmt: skip


def table(cells: list[tuple[str, str, float]], **columns: object) -> pd.DataFrame:
    frame = pd.DataFrame(cells, columns=pd.Index(["pair_id", "condition", "score"]))
    return prepare(frame.assign(**{"phase": "1", **columns}))


def test_samples_are_averaged_within_a_pair_before_pairs_are_compared():
    found = contrast_differences(table(CELLS), {"B": 1, "A": -1}, "score")
    assert found.values.tolist() == pytest.approx([30 - 2, 5 - 4])
    assert found.unit_ids == ("p1", "p2")


def test_contrast_weights_are_applied_to_all_conditions():
    cells = [("p", "A", 1.0), ("p", "B", 10.0), ("p", "C", 100.0), ("p", "D", 1000.0)]
    found = contrast_differences(table(cells), {"D": 1, "C": -1, "B": -1, "A": 1}, "score")
    assert found.values.tolist() == pytest.approx([1000 - 100 - 10 + 1])


def test_pair_means_agree_with_a_loop():
    rng = np.random.default_rng(0)
    cells = [(f"p{rng.integers(7)}", "AB"[rng.integers(2)], float(rng.normal())) for _ in range(200)]
    means = pair_means(table(cells), ["A", "B"], "score")
    for pair in means.index:
        for condition in "AB":
            values = [v for p, c, v in cells if p == pair and c == condition]
            assert means.loc[pair, condition] == pytest.approx(sum(values) / len(values), rel=1e-12)


def test_log_is_taken_of_each_sample_before_the_mean():
    cells = [("p", "A", 1.0), ("p", "A", math.e**2), ("p", "B", math.e**3)]
    found = contrast_differences(table(cells), {"B": 1, "A": -1}, "score", "log")
    assert found.values.tolist() == pytest.approx([3 - 1])


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_log_of_what_is_not_positive_drops_the_pair(value: float):
    cells = [*CELLS, ("p3", "A", value), ("p3", "B", 2.0)]
    found = contrast_differences(table(cells), {"B": 1, "A": -1}, "score", "log")
    assert (found.n, found.n_dropped) == (2, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_drops_its_whole_pair_and_is_counted(value: float):
    cells = [*CELLS, ("p1", "B", value)]
    found = contrast_differences(table(cells), {"B": 1, "A": -1}, "score")
    assert (found.unit_ids, found.n_dropped) == (("p2",), 1)


def test_a_pair_without_one_of_the_conditions_is_dropped_and_counted():
    found = contrast_differences(table([*CELLS, ("p3", "A", 1.0)]), {"B": 1, "A": -1}, "score")
    assert (found.n, found.n_pairs, found.n_dropped) == (2, 2, 1)


def test_rows_with_an_error_are_left_out_and_counted():
    cells = [*CELLS, ("p1", "A", 99.0), ("p3", "A", 1.0), ("p3", "B", 1.0)]
    errors = [None] * len(CELLS) + ["CUDA out of memory", "boom", ""]
    found = contrast_differences(table(cells, error=errors), {"B": 1, "A": -1}, "score")
    assert found.values.tolist() == pytest.approx([28, 1])
    assert (found.n_error_rows, found.n_dropped) == (2, 1)


def test_a_trial_stored_twice_counts_once_and_a_later_success_replaces_an_error():
    cells = [("p", "A", 0.0), ("p", "A", 1.0), ("p", "B", 3.0), ("p", "B", 3.0)]
    ids, errors = ["a", "a", "b", "b"], ["boom", None, None, None]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        frame = table([cells[i] for i in order], trial_id=[ids[i] for i in order], error=[errors[i] for i in order])
        found = contrast_differences(frame, {"B": 1, "A": -1}, "score")
        assert len(frame) == 2
        assert (found.values.tolist(), found.n_error_rows) == ([2.0], 0)


def test_trials_without_an_id_are_not_taken_for_duplicates():
    assert len(table(CELLS, trial_id=None)) == len(CELLS)


def test_copies_of_a_trial_that_differ_are_chosen_whatever_their_order():
    cells, lists = [("p", "A", 1.0), ("p", "A", 2.0)], [[1, 2], None]
    chosen = {
        float(table([cells[i] for i in order], trial_id="a", tokens=[lists[i] for i in order])["score"].iloc[0])
        for order in ([0, 1], [1, 0])
    }
    assert len(chosen) == 1


def test_calibration_rows_never_reach_the_test_rows():
    cells = [("p1", "A", 1.0), ("p2", "A", 2.0)]
    frame = table(cells).assign(phase=["1", "calibration"], split=["test", "calibration"])
    assert rows_of(frame, split="test")["pair_id"].tolist() == ["p1"]
    assert rows_of(frame, split="calibration")["pair_id"].tolist() == ["p2"]


def test_without_a_split_column_the_calibration_phase_is_the_calibration_split():
    frame = pd.DataFrame({"pair_id": ["a", "b"], "condition": ["A", "A"], "phase": ["1", "calibration"]})
    assert prepare(frame)["split"].tolist() == ["test", "calibration"]


def test_missing_columns_are_named():
    with pytest.raises(StoreError, match="pair_id"):
        prepare(pd.DataFrame({"phase": ["1"], "condition": ["A"]}))
    with pytest.raises(StoreError, match="no_such_readout"):
        pair_means(table(CELLS), ["A"], "no_such_readout")


def test_pairs_that_share_a_prompt_become_one_unit_through_any_chain():
    cells = [(p, "A", 0.0) for p in ("p1", "p2", "p3", "p4", "p5")]
    frame = table(cells, source_id=["s1", "s1", "s2", None, ""], target_id=["t1", "t2", "t2", "t4", ""])
    assert independent_units(frame) == {"p1": "p1", "p2": "p1", "p3": "p1", "p4": "p4", "p5": "p5"}


def test_units_are_averaged_over_their_pairs():
    cells = [*CELLS, ("p3", "A", 0.0), ("p3", "B", 7.0)]
    units = {"p1": "p1", "p2": "p1"}
    found = contrast_differences(table(cells), {"B": 1, "A": -1}, "score", units=units)
    assert found.values.tolist() == pytest.approx([(28 + 1) / 2, 7])
    assert (found.n, found.n_pairs) == (2, 3)


@settings(max_examples=50, deadline=None)
@given(st.permutations(CELLS))
def test_row_order_changes_nothing(cells: list[tuple[str, str, float]]):
    there = contrast_differences(table(CELLS), {"B": 1, "A": -1}, "score")
    here = contrast_differences(table(cells), {"B": 1, "A": -1}, "score")
    assert here.values.tobytes() == there.values.tobytes()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-1e12, 1e12, allow_subnormal=False), min_size=1, max_size=60), st.randoms(use_true_random=False)
)
@example([1e-290], random.Random(0))
@example([2.0**-960 * (1 + 2**-45)], random.Random(0))
@example([1 - 2.0**-45, 3 * 2.0**-40], random.Random(0))
def test_sums_on_the_grid_are_exact_in_any_order_and_close_to_the_values(values: list[float], rng: random.Random):
    gridded = on_grid(np.array(values))
    shuffled = gridded.tolist()
    rng.shuffle(shuffled)
    assert sum(shuffled) == math.fsum(gridded) == float(gridded.sum())
    assert np.max(np.abs(gridded - values)) <= max(grid_step(np.array(values)), 2.0**-960)
    assert on_grid(gridded).tobytes() == gridded.tobytes()
