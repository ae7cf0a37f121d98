"""Dose curves: a readout against the level of the source, or the strength of what is added."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import pandas as pd

from kvpatch.protocols.schema import Phase, Protocol
from kvpatch.report import charts, tables
from kvpatch.report.figure import Figure, figure, rounded
from kvpatch.specs.readout import Readout
from kvpatch.verdicts.measure import units_of
from kvpatch.verdicts.pairs import shown_of

MAX_LINES = 400


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
    averaged = tables.unit_means(of_pairs, units).merge(doses, on="condition")
    rows = []
    for (series, order, dose), group in averaged.groupby(["series", "order", "dose"], sort=True):
        mean, low, high = tables.interval(group["value"])
        rows.append((series, order, dose, group["condition"].iloc[0], mean, low, high, len(group)))
    means = pd.DataFrame(rows, columns=["series", "order", "dose", "condition", "mean", "low", "high", "n"])
    pairs = sorted(set(points["pair"]))
    shown = set(pairs[:: max(1, -(-len(pairs) * points["series"].nunique() // MAX_LINES))])
    chart = dose_chart(rounded(points[points["pair"].isin(shown)]), rounded(means), axis, readout.axis_title)
    note = "" if len(shown) == len(pairs) else f"{len(shown)} of {len(pairs)} pairs are drawn, at even distances."
    about = "Each pale line is a pair; the strong one the mean over pairs, with its 95% interval (Student's t)."
    title = f"{readout.label} by {kind[:-1] if kind == 'levels' else kind}"
    return figure(f"dose-{phase}-{kind}-{column}", title, about, chart, label=title, note=note)


def dose_chart(points: pd.DataFrame, means: pd.DataFrame, x_title: str, y_title: str) -> charts.AnyChart:
    """Chart a readout against a dose, a line a pair and a strong one for the mean.

    Args:
        points: columns `pair`, `dose`, `order`, `series`, `value`.
        means: columns `series`, `dose`, `order`, `condition`, `mean`, `low`, `high`, `n`.
        x_title: name of the axis of doses.
        y_title: name of the axis of the readout.
    """
    doses = means.sort_values("order")["dose"].drop_duplicates().tolist()
    names = list(dict.fromkeys(means["series"]))
    colour = alt.Color("series:N", scale=alt.Scale(domain=names, range=list(charts.SERIES[: len(names)])))
    x = alt.X("dose:O", sort=doses, title=x_title, axis=alt.Axis(labelAngle=0 if len(doses) < 6 else -30))

    def y(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", title=y_title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))

    apart = alt.XOffset(
        "series:N",
        sort=names,
        scale=alt.Scale(domain=names, rangeMin=-5 * (len(names) > 1), rangeMax=5 * (len(names) > 1)),
    )
    lines = alt.Chart(points, name="points").mark_line(strokeWidth=1, opacity=0.18)
    mean = alt.Chart(means)
    tips = [
        alt.Tooltip("condition:N"),
        alt.Tooltip("series:N"),
        alt.Tooltip("mean:Q", format=".4g"),
        alt.Tooltip("low:Q", format=".4g", title="interval from"),
        alt.Tooltip("high:Q", format=".4g", title="interval to"),
        alt.Tooltip("n:Q", title="pairs"),
    ]
    ranges = mean.transform_filter("isValid(datum.low) && isValid(datum.high)").properties(name="_intervals")
    layers = [
        lines.encode(
            x=x,
            xOffset=apart,
            y=y("value"),
            detail=[alt.Detail("pair:N"), alt.Detail("series:N")],
            color=colour,
            order=alt.Order("order:Q"),
        ),
        mean.properties(name="_mean_line")
        .mark_line(strokeWidth=2.5)
        .encode(
            x=x,
            xOffset=apart,
            y=y("mean"),
            color=colour,
            order=alt.Order("order:Q"),
            strokeDash=alt.StrokeDash("series:N", legend=None),
        ),
        ranges.mark_rule(strokeWidth=2).encode(x=x, xOffset=apart, y=y("low"), y2=alt.Y2("high:Q"), color=colour),
        mean.properties(name="means")
        .mark_point(filled=True, size=70, opacity=1)
        .encode(x=x, xOffset=apart, y=y("mean"), color=colour, shape=alt.Shape("series:N", legend=None), tooltip=tips),
    ]
    return charts.dressed(alt.layer(*layers), height=260)
