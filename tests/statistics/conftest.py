"""A small protocol and trials with known differences, to put one rule at a time to the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kvpatch.protocols.schema import Protocol

CONDITIONS = {
    "A": {"about": "natural target"},
    "B": {"about": "natural source", "into": "source"},
    "C": {"about": "full swap", "from": "source", "patch": {"align": "replace"}},
    "D": {"about": "full swap back", "into": "source", "from": "target", "patch": {"align": "replace"}},
    "N1": {"about": "foreign cache", "from": "foreign", "patch": {"align": "replace"}},
    "N2": {"about": "scaffold", "from": "neutral", "patch": {"align": "replace"}},
    "X": {"about": "body only", "from": "source", "patch": {"slots": "body"}},
}


def spread(mean: float, sd: float, n: int) -> np.ndarray:
    """Values [n] with exactly this mean and sd (n - 1), shaped like a normal sample."""
    z = stats.norm.ppf((np.arange(n) + 0.5) / n)
    z = (z - z.mean()) / z.std(ddof=1)
    return mean + sd * z


def build_protocol(*hypotheses: dict[str, Any], **fields: Any) -> Protocol:
    defaults = {"claim": "it holds", "phase": "1", "readout": "score", "family": "f", "gate": 1}
    return Protocol.model_validate(
        {
            "protocol": "small",
            "title": "A small protocol",
            "question": "Does it hold?",
            "conditions": CONDITIONS,
            "phases": {"1": {"question": "?", "n": 10, "conditions": list(CONDITIONS)}},
            "hypotheses": [{**defaults, **h} for h in hypotheses],
            **fields,
        }
    )


def build_trials(
    test: dict[str, Sequence[float]],
    calibration: dict[str, Sequence[float]] | None = None,
    *,
    incoherent: dict[str, float] | None = None,
) -> pd.DataFrame:
    """One sample a pair.

    test, calibration: condition -> score of each pair. incoherent: condition -> share of its test trials.
    """
    rows = []
    for split, phase, scores in (("test", "1", test), ("calibration", "calibration", calibration or {})):
        for condition, values in scores.items():
            bad = (incoherent or {}).get(condition, 0.0) * len(values)
            for i, value in enumerate(values):
                rows.append(
                    {
                        "trial_id": f"{split}-{condition}-{i}",
                        "phase": phase,
                        "split": split,
                        "condition": condition,
                        "pair_id": f"{split}-{i:03d}",
                        "source_id": f"{split}-s{i}",
                        "target_id": f"{split}-t{i}",
                        "sample": 0,
                        "score": float(value),
                        "coherent": not (split == "test" and i < bad),
                        "error": None,
                    }
                )
    return pd.DataFrame(rows)


@pytest.fixture
def make_protocol() -> Callable[..., Protocol]:
    return build_protocol


@pytest.fixture
def make_trials() -> Callable[..., pd.DataFrame]:
    return build_trials


@pytest.fixture
def spread_out() -> Callable[[float, float, int], np.ndarray]:
    return spread
