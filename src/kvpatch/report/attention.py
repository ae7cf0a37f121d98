"""Small tables behind the charts of attention and geometry: pure functions of trials and heads that bear gaps.

`figures` gives every chart that a run's trials can fill, in the order to show them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from kvpatch.protocols.schema import Hypothesis, Protocol
from kvpatch.report import attention_charts as charts
from kvpatch.report.charts import AnyChart
from kvpatch.report.tables import normalised, values
from kvpatch.statistics.heads import head_differences, head_means, head_values, heads_standing_out
from kvpatch.statistics.pairs import contrast_table, pair_means

MAPPED = {
    "entropy": "entropy of attention, 0 to 1",
    "mass_body": "attention on the prompt's words",
    "mass_marked": "attention on marked words",
    "induction": "induction-like attention",
    "previous_token": "attention on the token before",
}
"""Statistics whose maps the report shows, with their titles."""
LOOKS = {
    "origin": {
        "sinks": "attention_sinks",
        "own prompt": "attention_own",
        "put in": "attention_patched",
        "generated": "attention_generated",
    },
    "segment": {
        "sinks": "attention_sinks",
        "template": "attention_template",
        "words": "attention_body",
        "trailer": "attention_trailer",
        "generated": "attention_generated",
    },
}
"""Parts of where attention goes -> the trial column of each; the parts of either way add to 1."""
CONTRASTS = ("C - N1", "C - A", "B - A")


@dataclass(frozen=True)
class Figure:
    """One chart with its words."""

    title: str
    caption: str
    chart: AnyChart


def looks(trials: pd.DataFrame, phase: str, by: Literal["segment", "origin"] = "origin") -> pd.DataFrame:
    """Columns condition, part, share: mean over pairs of where attention goes, see `attention_charts.PARTS`; the parts
    of a condition add to 1."""
    rows = _rows_of(trials, phase)
    parts = []
    for condition in dict.fromkeys(rows["condition"]):
        own = rows[rows["condition"] == condition]
        for part, column in LOOKS[by].items():
            share = values(own, column).groupby(own["pair_id"]).mean().mean()
            parts.append({"condition": condition, "part": part, "share": share})
    table = pd.DataFrame(parts, columns=pd.Index(["condition", "part", "share"]))
    return table[table["share"].notna()].reset_index(drop=True)


def trajectories(trials: pd.DataFrame, phase: str, column: str = "rv_forced_trajectory", window: int = 16):
    """Columns condition, token, mean, low, high, n: R_V of the window that ends at each token, over pairs.

    Means are of log R_V, given back as R_V; the interval is 95% by Student's t. A token that fewer than two pairs reach
    is left out.
    """
    rows = _rows_of(trials, phase)
    parts = []
    if column in rows:
        for condition in dict.fromkeys(rows["condition"]):
            own = rows[(rows["condition"] == condition) & rows[column].notna()]
            longest = max((len(line) for line in own[column]), default=0)
            lines = [np.asarray(line, dtype=float) for line in own[column]]
            padded = [np.pad(line, (0, longest - len(line)), constant_values=np.nan) for line in lines]
            table = pd.DataFrame(padded, index=own["pair_id"]).map(lambda x: np.log(x) if x > 0 else np.nan)
            table = table.groupby(level=0).mean()
            for place in table.columns:
                at = table[place].dropna()
                if len(at) < 2:
                    continue
                half = stats.t.ppf(0.975, len(at) - 1) * at.std() / np.sqrt(len(at))
                mean = at.mean()
                ends = {"mean": np.exp(mean), "low": np.exp(mean - half), "high": np.exp(mean + half)}
                parts.append({"condition": condition, "token": int(place) + window, **ends, "n": len(at)})
    return pd.DataFrame(parts, columns=pd.Index(["condition", "token", "mean", "low", "high", "n"]))


def correlation_points(trials: pd.DataFrame, hypothesis: Hypothesis) -> pd.DataFrame:
    """Columns pair, x, y, series: the two variables of a correlation, over pairs (covariates not taken out)."""
    assert hypothesis.against is not None
    rows = normalised(trials)
    rows = rows[rows["phase"] == hypothesis.phase]
    columns = {}
    for name, variable in (("y", hypothesis), ("x", hypothesis.against)):
        if variable.readout not in rows or rows.empty:
            return pd.DataFrame(columns=pd.Index(["pair", "x", "y", "series"]))
        weights = variable.weights()
        means = pair_means(rows, weights, variable.readout, variable.transform)
        columns[name] = contrast_table(means, {name: weights})[name]
    table = pd.DataFrame(columns).dropna().reset_index(names="pair")
    return table.assign(series=hypothesis.id)


def figures(protocol: Protocol, trials: pd.DataFrame, attention: pd.DataFrame) -> list[Figure]:
    """Charts of attention and geometry for every phase that has them.

    trials: rows of trials/*.parquet. attention: rows of attention/*.parquet, none where no phase asked.
    """
    rows = normalised(trials)
    present = set(rows["phase"])
    out: list[Figure] = []
    for name, phase in protocol.phases.items():
        if name not in present:
            continue
        if phase.geometry:
            out += _geometry_figures(protocol, trials, name)
        if phase.watched is not None and not attention.empty:
            out += _attention_figures(trials, attention, name)
    return out


def _geometry_figures(protocol: Protocol, trials: pd.DataFrame, phase: str) -> list[Figure]:
    window = protocol.readouts.r_v.window
    forced = trajectories(trials, phase, "rv_forced_trajectory", window)
    own = trajectories(trials, phase, "rv_trajectory", window)
    out = []
    if not forced.empty:
        told = "Every condition reads the same words; a band is the 95% interval over pairs."
        out.append(Figure("R_V along the fixed continuation", told, charts.trajectory_chart(forced)))
    if not own.empty:
        told = "Each condition's own words, which R_V follows too; fewer pairs reach the later tokens."
        out.append(Figure("R_V along the output", told, charts.trajectory_chart(own)))
    for h in protocol.hypotheses:
        if h.phase == phase and h.test == "correlates" and h.against is not None:
            points = correlation_points(trials, h)
            if not points.empty:
                x, y = (f"{'log ' if v.transform == 'log' else ''}{v.readout}, {v.contrast}" for v in (h.against, h))
                told = "A dot a pair; the line is the plain regression, the verdict holds prompt length constant."
                out.append(Figure(h.claim, told, charts.scatter_chart(points, x, y)))
    return out


def _attention_figures(trials: pd.DataFrame, attention: pd.DataFrame, phase: str) -> list[Figure]:
    out = []
    told = "Mean over all heads while every condition reads the same continuation."
    ways = {"whose activations": looks(trials, phase), "which part of the prompt": looks(trials, phase, "segment")}
    for title, shares in ways.items():
        if not shares.empty:
            out.append(Figure(f"Where attention goes: {title}", told, charts.looks_chart(shares)))
    for statistic, title in MAPPED.items():
        found = head_values(trials, attention, phase=phase, statistic=statistic)
        if not found or all(table.isna().all(axis=None) for table in found.values()):
            continue
        natural = head_means(found)
        out.append(Figure(f"Heads: {title}", "Mean over pairs.", charts.head_means_chart(natural, title)))
        for contrast in CONTRASTS:
            heads = head_differences(trials, attention, phase=phase, contrast=contrast, statistic=statistic)
            if not heads.empty:
                chart = charts.head_map_chart(heads, f"{title}, {contrast}")
                out.append(Figure(f"Heads: {title}, {contrast}", _told(heads), chart))
    return out


def _told(heads: pd.DataFrame) -> str:
    count = int(heads["is_significant"].sum())
    out = heads_standing_out(heads)
    named = ", ".join(f"layer {layer} head {head}" for layer, head in out[:6]) or "none"
    return (
        f"Dots: {count} of {len(heads)} heads differ after Benjamini-Hochberg over the map. Rings stand out from the"
        f" other heads as well: {named}{' and more' if len(out) > 6 else ''}. Exploratory."
    )


def _rows_of(trials: pd.DataFrame, phase: str) -> pd.DataFrame:
    rows = normalised(trials)
    return rows[(rows["phase"] == phase) & ~rows["failed"]]
