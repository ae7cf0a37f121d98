"""Beside a verdict stands the error that allows for topics and continuations that pairs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kvpatch.store.columns import TRIAL_COLUMNS
from kvpatch.verdicts.decide import verdicts

Make = Callable[..., Any]
N, DOMAINS = 48, 8
H = {"id": "h", "contrast": "X - A", "test": "greater"}


def with_domains(trials: pd.DataFrame) -> pd.DataFrame:
    place = trials["pair_id"].str.slice(-3).astype(int)
    return trials.assign(
        source_domain="s" + (place % DOMAINS).astype(str), target_domain="t" + (place // 6).astype(str)
    )


def test_shared_domains_widen_the_error(make_protocol: Make, make_trials: Make):
    rng = np.random.default_rng(1973)
    own = rng.normal(0, 1, DOMAINS)
    x = own[np.arange(N) % DOMAINS] + rng.normal(0, 0.3, N)
    v = verdicts(make_protocol(H), with_domains(make_trials({"A": [0.0] * N, "X": x})))[0]
    assert v.clusters == {"sources": DOMAINS, "targets": 8}
    assert v.se_clustered is not None and v.se_clustered > 1.5 * np.std(x, ddof=1) / np.sqrt(N)
    assert v.p_clustered is not None and 0 < v.p_clustered < 1


@pytest.mark.parametrize("stored", [True, False])
def test_runs_without_domains_have_none(make_protocol: Make, make_trials: Make, stored: bool):
    trials = make_trials({"A": [0.0] * N, "X": np.random.default_rng(1).normal(size=N)})
    if stored:  # as a run of before is read: the columns are there, and empty
        trials = trials.assign(source_domain=None, target_domain=None)
    v = verdicts(make_protocol(H), trials)[0]
    assert (v.se_clustered, v.p_clustered, v.clusters) == (None, None, None)


def test_the_domains_are_columns_of_a_trial():
    assert {"source_domain", "target_domain"} <= set(TRIAL_COLUMNS)
