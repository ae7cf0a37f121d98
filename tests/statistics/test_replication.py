"""Does a finding repeat, and what several studies say together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kvpatch.statistics.intervals import Interval
from kvpatch.statistics.paired_tests import dz_interval
from kvpatch.statistics.replication import Study, replicates
from kvpatch.verdicts.decide import verdicts

Make = Callable[..., Any]


def study(low: float, high: float, bound: float = 0.0) -> Study:
    return Study((low + high) / 2, Interval(low, high, 0.95), bound)


@pytest.mark.parametrize(
    ("first", "second", "sign", "holds", "against"),
    [
        (study(1, 3), study(2, 4), 1, True, False),
        (study(-3, -1), study(-4, -2), -1, True, False),
        (study(1, 2), study(3, 4), 1, False, False),  # no overlap
        (study(1, 3), study(-1, 3), 1, False, False),  # undecided
        (study(1, 3), study(-3, -1), 1, False, True),
        (study(1, 3), study(0.1, 0.4, 0.5), 1, False, True),  # within its margin
        (study(0.1, 3, 0.5), study(1, 3, 0.5), 1, False, False),  # the first does not count
        (study(1, 3, 0.5), study(1, 3, 0.5), 1, True, False),
    ],
)
def test_a_finding_repeats_past_both_margins_with_overlap(first, second, sign, holds, against):
    found = replicates(first, second, sign)
    assert (found.holds, found.speaks_against) == (holds, against)


def in_dz(found: Study, low: float, high: float) -> Study:
    return replace(found, shared=Interval(low, high, 0.95))


def test_effects_of_two_models_overlap_in_what_they_share_and_not_in_their_own_units():
    """Nats of a peaked model and of a flat one: 1 to 3 against 10 to 30, each 4 standard errors from 0."""
    one, other = study(1, 3), study(10, 30)
    assert not replicates(one, other, 1).holds
    assert replicates(in_dz(one, 0.5, 1.5), in_dz(other, 0.6, 1.6), 1).holds
    apart = replicates(in_dz(one, 0.5, 1.5), in_dz(study(1, 3), 2, 3), 1)
    assert (apart.holds, apart.speaks_against) == (False, False) and "do not overlap" in apart.reason
    assert "has no dz" in replicates(in_dz(one, 0.5, 1.5), in_dz(other, float("nan"), float("nan")), 1).reason


# pingouin 0.7.0: compute_esci(dz, nx=24, ny=24, paired=True, eftype="cohen", decimals=12).
OF_PINGOUIN = {
    -0.8: (-1.322784454353, -0.342720135144),
    0.0: (-0.514542965289, 0.331744876888),
    2.0: (1.087380970374, 2.436587193964),
}


@pytest.mark.parametrize("mean", OF_PINGOUIN)
def test_the_interval_of_dz_is_pingouin_s(mean: float):
    found = dz_interval(np.random.default_rng(8).normal(mean, 1, 24))
    assert (found.low, found.high) == pytest.approx(OF_PINGOUIN[mean], abs=1e-9)
    assert np.isnan(dz_interval(np.ones(5)).low) and np.isnan(dz_interval(np.ones(1)).high)


def test_a_verdict_compares_dz_across_models(make_protocol: Make, make_trials: Make, spread_out: Make):
    """The second model's effect is ten times as large in nats, and as large in its own spread."""
    phases = {"1": {"question": "?", "n": 10, "conditions": ["A", "C"]}}
    phases["7"] = phases["1"] | {"model": "second"}
    hypotheses = (
        {"id": "first", "contrast": "C - A", "test": "greater"},
        {"id": "second", "contrast": "C - A", "test": "replicates", "of": "first", "phase": "7"},
    )
    conditions = {
        "A": {"about": "a"},
        "B": {"about": "b", "into": "source"},
        "C": {"about": "c", "from": "foreign", "patch": {"slots": "body"}},
    }
    protocol = make_protocol(*hypotheses, phases=phases, models={"second": "m"}, conditions=conditions)
    flat = [0.0] * 30

    def told(scale: float, dz: float) -> str:
        here = make_trials({"A": flat, "C": spread_out(1.0, 1.0, 30)})
        there = make_trials({"A": flat, "C": spread_out(scale * dz, scale, 30)})
        trials = pd.concat([here, there.assign(phase="7", trial_id="7" + there["trial_id"])])
        return {v.id: f"{v.verdict}: {v.because}" for v in verdicts(protocol, trials)}["second"]

    assert told(10, 1).startswith("supported")
    assert "dz 1 (95% interval 0.543 to 1.46), where first has dz 1 (95% interval" in told(10, 1)
    assert told(0.25, 4).startswith("inconclusive") and "do not overlap" in told(0.25, 4)


def test_without_an_interval_nothing_repeats():
    nan = float("nan")
    assert not replicates(study(1, 3), study(nan, nan), 1).holds
