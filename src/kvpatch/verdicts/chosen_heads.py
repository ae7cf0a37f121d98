"""Heads that half of the pairs choose, tested on the other half: no head is tested on the pairs that it was found in.

A hash of their names parts the units, with a stated seed, so that neither the order nor the values of the rows do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.attention import statistic_of
from kvpatch.specs.readouts import readouts
from kvpatch.statistics.grid import Floats, on_grid
from kvpatch.statistics.intervals import SEED
from kvpatch.store.directory import Store
from kvpatch.verdicts.pairs import PairDifferences

SHARE = 0.05
"""Share of all heads that is chosen, at least one: those that differ most, in standard deviations over units."""
NAMED = 3
"""Chosen heads that a sentence names."""
Head = tuple[int, int]
"""Layer and query head."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """What one half of the units says of the heads that the other half chose.

    found: one number per unit of the testing half: the mean contrast over the chosen heads, each turned the way it went
    in the choosing half. told: which heads they are, and how many units chose them, as the end of a sentence.
    """

    found: PairDifferences
    told: str


def heads_column(readout: str) -> str:
    """The column of trials that holds a readout of every single head, as a mapping of layer and head to number."""
    return f"heads of {readout}"


def with_heads(trials: pd.DataFrame, store: Store, protocol: Protocol) -> pd.DataFrame:
    """The trials with a column of single heads for every readout that the protocol tests in chosen heads.

    trials: rows of trials/*.parquet. A trial that was not watched has None.

    Raises:
        StoreError: where a stored part is damaged.
    """
    wanted = dict.fromkeys(h.readout for h in protocol.hypotheses if h.kind.measures == "heads")
    known = {name: readouts().get(name) for name in wanted}
    of = {name: statistic for name, r in known.items() if r is not None and (statistic := statistic_of(r)) is not None}
    if not of:
        return trials
    columns = ["trial_id", "layer", "head", *dict.fromkeys(of.values())]
    stored = store.read_attention([*columns, "stage"], stage="forced").to_pandas()
    heads = list(zip(stored["layer"].tolist(), stored["head"].tolist(), strict=True))
    out = {}
    for name, statistic in of.items():
        by_trial: dict[str, dict[Head, float]] = {}
        for trial, head, value in zip(stored["trial_id"].tolist(), heads, stored[statistic].tolist(), strict=True):
            by_trial.setdefault(trial, {})[head] = value
        column = [by_trial.get(trial) for trial in trials["trial_id"].tolist()]
        out[heads_column(name)] = pd.Series(column, index=trials.index, dtype=object)
    return trials.assign(**out)


def chosen_heads(rows: pd.DataFrame, hypothesis: Hypothesis, units: Mapping[str, str]) -> Chosen:
    """Choose heads on half of the units and measure them on the other half.

    rows: prepared test rows of the hypothesis' phase, from `with_heads`. Without heads nothing is measured.
    """
    weights = hypothesis.weights()
    table, met = _contrast_of_heads(rows, weights, hypothesis.readout)
    failed = int((rows["condition"].isin(list(weights)) & rows["failed"]).sum())
    if table.empty:
        return Chosen(PairDifferences(np.zeros(0), (), met, failed, 0), "")
    pair_units = [units.get(str(pair), str(pair)) for pair in table.index]
    by_unit = table.groupby(pair_units).mean()
    choosing, testing = _halves(by_unit.index.tolist())
    used = sum(unit in testing for unit in pair_units)
    best = _best(by_unit.loc[choosing])
    columns: list[Any] = by_unit.columns.tolist()
    places = [columns.index(head) for head in best]
    table_of_best = by_unit.loc[testing].to_numpy(dtype=float)[:, places]
    values = table_of_best @ np.array([*best.values()]) / max(len(best), 1)
    if not best:
        testing, values, used = [], np.zeros(0), 0
    found = PairDifferences(on_grid(values), tuple(testing), met - len(table), failed, used)
    named = ", ".join(f"layer {layer} head {head}" for layer, head in list(best)[:NAMED])
    more = f" and {len(best) - NAMED} more" if len(best) > NAMED else ""
    of = f"{len(best)} of {by_unit.shape[1]} heads, chosen on {len(choosing)} others: {named}{more}"
    return Chosen(found, f"; {of}" if best else "")


def _contrast_of_heads(rows: pd.DataFrame, weights: Mapping[str, int], readout: str) -> tuple[pd.DataFrame, int]:
    """([pairs, heads], the contrast of each head in each pair that has all of it, pairs sorted; pairs met)."""
    column = heads_column(readout)
    own = rows.loc[rows["condition"].isin(list(weights))]
    met = own["pair_id"].nunique()
    if column not in own.columns:
        return pd.DataFrame(), met
    own = own.loc[~own["failed"] & own[column].notna()]
    values = pd.DataFrame(own[column].tolist(), index=pd.MultiIndex.from_frame(own[["condition", "pair_id"]]))
    if values.empty or set(weights) - set(own["condition"]):
        return pd.DataFrame(), met
    means = values.groupby(level=["condition", "pair_id"]).mean()
    parts = [weight * means.loc[name] for name, weight in sorted(weights.items())]
    total = sum(parts[1:], parts[0]).dropna().sort_index()
    return total.reindex(columns=sorted(total.columns)), met


def _halves(names: list[str]) -> tuple[list[str], list[str]]:
    """Units that choose, and units that test; of an odd number the testing half has one more. Both sorted."""
    drawn = sorted(names, key=lambda name: hashlib.sha256(f"{SEED} {name}".encode()).hexdigest())
    first = set(drawn[: len(drawn) // 2])
    return sorted(first), sorted(set(drawn) - first)


def _best(differences: pd.DataFrame) -> dict[Head, int]:
    """Chosen head -> +1 or -1, the way it went; those furthest from 0 in standard deviations first.

    differences: [units, heads]. Fewer than 2 units choose none.
    """
    if len(differences) < 2:
        return {}
    columns: Floats = np.column_stack([on_grid(values) for values in differences.to_numpy(dtype=float).T])
    mean, sd = columns.mean(axis=0), columns.std(axis=0, ddof=1)
    size = np.divide(np.abs(mean), sd, out=np.where(mean == 0, 0.0, np.inf), where=sd > 0)
    order = np.lexsort((-np.abs(mean), -size))[: max(1, round(SHARE * len(size)))]
    return {tuple(differences.columns[i]): 1 if mean[i] >= 0 else -1 for i in order.tolist()}
