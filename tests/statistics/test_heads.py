"""Maps of heads, on planted truth: the planted head stands out and no other; where nothing is planted none does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from kvpatch.errors import StoreError
from kvpatch.statistics import paired_tests as tests
from kvpatch.verdicts.head_contrasts import (
    head_differences,
    head_means,
    head_tests,
    head_values,
    heads_standing_out,
    sign_flip_each,
)

LAYERS, HEADS = 6, 4
PLANTED = (2, 1)


def run_of(
    n: int = 24, effect: float = 0.3, downstream: float = 0.02, seed: int = 0, samples: int = 1
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trials and heads of A, B, C, N1. Under C the planted head moves by `effect`, heads above it by `downstream`."""
    rng = np.random.default_rng(seed)
    trials, heads = [], []
    level = rng.uniform(0.2, 0.6, (LAYERS, HEADS))
    for pair in range(n):
        own = level + rng.normal(0, 0.05, (LAYERS, HEADS))
        for condition in ("A", "B", "C", "N1"):
            for sample in range(samples):
                value = own + rng.normal(0, 0.02, (LAYERS, HEADS))
                if condition == "C":
                    value[PLANTED] += effect
                    value[PLANTED[0] + 1 :] += downstream
                trial = f"{condition}-{pair}-{sample}"
                trials.append(
                    {
                        "trial_id": trial,
                        "phase": "6",
                        "split": "test",
                        "condition": condition,
                        "pair_id": f"p{pair:02d}",
                        "source_id": f"s{pair}",
                        "target_id": f"t{pair}",
                        "sample": sample,
                        "error": None,
                    }
                )
                for stage, shift in (("forced", 0.0), ("own", 1.0)):
                    heads += [
                        {"trial_id": trial, "stage": stage, "layer": x, "head": y, "mass_marked": value[x, y] + shift}
                        for x in range(LAYERS)
                        for y in range(HEADS)
                    ]
    return pd.DataFrame(trials), pd.DataFrame(heads)


def differences(run: tuple[pd.DataFrame, pd.DataFrame], **changes: Any) -> pd.DataFrame:
    return head_differences(*run, **{"phase": "6", "contrast": "C - N1", "statistic": "mass_marked", **changes})


def test_planted_head_stands_out_and_no_other():
    """Heads above it differ too, significantly so, and do not stand out."""
    found = differences(run_of())
    assert len(found) == LAYERS * HEADS
    assert heads_standing_out(found) == [PLANTED]
    assert found["is_significant"].sum() > 1
    planted = found[(found["layer"] == 2) & (found["head"] == 1)].iloc[0]
    assert planted["estimate"] == pytest.approx(0.3, abs=0.03)
    assert planted["low"] < 0.3 < planted["high"]


def test_nothing_stands_out_where_nothing_is_planted():
    """At most 5% of maps name a head, over 100 runs."""
    named = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        columns = pd.MultiIndex.from_product([range(LAYERS), range(HEADS)], names=["layer", "head"])
        table = pd.DataFrame(rng.normal(0, 1, (20, LAYERS * HEADS)), columns=columns)
        named += bool(heads_standing_out(head_tests(table)))
    assert named <= 5


def test_two_planted_heads_both_stand_out_the_larger_first():
    trials, heads = run_of()
    is_other = (heads["layer"] == 5) & (heads["head"] == 3) & heads["trial_id"].str.startswith("C")
    heads.loc[is_other, "mass_marked"] -= 0.6
    assert heads_standing_out(differences((trials, heads))) == [(5, 3), PLANTED]


def test_a_contrast_that_is_not_planted_names_no_head():
    assert heads_standing_out(differences(run_of(), contrast="N1 - A")) == []


@pytest.mark.parametrize("n", [8, 25])
def test_each_column_s_p_is_that_of_the_single_test(n: int):
    rng = np.random.default_rng(1)
    columns = rng.normal([0.0, 0.2, 0.6, -0.5], 1, (n, 4))
    columns[3, 1] = np.nan
    found = sign_flip_each(columns)
    for column, p in zip(columns.T, found, strict=True):
        own = tests.sign_flip(column[np.isfinite(column)], "two-sided")
        assert p == pytest.approx(own, rel=0.1 if n > 15 else 0.02, abs=2e-3)


def test_column_with_one_value_has_no_p_and_counts_as_a_test_that_failed():
    columns = pd.MultiIndex.from_product([[0], [0, 1]], names=["layer", "head"])
    table = pd.DataFrame([[1.0, 1.0], [1.1, np.nan], [0.9, np.nan]] * 1, columns=columns)
    found = head_tests(table)
    assert found["n"].tolist() == [3, 1]
    assert np.isnan(found["p_adjusted"][1]) and found["p_adjusted"][0] == pytest.approx(0.5)


def test_samples_are_averaged_and_pairs_that_share_a_prompt_count_once():
    trials, heads = run_of(samples=2)
    assert set(differences((trials, heads))["n"]) == {24}
    trials["source_id"] = [f"s{int(pair[1:]) % 6}" for pair in trials["pair_id"]]
    assert set(differences((trials, heads))["n"]) == {6}


def test_failed_trials_and_other_stages_are_left_out():
    trials, heads = run_of()
    trials.loc[trials["trial_id"] == "C-3-0", "error"] = "lost"
    heads.loc[heads["trial_id"] == "C-3-0", "mass_marked"] = 1e6
    found = differences((trials, heads))
    assert heads_standing_out(found) == [PLANTED]
    values = head_values(trials, heads, phase="6", statistic="mass_marked")
    assert set(values) == {"A", "B", "C", "N1"}
    assert values["C"].shape == (23, LAYERS * HEADS) and values["A"].shape == (24, LAYERS * HEADS)
    assert float(values["A"].to_numpy().max()) < 1
    assert set(head_means(values)["condition"]) == {"A", "B", "C", "N1"}


def test_absent_conditions_give_no_rows_and_an_unknown_statistic_is_named():
    run = run_of(n=4)
    assert differences(run, contrast="C - Q").empty
    assert differences(run, phase="5").empty
    with pytest.raises(StoreError, match="no statistic 'entropie'"):
        differences(run, statistic="entropie")
