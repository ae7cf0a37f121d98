"""What the hypotheses measure so far, and how their intervals narrow. Estimates only: looking is not testing, so there
is no p and no verdict here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.report import charts
from kvpatch.report.figure import rounded
from kvpatch.report.tables import interval
from kvpatch.verdicts.measure import Measured, measure, units_of
from kvpatch.verdicts.pairs import prepare, rows_of
from kvpatch.verdicts.wording import pairs_text

INTERVALS = 24
"""How many times along the way an interval is drawn."""
FIRST = 3
"""Pairs below which there is no interval."""


def estimates(protocol: Protocol, trials: pd.DataFrame) -> list[dict[str, Any]]:
    """Return, for every hypothesis, its estimate and interval over the pairs stored so far, and how they came there.

    trials: as `light_rows` gives them, in the order they were stored. `n`, `estimate`, `low` and `high` are what a
    verdict would say of these trials, measured by the verdicts' own function; `n_pairs` counts the pairs before those
    that share a prompt were averaged, `counted` tells both in words, and `counts` what `n` counts. `path` holds `n`,
    `estimate`, `low` and `high` at up to INTERVALS numbers of units, in the order in which their first pairs came; its
    intervals are Student's, the last one is the verdict's. What is no mean, such as a correlation, has no path.
    """
    prepared = prepare(trials)
    tested = rows_of(prepared, split="test")
    parts = {str(name): part for name, part in tested.groupby("phase", sort=False)}
    units = {phase: units_of(protocol, part) for phase, part in parts.items()}
    arrived = {phase: _arrival(units[phase], part) for phase, part in parts.items()}
    asked = [h for h in protocol.hypotheses if h.phase in arrived]
    return [_estimate(protocol, h, prepared, units[h.phase], arrived[h.phase]) for h in asked]


def _arrival(units: Mapping[str, str], rows: pd.DataFrame) -> dict[str, int]:
    """Pair -> the place of its unit in the order in which units came, each with its first pair. rows: of one phase."""
    places: dict[str, int] = {}
    return {pair: places.setdefault(units.get(pair, pair), len(places)) for pair in map(str, rows["pair_id"].unique())}


def _estimate(
    protocol: Protocol, h: Hypothesis, trials: pd.DataFrame, units: Mapping[str, str], arrived: dict[str, int]
) -> dict[str, Any]:
    head = {key: getattr(h, key) for key in ("id", "claim", "phase", "contrast", "readout", "test")}
    head |= {"gate": h.gate} if h.needs is None else {"needs": h.needs}
    head |= {"transform": h.transform, "is_correlation": h.kind.measures in ("correlation", "ranks")}
    if any(readout not in trials for readout in h.readouts):
        return {**head, **_counted(0, 0), "estimate": None, "low": None, "high": None, "path": []}
    m = measure(protocol, trials, h, units)
    found = m.differences
    now = {"n": found.n, "estimate": _known(m.estimate), "low": _known(m.interval.low), "high": _known(m.interval.high)}
    has_path = found.n > 0 and m.kind.is_mean
    return {**head, **_counted(found.n, found.n_pairs), **now, "path": [*_path(m, arrived), now] if has_path else []}


def _counted(n: int, n_pairs: int) -> dict[str, Any]:
    counts = "pairs" if n == n_pairs else "groups of pairs that share no prompt"
    return {"n": n, "n_pairs": n_pairs, "counted": pairs_text(n, n_pairs), "counts": counts}


def _path(m: Measured, arrived: dict[str, int]) -> list[dict[str, Any]]:
    """Estimates on fewer units than there are, in the order in which they came."""
    found = m.differences
    values = found.values[sorted(range(found.n), key=lambda i: arrived[found.unit_ids[i]])]
    sizes = np.unique(np.geomspace(FIRST, found.n, INTERVALS).round().astype(int)) if found.n > FIRST else []
    path = []
    for n in (int(n) for n in sizes if n < found.n):
        mean, low, high = interval(values[:n])
        path.append({"n": n, "estimate": mean, "low": low, "high": high})
    return path


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def narrowing_chart(path: list[dict[str, Any]], title: str, counts: str = "pairs") -> charts.Drawn:
    """Chart an estimate and its interval against the number of pairs, or of groups of pairs that share a prompt.

    path: as `estimates` gives it. counts: what its `n` counts.
    """
    if not path:
        return charts.no_data_chart()
    frame = rounded(pd.DataFrame(path))
    zero = pd.DataFrame({"zero": [0.0]})
    has_band = bool(frame["low"].notna().any())
    return charts.Drawing(_narrowing, {"zero": zero, "path": frame}, [], (title, counts, has_band))


def _narrowing(
    tables: dict[str, pd.DataFrame], _: list[str], title: str, counts: str, has_band: bool
) -> charts.AnyChart:
    base = alt.Chart(tables["path"])
    x = alt.X("n:Q", title=counts, axis=alt.Axis(tickMinStep=1))

    def y(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", title=title, axis=alt.Axis(tickCount=4))

    tips = [alt.Tooltip("n:Q", title=counts)]
    tips += [alt.Tooltip(f"{name}:Q", format=".4g") for name in ("estimate", "low", "high")]
    zero = alt.Chart(tables["zero"], name="_zero").mark_rule(strokeWidth=1, color=charts.NEUTRAL)
    layers: list[charts.AnyChart] = [zero.encode(y=y("zero"))]
    if has_band:
        known = base.transform_filter("isValid(datum.low) && isValid(datum.high)").properties(name="_band")
        band = known.mark_area(opacity=0.2, color=charts.SERIES[0])
        layers.append(band.encode(x=x, y=y("low"), y2=alt.Y2("high:Q")))
    line = base.properties(name="_line").mark_line(strokeWidth=2, color=charts.SERIES[0])
    dots = base.properties(name="estimates").mark_point(filled=True, size=30, opacity=1, color=charts.SERIES[0])
    layers += [line.encode(x=x, y=y("estimate")), dots.encode(x=x, y=y("estimate"), tooltip=tips)]
    return charts.dressed(alt.layer(*layers), height=150)
