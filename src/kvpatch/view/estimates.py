"""What the hypotheses measure so far, and how their intervals narrow. Estimates only: looking is not testing, so there
is no p and no verdict here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from kvpatch.protocols.schema import Hypothesis, Protocol
from kvpatch.report import charts
from kvpatch.report.figure import rounded
from kvpatch.report.tables import interval
from kvpatch.statistics.correlation import partial_correlation
from kvpatch.statistics.intervals import bca_interval
from kvpatch.statistics.pairs import contrast_table, pair_means, prepare, rows_of
from kvpatch.statistics.trend import slopes

LOOKS = 24
"""How many times along the way an interval is drawn."""
FIRST = 3
"""Pairs below which there is no interval."""


def estimates(protocol: Protocol, trials: pd.DataFrame) -> list[dict[str, Any]]:
    """Return, for every hypothesis, its estimate and interval over the pairs stored so far, and how they came there.

    trials: as `light_rows` gives them, in the order they were stored. `path` holds `n`, `estimate`, `low` and `high` at
    up to LOOKS numbers of pairs in the order in which they came; its intervals are Student's, the last one BCa, as
    the report's.
    """
    rows = rows_of(prepare(trials), split="test")
    parts = {str(name): part for name, part in rows.groupby("phase", sort=False)}
    return [_estimate(h, parts[h.phase]) for h in protocol.hypotheses if h.phase in parts]


def _estimate(h: Hypothesis, rows: pd.DataFrame) -> dict[str, Any]:
    head = {key: getattr(h, key) for key in ("id", "claim", "phase", "contrast", "readout", "gate", "test")}
    head |= {"transform": h.transform, "is_correlation": h.test == "correlates"}
    if any(variable.readout not in rows for variable in (h, *_others(h))):
        return {**head, "n": 0, "estimate": None, "low": None, "high": None, "path": []}
    if h.test == "correlates":
        return {**head, **_correlation(h, rows)}
    values = _values(h, rows)
    if not len(values):
        return {**head, "n": 0, "estimate": None, "low": None, "high": None, "path": []}
    last = bca_interval(values, 0.90 if h.test == "equivalent" else 0.95)
    now = {"n": len(values), "estimate": float(values.mean()), "low": _known(last.low), "high": _known(last.high)}
    looks = np.unique(np.geomspace(FIRST, len(values), LOOKS).round().astype(int)) if len(values) > FIRST else []
    path = []
    for n in (int(n) for n in looks if n < len(values)):
        mean, low, high = interval(values[:n])
        path.append({"n": n, "estimate": mean, "low": low, "high": high})
    return {**head, **now, "path": [*path, now]}


def _others(h: Hypothesis) -> Sequence[Any]:
    return [v for v in (h.against, *h.controlling) if v is not None]


def _values(h: Hypothesis, rows: pd.DataFrame) -> np.ndarray:
    """One number a pair, in the order in which the pairs were stored."""
    arrived = {pair: place for place, pair in enumerate(rows["pair_id"].unique())}
    names = h.order()[0] if h.is_ordering else list(h.weights())
    means = pair_means(rows, names, h.readout, h.transform)
    means = means.loc[sorted(means.index, key=lambda pair: arrived[pair])]
    if h.is_ordering:
        table = contrast_table(means, {name: {name: 1} for name in names})
        return slopes(table[names].to_numpy(dtype=float).reshape(len(table), len(names)), h.order()[1])
    return contrast_table(means, {"value": h.weights()})["value"].to_numpy(dtype=float)


def _correlation(h: Hypothesis, rows: pd.DataFrame) -> dict[str, Any]:
    columns = {}
    for place, variable in enumerate((h, *_others(h))):
        means = pair_means(rows, variable.weights(), variable.readout, variable.transform)
        columns[place] = contrast_table(means, {"value": variable.weights()})["value"]
    table = pd.DataFrame(columns).dropna().to_numpy(dtype=float)
    found = partial_correlation(table[:, 0], table[:, 1], table[:, 2:])
    low, high = _known(found.interval.low), _known(found.interval.high)
    return {"n": len(table), "estimate": _known(found.r), "low": low, "high": high, "path": []}


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def narrowing_chart(path: list[dict[str, Any]], title: str) -> charts.AnyChart:
    """Chart an estimate and its interval against the number of pairs. path: as `estimates` gives it."""
    if not path:
        return charts.no_data_chart()
    frame = rounded(pd.DataFrame(path))
    base = alt.Chart(frame)
    x = alt.X("n:Q", title="pairs", axis=alt.Axis(tickMinStep=1))

    def y(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", title=title, axis=alt.Axis(tickCount=4))

    tips = [alt.Tooltip("n:Q", title="pairs")]
    tips += [alt.Tooltip(f"{name}:Q", format=".4g") for name in ("estimate", "low", "high")]
    zero = alt.Chart(pd.DataFrame({"zero": [0.0]}), name="_zero").mark_rule(strokeWidth=1, color=charts.NEUTRAL)
    layers: list[charts.AnyChart] = [zero.encode(y=y("zero"))]
    if frame["low"].notna().any():
        known = base.transform_filter("isValid(datum.low) && isValid(datum.high)").properties(name="_band")
        band = known.mark_area(opacity=0.2, color=charts.SERIES[0])
        layers.append(band.encode(x=x, y=y("low"), y2=alt.Y2("high:Q")))
    line = base.properties(name="_line").mark_line(strokeWidth=2, color=charts.SERIES[0])
    dots = base.properties(name="estimates").mark_point(filled=True, size=30, opacity=1, color=charts.SERIES[0])
    layers += [line.encode(x=x, y=y("estimate")), dots.encode(x=x, y=y("estimate"), tooltip=tips)]
    return charts.dressed(alt.layer(*layers), height=150)
