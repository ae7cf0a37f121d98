"""Dose curves: a readout against the level of the source, or the strength of what is added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from kvpatch.protocols.schema import Phase, Protocol
from kvpatch.report import charts, tables
from kvpatch.report.figure import Figure, figure, rounded
from kvpatch.specs.readout import Readout
from kvpatch.verdicts.measure import units_of
from kvpatch.verdicts.pairs import shown_of

APART = 1
"""Steps that are left free on either side of the points of a dose, so that they stand close around its tick."""


def dose_figures(trials: pd.DataFrame, protocol: Protocol) -> list[Figure]:
    """Return, for every phase with at least three doses of something, a curve a readout."""
    out = []
    for name in dict.fromkeys(trials["phase"]):
        phase = protocol.phases.get(name)
        if phase is None:
            continue
        part = trials[trials["phase"] == name]
        units = units_of(protocol, part)
        for kind, doses, axis in (
            ("levels", levels(phase, protocol), "prompt whose cache was put in"),
            ("strength", strengths(phase, protocol), "strength"),
        ):
            present = doses[doses["condition"].isin(set(part["condition"]))]
            if present.groupby("series")["dose"].nunique().max() >= 3 if len(present) else False:
                readouts = shown_of("dose", part)
                out += [f for r in readouts if (f := _curve(part, present, units, name, kind, axis, r)) is not None]
    return out


def levels(phase: Phase, protocol: Protocol) -> pd.DataFrame:
    """Return `condition`, `dose`, `order`, `series` of a phase whose pairs hold a ladder of prompts on one subject."""
    rows = []
    pairing = phase.pairing
    if pairing is not None and pairing.by == "subject":
        ladder = [*pairing.also, pairing.sources]
        for name in phase.all_conditions:
            condition = protocol.conditions[name]
            group = pairing.sources if condition.from_ == "source" else condition.from_
            if group in ladder and condition.change is not None:
                rows.append((name, group, ladder.index(group), condition.change.told))
    return pd.DataFrame(rows, columns=["condition", "dose", "order", "series"])


def strengths(phase: Phase, protocol: Protocol) -> pd.DataFrame:
    """Return the same of the conditions that add a direction to the cache at some strength."""
    rows = []
    for name in phase.all_conditions:
        added = protocol.conditions[name].steer_cache
        if added is not None:
            rows.append((name, added.strength, added.strength, added.told))
    return pd.DataFrame(rows, columns=["condition", "dose", "order", "series"])


def _curve(
    part: pd.DataFrame,
    doses: pd.DataFrame,
    units: Mapping[str, str],
    phase: str,
    kind: str,
    axis: str,
    readout: Readout,
) -> Figure | None:
    column = readout.name
    of_pairs = tables.pair_means(part[part["condition"].isin(doses["condition"])], column)
    points = of_pairs.merge(doses, on="condition")
    if points.empty:
        return None
    spreads = {key: group.to_numpy() for key, group in points.groupby(["series", "order"])["value"]}
    averaged = tables.unit_means(of_pairs, units).merge(doses, on="condition")
    rows = []
    for (series, order, dose), group in averaged.groupby(["series", "order", "dose"], sort=True):
        spread = np.quantile(spreads[series, order], list(tables.QUANTILES.values()))
        head = (series, order, dose, group["condition"].iloc[0])
        rows.append((*head, *tables.interval(group["value"]), len(group), *map(float, spread)))
    columns = ["series", "order", "dose", "condition", "mean", "low", "high", "n", *tables.QUANTILES]
    chart = dose_chart(rounded(pd.DataFrame(rows, columns=columns)), axis, readout.axis_title)
    about = (
        "The line joins the means over pairs, with their 95% intervals (Student's t). Pale bars are the pairs: thick "
        "from the 25th to the 75th percentile, thin from the 10th to the 90th."
    )
    title = f"{readout.label} by {kind[:-1] if kind == 'levels' else kind}"
    return figure(f"dose-{phase}-{kind}-{column}", title, about, chart, label=title)


def dose_chart(means: pd.DataFrame, x_title: str, y_title: str) -> charts.AnyChart:
    """Chart a readout against a dose: a line through the means of a series, over how its pairs spread.

    Args:
        means: columns `series`, `dose`, `order`, `condition`, `mean`, `low`, `high`, `n`, `p10`, `p25`, `p50`, `p75`,
            `p90`.
        x_title: name of the axis of doses.
        y_title: name of the axis of the readout.
    """
    doses = means.sort_values("order")["dose"].drop_duplicates().tolist()
    names = list(dict.fromkeys(means["series"]))
    place: dict[str, Any] = {
        "x": alt.X("dose:O", sort=doses, title=x_title, axis=alt.Axis(labelAngle=0 if len(doses) < 6 else -30)),
        "color": alt.Color("series:N", scale=alt.Scale(domain=names, range=list(charts.SERIES[: len(names)]))),
    }
    if len(names) > 1:  # side by side around the middle of a dose's band, where its tick stands
        place["xOffset"] = alt.XOffset("series:N", sort=names, scale=alt.Scale(domain=names, paddingOuter=APART))

    def y(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", title=y_title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))

    base = alt.Chart(means)

    def reach(name: str, low: str, high: str, **style: Any) -> charts.AnyChart:
        known = base.transform_filter(f"isValid(datum.{low}) && isValid(datum.{high})").properties(name=name)
        return known.mark_rule(**style).encode(**place, y=y(low), y2=alt.Y2(f"{high}:Q"))

    tips = [
        alt.Tooltip("condition:N"),
        alt.Tooltip("series:N"),
        alt.Tooltip("mean:Q", format=".4g"),
        alt.Tooltip("low:Q", format=".4g", title="interval from"),
        alt.Tooltip("high:Q", format=".4g", title="interval to"),
        alt.Tooltip("p50:Q", format=".4g", title="median pair"),
        alt.Tooltip("n:Q", title="pairs"),
    ]
    line = base.properties(name="_mean_line").mark_line(strokeWidth=2.5)
    point = base.properties(name="means").mark_point(filled=True, size=70, opacity=1)
    layers = [
        reach("_spread", "p10", "p90", strokeWidth=2, opacity=0.35),
        reach("_middle", "p25", "p75", strokeWidth=9, opacity=0.25),
        line.encode(
            **place, y=y("mean"), order=alt.Order("order:Q"), strokeDash=alt.StrokeDash("series:N", legend=None)
        ),
        reach("_intervals", "low", "high", strokeWidth=2),
        point.encode(**place, y=y("mean"), shape=alt.Shape("series:N", legend=None), tooltip=tips),
    ]
    return charts.dressed(alt.layer(*layers), height=260)
