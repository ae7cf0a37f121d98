"""Trials to pair differences. The pair is the unit of analysis: five samples of one pair are one observation.

Values are put on a binary grid (`on_grid`), so that their sums are exact: the same in any row order, on any
machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kvpatch.errors import StoreError
from kvpatch.specs.readout import Place, Transform
from kvpatch.specs.readouts import Readout, readouts, shown, sparse
from kvpatch.statistics.grid import Floats, on_grid

Label = TypeVar("Label", str, tuple[str, str])
REQUIRED = ("pair_id", "phase", "condition")


@dataclass(frozen=True, eq=False)
class PairDifferences:
    """A contrast, one number a unit (a unit is a pair, or the mean of pairs that share a prompt).

    values: [units], in the readout's unit, on a binary grid, in the order of unit_ids.
    n_dropped: pairs left out because a condition is missing or a value is not finite.
    n_error_rows: trials left out because they hold an error.
    n_pairs: pairs used, before those that share a prompt were averaged.
    """

    values: Floats
    unit_ids: tuple[str, ...]
    n_dropped: int
    n_error_rows: int
    n_pairs: int

    @property
    def n(self) -> int:
        """Number of units."""
        return len(self.values)


def prepare(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials with text phases, a `split`, a `failed` flag, `source_tokens`, and each trial once.

    `source_tokens` is the length of the prompt whose cache was put in, to be held constant in correlations.

    A trial that is stored twice counts once; one that failed and was done again counts as done. Without a
    `split` column, rows of phase "calibration" are the calibration split.

    Raises:
        StoreError: if a column is missing.
    """
    missing = [name for name in REQUIRED if name not in trials.columns]
    if missing:
        raise StoreError(f"the trials have no column {missing[0]!r}; each needs {', '.join(REQUIRED)}")
    out = trials.reset_index(drop=True)
    phase, pair = out["phase"].astype(str), out["pair_id"].astype(str)
    out = out.assign(phase=phase, pair_id=pair, condition=out["condition"].astype(str), failed=_failed(out))
    if "split" not in out.columns:
        out = out.assign(split=np.where(out["phase"] == "calibration", "calibration", "test"))
    if "source_token_ids" in out.columns:
        out = out.assign(source_tokens=[math.nan if ids is None else len(ids) for ids in out["source_token_ids"]])
    return _each_once(out)


def _failed(trials: pd.DataFrame) -> pd.Series:
    if "error" not in trials.columns:
        return pd.Series(False, index=trials.index)
    return trials["error"].notna() & (trials["error"].astype(str).str.strip() != "")


def _each_once(trials: pd.DataFrame) -> pd.DataFrame:
    if "trial_id" not in trials.columns:
        return trials
    key = ["trial_id", "phase", "split", "condition", "pair_id"]
    twice = trials.duplicated(key, keep=False) & trials["trial_id"].notna()
    if not twice.any():
        return trials
    again = trials.loc[twice]
    scalars = [str(c) for c in sorted(again.columns) if all(map(pd.api.types.is_scalar, again[c]))]
    text = ["\x1f".join(map(str, row)) for row in again.loc[:, scalars].itertuples(index=False)]
    kept = again.assign(_order=text).sort_values([*key, "failed", "_order"]).drop_duplicates(key)
    return pd.concat([trials.loc[~twice], kept.drop(columns=["_order"])], ignore_index=True)


def rows_of(trials: pd.DataFrame, *, split: str, phase: str | None = None) -> pd.DataFrame:
    """The rows of one split ("test" or "calibration"), and of one phase where it is given."""
    rows = trials.loc[trials["split"] == split]
    return rows if phase is None else rows.loc[rows["phase"] == phase]


def pair_means(
    trials: pd.DataFrame, conditions: Iterable[str], readout: str, transform: Transform = "none"
) -> pd.DataFrame:
    """Mean readout of each pair under each condition, over samples; errors left out.

    "log" takes the natural logarithm of each sample first. A sample that is not finite makes its pair's mean
    NaN: which samples lack a number is not chance, so they are not averaged away.

    Returns:
        [pairs, conditions], index pair_id (sorted), NaN where there is nothing.
    Raises:
        StoreError: if there are rows, and the readout is not a column.
    """
    columns = list(conditions)
    rows = trials.loc[trials["condition"].isin(columns)]
    if readout not in trials.columns:
        if len(rows):
            raise StoreError(_no_column(readout))
        rows = rows.assign(**{readout: []})
    pairs = sorted(rows["pair_id"].unique())
    value = np.asarray(pd.to_numeric(rows[readout], errors="coerce"), dtype=float)
    value = np.where(np.isfinite(value), value, np.nan)
    if transform == "log":
        value = np.log(np.where(value > 0, value, np.nan))
    cells = zip(rows["pair_id"].tolist(), rows["condition"].tolist(), strict=True)
    means = _means_by(list(cells), value, where=~np.asarray(rows["failed"], dtype=bool))
    table = [[means.get((pair, name), math.nan) for name in columns] for pair in pairs]
    shaped = np.array(table, dtype=float).reshape(len(pairs), len(columns))
    return pd.DataFrame(shaped, index=pd.Index(pairs, name="pair_id"), columns=pd.Index(columns))


def _no_column(readout: str) -> str:
    if readout in readouts():
        return f"the trials have no column {readout!r}, which the protocol's hypotheses read"
    return (
        f"the protocol's hypotheses read {readout!r}, a readout that no installed package registers; "
        "install the package that measured it"
    )


def shown_of(place: Place, trials: pd.DataFrame) -> list[Readout]:
    """The readouts that are shown in a place, sparse ones only where a trial holds a number of them."""
    there = {r.name for r in sparse() if r.name in trials.columns and trials[r.name].notna().any()}
    return shown(place, there)


def _means_by(labels: Sequence[Label], values: Floats, where: NDArray[np.bool_] | None = None) -> dict[Label, float]:
    """Mean of the values of each label; exactly rounded sums, so that their order does not matter."""
    groups: dict[Label, list[float]] = {}
    kept = np.ones(len(values), dtype=bool) if where is None else where
    for label, value, keep in zip(labels, values, kept, strict=True):
        if keep:
            groups.setdefault(label, []).append(float(value))
    return {label: math.fsum(group) / len(group) for label, group in groups.items()}


def contrast_differences(
    trials: pd.DataFrame,
    weights: Mapping[str, int],
    readout: str,
    transform: Transform = "none",
    units: Mapping[str, str] | None = None,
) -> PairDifferences:
    """Weighted sum of a pair's condition means, for each pair that has all of them.

    trials: prepared rows of one phase and split. weights: condition -> +1 or -1 (`Hypothesis.weights()`).
    units: pair -> unit (`independent_units`); pairs of one unit are averaged. A pair that is not in it stands
    alone.

    Raises:
        StoreError: if the readout is not a column.
    """
    means = pair_means(trials, weights, readout, transform)
    table = contrast_table(means, {"difference": weights}, units)
    return count_of(trials, weights, means, table.index, table["difference"].to_numpy(dtype=float))


def count_of(
    trials: pd.DataFrame, conditions: Iterable[str], means: pd.DataFrame, unit_ids: Iterable[object], values: Floats
) -> PairDifferences:
    """Numbers a unit, with the count of what they rest on.

    trials: the rows they were made of. means: [pairs, columns], NaN where a pair lacks something; such pairs count as
    dropped. values: [units].
    """
    failed = trials["condition"].isin(list(conditions)) & trials["failed"]
    whole = int(np.isfinite(means.to_numpy(dtype=float)).all(axis=1).sum())
    return PairDifferences(
        values=on_grid(values),
        unit_ids=tuple(str(unit) for unit in unit_ids),
        n_dropped=len(means) - whole,
        n_error_rows=int(np.count_nonzero(failed)),
        n_pairs=whole,
    )


def contrast_table(
    means: pd.DataFrame, contrasts: Mapping[str, Mapping[str, int]], units: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Several contrasts on the same units: those with every condition of every contrast.

    means: [pairs, conditions]. contrasts: name -> weights. Returns [units, contrasts], index sorted.
    """
    names = sorted({name for weights in contrasts.values() for name in weights})
    numbers = means[names].to_numpy(dtype=float)
    is_whole = np.asarray(np.isfinite(numbers).all(axis=1), dtype=bool)
    whole = dict(zip(names, numbers[is_whole].T, strict=True))
    index = means.index[is_whole]
    columns = {}
    for name, weights in contrasts.items():
        total = np.zeros(len(index))
        for condition in sorted(weights):
            total = total + weights[condition] * whole[condition]
        columns[name] = total
    table = pd.DataFrame(columns, index=index)
    if not units:
        return table
    labels = [units.get(str(pair), str(pair)) for pair in index]
    if len(set(labels)) == len(labels):
        return table
    grouped = {name: _means_by(labels, np.asarray(table[name])) for name in table.columns}
    return pd.DataFrame(grouped).sort_index()


def independent_units(trials: pd.DataFrame) -> dict[str, str]:
    """Pair -> the first pair of the group it shares prompts with, through `source_id` or `target_id`.

    Pairs that reuse a prompt are not independent observations (five sources over 50 targets, taken as 50
    observations, gave 35% false positives; see docs/statistics.md).

    trials: rows of conditions made of the pair's own prompts only, since a scaffold that all pairs share is a fixed
    stimulus, not a sampled one.
    """
    pairs = sorted(trials["pair_id"].unique())
    row_of = {pair: i for i, pair in enumerate(pairs)}
    edges: list[tuple[int, int]] = []
    column_of: dict[str, int] = {}
    for name in ("source_id", "target_id"):
        if name not in trials.columns:
            continue
        distinct = trials[["pair_id", name]].drop_duplicates()
        known = distinct.loc[distinct[name].notna() & (distinct[name].astype(str) != "")]
        for pair, prompt in sorted(set(zip(known["pair_id"], known[name].astype(str), strict=True))):
            column = column_of.setdefault(prompt, len(pairs) + len(column_of))
            edges.append((row_of[pair], column))
    size = len(pairs) + len(column_of)
    if not edges:
        return {pair: pair for pair in pairs}
    rows, columns = zip(*edges, strict=True)
    graph = coo_array((np.ones(len(edges)), (rows, columns)), shape=(size, size))
    _, label = connected_components(graph, directed=False)
    first: dict[int, str] = {}
    return {pair: first.setdefault(int(label[i]), pair) for i, pair in enumerate(pairs)}
