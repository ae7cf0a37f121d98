"""Maps of attention heads: a statistic of every layer and head, its difference between conditions, who stands out.

The pair is the unit, as everywhere. A map is one family: Benjamini-Hochberg over all its layers and heads. Maps are
exploratory: they say where to look, not that a claim holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from kvpatch.errors import StoreError
from kvpatch.protocols.hypotheses import parse_contrast
from kvpatch.statistics.grid import Floats, grid_step, on_grid
from kvpatch.statistics.intervals import SEED
from kvpatch.statistics.multiplicity import adjusted
from kvpatch.verdicts.pairs import independent_units, prepare, rows_of

RESAMPLES = 50_000
_BATCH = 5_000
OUTLYING = 3.5
"""Modified z from which a head lies apart from the others (Iglewicz & Hoaglin 1993, How to detect outliers)."""
SHARE_OF_LARGEST = 0.5
"""Share of the map's largest effect that a head which stands out has at least."""


def head_values(
    trials: pd.DataFrame, attention: pd.DataFrame, *, phase: str, statistic: str, stage: str = "forced"
) -> dict[str, pd.DataFrame]:
    """One statistic of every head, by condition and pair; errors left out, samples of a pair averaged.

    trials: rows of trials/*.parquet. attention: rows of attention/*.parquet.

    Returns:
        Condition -> [pairs, heads], index pair_id, columns (layer, head), both sorted; of the test split.
    Raises:
        StoreError: for a statistic that is not a column.
    """
    if statistic not in attention.columns:
        raise StoreError(f"attention has no statistic {statistic!r}")
    rows = rows_of(prepare(trials), split="test", phase=phase)
    rows = rows.loc[~rows["failed"], ["trial_id", "condition", "pair_id"]]
    of_stage = attention.loc[attention["stage"] == stage, ["trial_id", "layer", "head", statistic]]
    joined = rows.merge(of_stage, on="trial_id")
    out = {}
    for condition, part in joined.groupby("condition"):
        means = part.groupby(["pair_id", "layer", "head"])[statistic].mean()
        out[str(condition)] = means.unstack(["layer", "head"]).sort_index().sort_index(axis="columns").astype(float)
    return out


def head_means(values: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Columns condition, layer, head, n and mean over pairs, of what `head_values` gives."""
    parts = [
        pd.DataFrame({"condition": name, "n": table.notna().sum(), "mean": table.mean()}).reset_index()
        for name, table in values.items()
    ]
    return pd.concat(parts, ignore_index=True)[["condition", "layer", "head", "n", "mean"]]


def head_differences(
    trials: pd.DataFrame,
    attention: pd.DataFrame,
    *,
    phase: str,
    contrast: str,
    statistic: str,
    stage: str = "forced",
    alpha: float = 0.05,
) -> pd.DataFrame:
    """A contrast such as "C - N1" of one statistic, for every layer and head.

    Returns:
        A row a head: layer, head, n (units), estimate (mean of the pair differences), low and high (95%, Student's t),
        dz, p (two-sided sign-flip test), p_adjusted (Benjamini-Hochberg over the map), is_significant, stands_out (see
        `standing_out`). No rows where a condition of the contrast has none.
    """
    values = head_values(trials, attention, phase=phase, statistic=statistic, stage=stage)
    return map_of(values, trials, phase=phase, contrast=contrast, alpha=alpha)


def map_of(
    values: Mapping[str, pd.DataFrame], trials: pd.DataFrame, *, phase: str, contrast: str, alpha: float = 0.05
) -> pd.DataFrame:
    """`head_differences` of what `head_values` gave."""
    weights = parse_contrast(contrast)
    columns = ["layer", "head", "n", "estimate", "low", "high", "dz", "p", "p_adjusted", "is_significant", "stands_out"]
    if any(name not in values for name in weights):
        return pd.DataFrame(columns=pd.Index(columns))
    difference = sum(weight * values[name] for name, weight in sorted(weights.items()))
    assert isinstance(difference, pd.DataFrame)
    rows = rows_of(prepare(trials), split="test", phase=phase)
    units = independent_units(rows.loc[rows["condition"].isin(["A", "B"])])
    table = difference.groupby([units.get(str(pair), str(pair)) for pair in difference.index]).mean().sort_index()
    return head_tests(table, alpha)[columns]


def head_tests(differences: pd.DataFrame, alpha: float = 0.05) -> pd.DataFrame:
    """The tests of a map: differences is [units, heads], columns (layer, head); see `head_differences`."""
    raw = differences.to_numpy(dtype=float)
    n = np.isfinite(raw).sum(axis=0)
    safe = np.maximum(n, 1)
    estimate = np.where(n > 0, np.nansum(raw, axis=0) / safe, np.nan)
    spread = np.nansum((raw - estimate) ** 2, axis=0) / np.maximum(n - 1, 1)
    sd = np.where(n > 1, np.sqrt(spread), np.nan)
    half = stats.t.ppf(0.975, np.maximum(n - 1, 1)) * sd / np.sqrt(safe)
    p = sign_flip_each(raw)
    out = differences.columns.to_frame(index=False).assign(
        n=n,
        estimate=estimate,
        low=estimate - half,
        high=estimate + half,
        dz=np.divide(estimate, sd, out=np.full_like(sd, np.nan), where=sd > 0),
        p=p,
        p_adjusted=adjusted(p.tolist(), "benjamini_hochberg"),
    )
    out["is_significant"] = out["p_adjusted"] < alpha
    out["stands_out"] = standing_out(out)
    return out


def sign_flip_each(differences: Floats) -> Floats:
    """Two-sided sign-flip p of the mean of every column; every column takes the same flips.

    differences: [n, columns]; what is not finite is left out. As `tests.sign_flip`, for hundreds of columns at once.
    Fewer than 2 values give NaN.
    """
    n, columns = differences.shape
    is_there = np.isfinite(differences)
    values = np.column_stack([on_grid(column) for column in np.where(is_there, differences, 0.0).T])
    observed, tolerance = values.sum(axis=0), np.array([n * grid_step(column) for column in values.T])
    is_exact = 2**n <= RESAMPLES
    total = 2**n if is_exact else RESAMPLES
    rng = np.random.default_rng(SEED)
    at_least, at_most = np.zeros(columns), np.zeros(columns)
    for start in range(0, total, _BATCH):
        size = min(_BATCH, total - start)
        codes = np.arange(start, start + size)[:, None]
        flips = (codes >> np.arange(n)) & 1 if is_exact else rng.integers(0, 2, (size, n))
        sums = observed - 2.0 * (flips.astype(float) @ values)  # [size, columns]
        at_least += np.count_nonzero(sums >= observed - tolerance, axis=0)
        at_most += np.count_nonzero(sums <= observed + tolerance, axis=0)
    extra = 0 if is_exact else 1
    p = np.minimum(1.0, 2 * (np.minimum(at_least, at_most) + extra) / (total + extra))
    return np.where(is_there.sum(axis=0) >= 2, p, np.nan)


def standing_out(heads: pd.DataFrame) -> pd.Series:
    """Whether each head of a map stands out, not only differs.

    Once a model is in another mode every later head reads another residual stream, and with enough pairs each of them
    differs significantly. A head that stands out differs after correction, lies apart from the other heads (modified z
    of its size above 3.5), and has at least half the size of the largest.

    heads: columns estimate and is_significant, a row a head.
    """
    size = heads["estimate"].abs()
    middle = float(size.median())
    spread = float((size - middle).abs().median())
    z = 0.6745 * (size - middle) / spread if spread > 0 else (size - middle) * math.inf
    return heads["is_significant"] & (z > OUTLYING) & (size >= SHARE_OF_LARGEST * size.max())


def heads_standing_out(heads: pd.DataFrame) -> list[tuple[int, int]]:
    """(layer, head) of those that stand out, the largest first."""
    found = heads.loc[heads["stands_out"]]
    order: Sequence[int] = found["estimate"].abs().sort_values(ascending=False).index.tolist()
    return [(int(heads.loc[i, "layer"]), int(heads.loc[i, "head"])) for i in order]  # pyright: ignore[reportArgumentType]
