"""What is computed beside a verdict, and decides nothing: another look at a contrast where its data ask for one."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field
from scipy import stats

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.specs.base import Frozen
from kvpatch.statistics.clustering import Clustered, two_way_clustered
from kvpatch.statistics.floors import zeros_dominate
from kvpatch.statistics.hurdle import Hurdle, hurdle
from kvpatch.statistics.lee import lee_bounds
from kvpatch.verdicts.pairs import PairDifferences, contrast_table, pair_means


class Sensitivity(Frozen):
    """Analyses beside the test, each only where it is called for."""

    skewness: float | None = Field(default=None, description="of the pair differences; flips assume it is 0 by design")
    zeros: float | None = Field(default=None, description="share of the pairs' values that are 0")
    hurdle: Hurdle | None = Field(default=None, description="any hit, then rate: where zeros dominate")
    lee: tuple[float, float] | None = Field(
        default=None, description="Lee bounds of the contrast among outputs coherent either way, where some are not"
    )
    clustered: Clustered | None = Field(default=None, description="two-way clustered errors, where pairs share prompts")


def sensitivity(rows: pd.DataFrame, h: Hypothesis, found: PairDifferences) -> Sensitivity:
    """Look again at a contrast.

    rows: prepared test rows of its phase. found: its pair differences.
    """
    skewness = _known(float(stats.skew(np.sort(found.values)))) if found.n > 2 and np.ptp(found.values) > 0 else None
    weights = h.weights() if h.kind.measures == "difference" else {}
    if len(weights) != 2 or sum(weights.values()) != 0:
        return Sensitivity(skewness=skewness)
    first, second = sorted(weights, key=lambda name: -weights[name])
    means = pair_means(rows, weights, h.readout, h.transform)
    values = means[[first, second]].to_numpy(dtype=float)
    values = values[np.isfinite(values).all(axis=1)]
    zeros = float(np.mean(values == 0)) if values.size else None
    side = "two-sided" if h.sign is None else "less" if h.sign < 0 else "greater"
    is_hurdle = h.transform == "none" and zeros_dominate(values)
    return Sensitivity(
        skewness=skewness,
        zeros=zeros,
        hurdle=hurdle(values[:, 0], values[:, 1], side) if is_hurdle else None,
        lee=_lee(rows, h, first, second),
        clustered=_clustered(rows, h, means, "id") if found.n < found.n_pairs else None,
    )


def by_domain(rows: pd.DataFrame, h: Hypothesis) -> Clustered | None:
    """A contrast with errors clustered by the domains of its sources and of its targets, whose pairs share topics and
    continuations. None where the domains are not stored, or no two pairs share one.

    rows: prepared test rows of its phase.
    """
    names = ("source_domain", "target_domain")
    if h.kind.measures != "difference" or any(name not in rows.columns for name in names):
        return None
    return _clustered(rows, h, pair_means(rows, h.weights(), h.readout, h.transform), "domain")


def _lee(rows: pd.DataFrame, h: Hypothesis, first: str, second: str) -> tuple[float, float] | None:
    if h.readout not in rows.columns:
        return None
    sides = []
    for name in (first, second):
        own = rows.loc[(rows["condition"] == name) & ~rows["failed"]]
        good = own.loc[own["coherent"].fillna(False).astype(bool)]
        values = np.sort(pd.to_numeric(good[h.readout], errors="coerce").to_numpy(dtype=float))
        values = np.log(values[values > 0]) if h.transform == "log" else values[np.isfinite(values)]
        sides.append((values, len(good) / len(own) if len(own) else 0.0))
    if all(share == 1 for _, share in sides):
        return None
    low, high = lee_bounds(*sides[0], *sides[1])
    return (low, high) if math.isfinite(low) else None


def _clustered(
    rows: pd.DataFrame, h: Hypothesis, means: pd.DataFrame, shared: Literal["id", "domain"]
) -> Clustered | None:
    differences = contrast_table(means, {"difference": h.weights()})["difference"]
    prompts = rows.drop_duplicates("pair_id").set_index("pair_id").loc[differences.index]
    values = differences.to_numpy(dtype=float)
    sides = prompts[f"source_{shared}"], prompts[f"target_{shared}"]
    if any(side.isna().any() for side in sides) or all(side.is_unique for side in sides):
        return None
    sources, targets = (side.astype(str).tolist() for side in sides)
    return two_way_clustered(values, sources, targets)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
