"""From trials to the small tables the report shows: pure functions that bear missing readouts.

What a pair's value, a failed trial, a coherent condition and a pair that shares its prompts are is said once, in the
statistics, and taken from there. Rows of the calibration split fix bounds and limits before any test; they are left
out here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from kvpatch.protocols.conditions import Condition
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.readout import Readout
from kvpatch.specs.readouts import MODE, SCORE, readouts
from kvpatch.verdicts import pairs
from kvpatch.verdicts import prerequisites as gates
from kvpatch.verdicts.measure import units_of

QUANTILES = {"p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9}
"""Columns that say how a condition's pairs spread, and the share of them that lies below each."""


def normalised(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials of the test split, prepared as the statistics prepare them.

    Phases, conditions and pairs are text ("" where the column is absent), each trial is there once, and
    `failed` says whether it holds an error.
    """
    missing = {name: "" for name in pairs.REQUIRED if name not in trials}
    prepared = pairs.prepare(trials.assign(**missing))
    return pairs.rows_of(prepared, split="test").reset_index(drop=True)


def values(trials: pd.DataFrame, column: str) -> pd.Series:
    """Return a numeric column; missing values where the column, the value or its finiteness is missing."""
    if column not in trials:
        return pd.Series(np.nan, trials.index, dtype=float)
    out = pd.to_numeric(trials[column], errors="coerce").astype(float)
    return out.where(np.isfinite(out))


def errors(trials: pd.DataFrame) -> pd.Series:
    """Return each row's error message, empty where the trial ran."""
    if "error" not in trials:
        return pd.Series(["" for _ in trials.index], trials.index, dtype=object)
    return trials["error"].map(lambda e: e.strip() if isinstance(e, str) else "").astype(object)


def pair_means(trials: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return one row a condition and pair, with `value` the mean over samples, as the statistics have it.

    A pair with a sample that has no finite value is left out, as it is there.
    """
    names = sorted(set(trials["condition"].unique()) - {""})
    rows = trials[["condition", "pair_id", "failed"]].assign(**{column: values(trials, column)})
    wide = pairs.pair_means(rows, names, column)
    numbers = wide.to_numpy(dtype=float)
    there = [
        (name, pair) for name in range(len(names)) for pair in np.flatnonzero(~np.isnan(numbers[:, name])).tolist()
    ]
    return pd.DataFrame(
        {
            "condition": pd.Series([names[name] for name, _ in there], dtype=wide.columns.dtype),
            "pair": pd.Series([wide.index[pair] for _, pair in there], dtype=wide.index.dtype),
            "value": np.array([numbers[pair, name] for name, pair in there], dtype=float),
        }
    )


def interval(sample: Iterable[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return mean, lower and upper bound (Student's t); bounds are missing below two values."""
    x = np.asarray(list(sample), dtype=float)
    if len(x) == 0:
        return math.nan, math.nan, math.nan
    mean = float(x.mean())
    if len(x) < 2:
        return mean, math.nan, math.nan
    # What `scipy.stats.t.ppf` returns, without its checks of the arguments, which take fifty times as long.
    half = float(special.stdtrit(len(x) - 1, (1 + level) / 2) * x.std(ddof=1) / math.sqrt(len(x)))
    return mean, mean - half, mean + half


def unit_means(points: pd.DataFrame, units: Mapping[str, str]) -> pd.DataFrame:
    """Return `condition`, `unit`, `value`: points (`pair_means`), averaged where pairs share prompts, as the statistics
    average them. units: pair -> unit (`measure.units_of`)."""
    labelled = points.assign(unit=[units.get(pair, pair) for pair in points["pair"]])
    return labelled.groupby(["condition", "unit"])["value"].mean().rename("value").reset_index()


def condition_means(
    trials: pd.DataFrame, column: str, protocol: Protocol, units: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (points, means) of a readout: pair means, and their mean and 95% interval a condition.

    trials: of one phase. Points have `condition`, `pair`, `value`, `role`; means have `condition`, `about`, `role`,
    `mean`, `low`, `high`, `n`, in the protocol's order; a condition that ran but has no value has a row of missing
    values. Means are over pairs, those that share a prompt averaged first. Means also have `QUANTILES` over pairs, and
    `above`, the share of pairs above 0, of a readout that never lies below 0 and is 0 somewhere. units: `units_of`
    these trials, where the caller has it already.
    """
    phase, points = phase_of(trials), pair_means(trials, column)
    averaged = unit_means(points, units_of(protocol, trials) if units is None else units)
    samples = {str(name): group.to_numpy() for name, group in averaged.groupby("condition")["value"]}
    of_pairs = {str(name): group.to_numpy() for name, group in points.groupby("condition")["value"]}
    is_floored = len(points) > 0 and float(points["value"].min()) == 0
    rows = []
    for name in conditions_of(trials, protocol):
        sample, drawn = samples.get(name, np.array([])), of_pairs.get(name, np.array([]))
        spread = np.quantile(drawn, list(QUANTILES.values())) if len(drawn) else [math.nan] * len(QUANTILES)
        above = float((drawn > 0).mean()) if is_floored and len(drawn) else math.nan
        head = (name, about(protocol, name), role(protocol, phase, name))
        rows.append((*head, *interval(sample), len(sample), *map(float, spread), above))
    columns = ["condition", "about", "role", "mean", "low", "high", "n", *QUANTILES, "above"]
    means = pd.DataFrame(rows, columns=columns)
    return points.assign(role=[role(protocol, phase, c) for c in points["condition"]]), means


def conditions_of(trials: pd.DataFrame, protocol: Protocol) -> list[str]:
    """Return the conditions that have rows, in the protocol's order, unknown ones last."""
    present = set(trials["condition"].unique()) - {""}
    return [c for c in protocol.conditions if c in present] + sorted(present - set(protocol.conditions))


def about(protocol: Protocol, name: str) -> str:
    """Return what a condition is, in the protocol's words."""
    return protocol.conditions[name].about if name in protocol.conditions else "not in the protocol"


def phase_of(trials: pd.DataFrame) -> str:
    """Return the one phase that trials are of, "" where there is none.

    Raises:
        ValueError: for trials of several phases, which a table by condition would mix.
    """
    found = trials["phase"].unique().tolist()
    if len(found) > 1:
        raise ValueError(f"a table by condition is of one phase, these trials are of {', '.join(map(str, found))}")
    return str(found[0]) if found else ""


def role(protocol: Protocol, phase: str, name: str) -> str:
    """Return a condition's role in a phase, as the protocol has it; "control" where the protocol does not know it."""
    return protocol.role(phase, name) if name in protocol.conditions else "control"


def baseline_of(protocol: Protocol) -> str | None:
    """Return the condition that is the target's natural run."""
    return natural_run(protocol, "target")


def natural_run(protocol: Protocol, side: str) -> str | None:
    """Return the condition that is the natural run of the pair's target or source."""
    found = (n for n, c in protocol.conditions.items() if c.is_natural and c.text_of is None and c.into == side)
    return next(found, None)


def coherence(trials: pd.DataFrame, protocol: Protocol) -> pd.DataFrame:
    """Return, a condition: `rows`, `errors`, `judged`, `share` and whether it `is_below` the line.

    trials: of one phase. `share` and `is_below` are the coherence gate's own, which decides verdicts: the share is of
    the trials without an error, and one that was not judged is not coherent; readouts of sampled text of what is below
    the line beyond chance can't be interpreted. `share` is missing where every trial is an error, or none says whether
    it is coherent.
    """
    phase = phase_of(trials)
    shares = gates.coherence_shares(trials) if "coherent" in trials else {}
    column = trials["coherent"] if "coherent" in trials else pd.Series(None, trials.index, dtype=object)
    rows = []
    for name in conditions_of(trials, protocol):
        here = trials["condition"] == name
        ran = column[here & ~trials["failed"]]
        outputs = shares.get((phase, name))
        rows.append(
            {
                "condition": name,
                "about": about(protocol, name),
                "role": role(protocol, phase, name),
                "rows": int(here.sum()),
                "errors": int((here & trials["failed"]).sum()),
                "judged": int(ran.notna().sum()),
                "share": math.nan if outputs is None else outputs.share,
                "is_below": outputs is not None and outputs.is_too_low,
            }
        )
    columns = ["condition", "about", "role", "rows", "errors", "judged", "share", "is_below"]
    return pd.DataFrame(rows, columns=columns)


def output_of(row: Any) -> str:
    """Return an output as one comparable string: its token ids, or its text where those are missing."""
    ids = row.get("output_token_ids")
    if isinstance(ids, str):
        return ids
    if isinstance(ids, (list, tuple, np.ndarray)):
        return json.dumps([int(i) for i in ids])
    text = row.get("text")
    return text if isinstance(text, str) else ""


def outputs(trials: pd.DataFrame) -> pd.Series:
    """Return every trial's output (`output_of`), indexed by condition, pair and sample; failed trials left out."""
    ran = trials.loc[~trials["failed"]]
    blank = [None] * len(ran)
    ids, texts = (ran[name] if name in ran else blank for name in ("output_token_ids", "text"))
    said = [output_of({"output_token_ids": i, "text": t}) for i, t in zip(ids, texts, strict=True)]
    samples = ran["sample"] if "sample" in ran else [0] * len(ran)
    index = pd.MultiIndex.from_arrays([ran["condition"], ran["pair_id"], samples])
    out = pd.Series(said, index, dtype=object)
    return out[~out.index.duplicated()]


def sameness(said: pd.Series, left: str, right: str) -> tuple[int, int]:
    """Return (trials on which two conditions gave the very same output, trials they share). said: `outputs`."""
    present = set(said.index.get_level_values(0))
    if not {left, right} <= present:
        return 0, 0
    both = pd.concat([said.loc[left], said.loc[right]], axis=1, join="inner").to_numpy()
    both = both[(both != "").any(axis=1)]
    return int((both[:, 0] == both[:, 1]).sum()), len(both)


def twins(protocol: Protocol) -> list[tuple[str, str, str]]:
    """Return (condition, its twin, why) wherever the protocol itself says that two conditions should agree.

    An integrity condition repeats the condition whose cache it rebuilds. A full swap between the pair's own
    prompts equals the natural run of the prompt whose cache was taken, if both prompts end in the same token.
    """
    out = []
    for name, condition in protocol.conditions.items():
        if condition.text_of is not None:
            twin = _full_swap(protocol, condition)
            if twin:
                out.append((name, twin, "a full swap equals this text"))
        elif condition.patch is not None and condition.patch.is_full_swap and condition.from_ in ("target", "source"):
            twin = natural_run(protocol, condition.from_)
            if twin and condition.from_ == condition.into:
                out.append((name, twin, "a cache put into itself changes nothing"))
            elif twin:
                out.append((name, twin, "a full swap is text substitution, if both prompts end in the same token"))
    return out


def _full_swap(protocol: Protocol, text: Condition) -> str | None:
    for name, other in protocol.conditions.items():
        is_full = other.patch is not None and other.patch.is_full_swap
        if is_full and (other.from_, other.into) == (text.text_of, text.into):
            return name
    return None


def unchanged_caches(trials: pd.DataFrame) -> tuple[int, int]:
    """Return (rows whose input caches have the same checksum before and after, rows that record both)."""
    if "cache_checksum_before" not in trials or "cache_checksum_after" not in trials:
        return 0, 0
    both = trials[["cache_checksum_before", "cache_checksum_after"]].dropna().astype(str)
    both = both[(both != "").all(axis=1)]
    return int((both["cache_checksum_before"] == both["cache_checksum_after"]).sum()), len(both)


@dataclass(frozen=True)
class Examples:
    """Pairs to show. readout: the one whose natural gap ranked them, None where no gap could be had. pairs: (pair, its
    gap in that readout)."""

    readout: Readout | None
    pairs: list[tuple[str, float | None]]


def example_pairs(trials: pd.DataFrame, protocol: Protocol, k: int = 5) -> Examples:
    """Return up to k pairs at evenly spaced ranks of their natural gap, smallest first.

    The gap is that of the source's natural run over the target's in the mode's readout that needs no sampling, in which
    few pairs are tied; in the mode score where that one was not measured. Where neither can be had the pairs are those
    at evenly spaced places of the list.
    """
    source, target = natural_run(protocol, "source"), natural_run(protocol, "target")
    for name in (MODE, SCORE):
        table = pair_means(trials, name).pivot(index="pair", columns="condition", values="value")
        if source in table and target in table:
            gap = (table[source] - table[target]).dropna()
            ranked = sorted(((str(p), float(v)) for p, v in gap.items()), key=lambda item: (item[1], item[0]))
            if ranked:
                return Examples(readouts()[name], _evenly(ranked, k))
    return Examples(None, _evenly([(p, None) for p in sorted(set(trials["pair_id"]) - {""})], k))


def _evenly(ranked: Sequence[tuple[str, float | None]], k: int) -> list[tuple[str, float | None]]:
    """At most k of a list, at evenly spaced places, its ends among them."""
    places = np.unique(np.linspace(0, len(ranked) - 1, min(k, len(ranked))).round().astype(int)) if ranked else []
    return [ranked[place] for place in places]
