"""R_V beside the mode: what a correlation over pairs looks like, a point a pair."""

from __future__ import annotations

import altair as alt
import numpy as np
import pandas as pd

from kvpatch.protocols.hypotheses import Hypothesis, Variable
from kvpatch.protocols.schema import Protocol
from kvpatch.report import charts
from kvpatch.report.figure import Figure, figure, rounded
from kvpatch.report.text import number, p_value
from kvpatch.verdicts.pairs import contrast_table, pair_means

MAX_POINTS = 1000


def scatter_figures(trials: pd.DataFrame, protocol: Protocol, rows: list[dict]) -> list[Figure]:
    """Return a scatter plot for every hypothesis that correlates two things over pairs."""
    verdicts = {row["id"]: row for row in rows}
    out = []
    for h in protocol.hypotheses:
        if h.kind.measures != "correlation" or h.against is None:
            continue
        points = correlated(trials[trials["phase"] == h.phase], h)
        if points.empty:
            continue
        shown = points.iloc[:: max(1, -(-len(points) // MAX_POINTS))]
        chart = scatter_chart(rounded(shown), _axis(h.against), _axis(h))
        row = verdicts[h.id]
        held = ", ".join(_axis(v) for v in h.controlling)
        given = f" with {held} held constant" if held else ""
        found = f"{number(row['estimate'])}, interval {number(row['ci_low'])} to {number(row['ci_high'])}"
        about = (
            f"A point a pair; the line is the plain least-squares fit. The test's r{given} is {found},"
            f" p {p_value(row['p'])}: {row['badge'].word}."
        )
        note = "" if len(shown) == len(points) else f"{len(shown)} of {len(points)} pairs are drawn, at even distances."
        out.append(figure(f"scatter-{h.id}", h.claim, about, chart, label=f"Scatter plot: {h.claim}", note=note))
    return out


def correlated(trials: pd.DataFrame, hypothesis: Hypothesis) -> pd.DataFrame:
    """Return `pair`, `x` (what the contrast is related to) and `y` (the contrast), for pairs that have both."""
    assert hypothesis.against is not None
    columns = {}
    for key, variable in (("x", hypothesis.against), ("y", hypothesis)):
        if variable.readout not in trials:
            return pd.DataFrame(columns=["pair", "x", "y"])
        means = pair_means(trials, variable.weights(), variable.readout, variable.transform)
        columns[key] = contrast_table(means, {key: variable.weights()})[key]
    return pd.DataFrame(columns).dropna().rename_axis("pair").reset_index()


def _axis(variable: Variable | Hypothesis) -> str:
    return f"{'log ' if variable.transform == 'log' else ''}{variable.readout} of {variable.contrast}"


def scatter_chart(points: pd.DataFrame, x_title: str, y_title: str) -> charts.AnyChart:
    """Chart one point a pair and their least-squares line.

    Args:
        points: columns `pair`, `x`, `y`; no missing values.
        x_title: name of the horizontal axis.
        y_title: name of the vertical axis.
    """
    scale = alt.Scale(zero=False, padding=10)
    x = alt.X("x:Q", title=x_title, scale=scale)
    y = alt.Y("y:Q", title=y_title, scale=scale)
    tips = [alt.Tooltip("pair:N"), alt.Tooltip("x:Q", format=".4g"), alt.Tooltip("y:Q", format=".4g")]
    dots = alt.Chart(points, name="points").mark_circle(size=36, opacity=0.55, color=charts.SERIES[0])
    layers: list[charts.AnyChart] = [dots.encode(x=x, y=y, tooltip=tips)]
    if len(points) > 2 and points["x"].nunique() > 1:
        slope, start = np.polyfit(points["x"], points["y"], 1)
        ends = np.array([points["x"].min(), points["x"].max()])
        fit = pd.DataFrame({"x": ends, "y": start + slope * ends})
        layers.append(alt.Chart(fit, name="_fit").mark_line(color=charts.NEUTRAL, strokeDash=[5, 3]).encode(x=x, y=y))
    return charts.dressed(alt.layer(*layers), height=260)
