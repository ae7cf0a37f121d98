"""A contrast that lacks more than a tenth of its rows decides only what their worst values would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kvpatch.verdicts.decide import verdicts
from kvpatch.verdicts.missing import filled, missing_shares
from kvpatch.verdicts.pairs import prepare

Make = Callable[..., Any]
N = 20
WAYS = {
    "failed": lambda trials, lost: trials.assign(error=[("boom" if i in lost else None) for i in trials.index]),
    "no number": lambda trials, lost: trials.assign(score=trials["score"].where(~trials.index.isin(lost))),
    "no row": lambda trials, lost: trials.drop(lost),
}


def lowest(trials: pd.DataFrame, condition: str, count: int) -> pd.Index:
    return trials[trials["condition"] == condition].nsmallest(count, "score").index


@pytest.mark.parametrize("way", WAYS)
def test_null_data_without_their_lowest_values_are_not_supported(make_protocol: Make, make_trials: Make, way: str):
    protocol = make_protocol({"id": "h", "contrast": "X - A", "test": "greater"})
    rng = np.random.default_rng(25)
    words = []
    for _ in range(4):
        trials = make_trials({"A": rng.normal(size=N), "X": rng.normal(size=N)})
        found = verdicts(protocol, WAYS[way](trials, lowest(trials, "X", 9)))[0]
        words.append(found.verdict)
        assert "45% of the rows of X in phase 1 lack a value" in found.because
    assert "supported" not in words
    assert (found.verdict, found.blocked_by) == ("not interpretable", "missing")


def test_several_samples_do_not_hide_which_ones_failed(make_protocol: Make, make_trials: Make):
    rng = np.random.default_rng(5)
    draws = [make_trials({"A": rng.normal(size=N), "X": rng.normal(size=N)}).assign(sample=s) for s in range(5)]
    trials = pd.concat([t.assign(trial_id=t["trial_id"] + f"-{s}") for s, t in enumerate(draws)], ignore_index=True)
    trials.loc[lowest(trials, "X", 45), "error"] = "boom"
    protocol = make_protocol({"id": "h", "contrast": "X - A", "test": "greater"})
    assert verdicts(protocol, trials)[0].blocked_by == "missing"


def test_a_large_effect_stands_whatever_the_missing_rows_were(make_protocol: Make, make_trials: Make):
    rng = np.random.default_rng(4)
    trials = make_trials({"A": rng.normal(size=N), "X": 10 + rng.normal(size=N)})
    trials.loc[lowest(trials, "X", 3), "error"] = "boom"
    v = verdicts(make_protocol({"id": "h", "contrast": "X - A", "test": "greater"}), trials)[0]
    assert v.verdict == "supported"
    assert v.because.endswith(
        "the verdict is the same with these at the lowest and at the highest value that was seen."
    )


def test_a_tenth_may_be_missing(make_protocol: Make, make_trials: Make):
    rng = np.random.default_rng(4)
    trials = make_trials({"A": rng.normal(size=N), "X": 3 + rng.normal(size=N)})
    trials.loc[lowest(trials, "X", 2), "error"] = "boom"
    v = verdicts(make_protocol({"id": "h", "contrast": "X - A", "test": "greater"}), trials)[0]
    assert v.verdict == "supported" and "lack" not in v.because


def test_a_trend_and_a_correlation_need_their_rows_too(make_protocol: Make, make_trials: Make):
    rng = np.random.default_rng(6)
    trend = {"id": "t", "contrast": "A < X < B", "test": "trend"}
    against = {"contrast": "X", "readout": "score"}
    tied = {"id": "r", "contrast": "B - A", "test": "correlates", "against": against, "margin": {"value": 0.3}}
    tied |= {"direction": "positive"}
    trials = make_trials({name: rng.normal(size=N) for name in ("A", "X", "B")})
    trials.loc[lowest(trials, "B", 9), "error"] = "boom"
    found = verdicts(make_protocol(trend, tied), trials)
    assert [v.blocked_by for v in found] == ["missing", "missing"]


def test_shares_count_samples_once_and_spare_conditions_that_are_not_planned_for_all(make_trials: Make):
    trials = make_trials({"A": [1.0] * 10, "X": [1.0] * 8})
    again = trials.assign(error="boom", trial_id=trials["trial_id"] + "-e")
    rows = prepare(pd.concat([trials, again]))
    assert missing_shares(rows, ["A", "X"], "score") == pytest.approx({"A": 0.0, "X": 0.2})
    assert missing_shares(rows, ["A", "X"], "score", partial={"X"}) == pytest.approx({"A": 0.0, "X": 0.0})


def test_missing_values_are_put_at_the_extremes_that_were_seen(make_trials: Make):
    trials = make_trials({"A": [1.0, 2.0, 3.0], "X": [5.0, np.nan]})
    rows = prepare(trials)
    for toward, end in ((1, 5.0), (-1, 1.0)):
        whole = filled(rows, "1", {"X": 1, "A": -1}, "score", toward=toward)
        assert whole[whole["condition"] == "X"]["score"].tolist() == [5.0, end, end]
