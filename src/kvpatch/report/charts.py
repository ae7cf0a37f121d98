"""The report's charts: pure functions from small tables to Vega-Lite charts that need no network.

Colours of axes and text come from the page's CSS (light, dark, print); only the data's colours are set here,
in tones that stand out on both backgrounds.
"""

from __future__ import annotations

from typing import TypeAlias

import altair as alt
import pandas as pd

from kvpatch.statistics.gates import COHERENT_SHARE

ROLE_COLOURS = {"experiment": "#3f7fd6", "control": "#8b919c", "integrity": "#2f9e8a"}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
_ROW = 24
_AXIS = 34

AnyChart: TypeAlias = alt.Chart | alt.LayerChart | alt.FacetChart


def conditions_chart(points: pd.DataFrame, means: pd.DataFrame, title: str, baseline: str | None = None) -> AnyChart:
    """Chart one readout: a dot a pair, and on it each condition's mean with its interval.

    Args:
        points: columns `condition`, `pair`, `value`, `role`; one row a pair and condition, no missing values.
        means: columns `condition`, `about`, `role`, `mean`, `low`, `high`, `n`, in the order to draw; `low`
            and `high` may be missing.
        title: name of the value axis.
        baseline: condition whose mean is drawn as a dashed line through all rows.
    """
    means = means[means["mean"].notna()].assign(offset=0.0)
    if means.empty:
        return no_data_chart()
    order = means["condition"].tolist()
    points = points.assign(offset=[_spread(i) for i in range(len(points))])
    y = alt.Y("condition:N", sort=order, title=None, scale=alt.Scale(domain=order))
    offset = alt.YOffset("offset:Q", scale=alt.Scale(domain=[-1.6, 1.6]))
    x_scale = alt.Scale(zero=False, nice=True, padding=6)
    x_title = alt.X("value:Q", title=title, scale=x_scale)
    colour = _role_colour()
    layers: list[AnyChart] = []
    reference = means[means["condition"] == baseline]
    if not reference.empty:
        dashed = alt.Chart(reference[["mean"]], name="baseline").mark_rule(
            strokeDash=[3, 3], strokeWidth=1, color="#8b919c"
        )
        layers.append(dashed.encode(x=alt.X("mean:Q", title=title, scale=x_scale)))
    if not points.empty:
        dots = alt.Chart(points, name="points").mark_circle(size=16, opacity=0.35)
        tips = [alt.Tooltip("condition:N"), alt.Tooltip("pair:N"), alt.Tooltip("value:Q", format=".4g")]
        layers.append(dots.encode(x=x_title, y=y, yOffset=offset, color=colour, tooltip=tips))
    ranges = means[means["low"].notna() & means["high"].notna()]
    if not ranges.empty:
        bars = alt.Chart(ranges, name="intervals").mark_rule(strokeWidth=2.5, strokeCap="round")
        layers.append(
            bars.encode(x=alt.X("low:Q", title=title, scale=x_scale), x2="high:Q", y=y, yOffset=offset, color=colour)
        )
    centre = alt.Chart(means, name="means").mark_point(shape="diamond", filled=True, size=80, opacity=1)
    tips = [
        alt.Tooltip("condition:N"),
        alt.Tooltip("about:N"),
        alt.Tooltip("mean:Q", format=".4g"),
        alt.Tooltip("low:Q", format=".4g", title="interval from"),
        alt.Tooltip("high:Q", format=".4g", title="interval to"),
        alt.Tooltip("n:Q", title="pairs"),
    ]
    layers.append(
        centre.encode(x=alt.X("mean:Q", title=title, scale=x_scale), y=y, yOffset=offset, color=colour, tooltip=tips)
    )
    return _dressed(alt.layer(*layers), rows=len(order))


def coherence_chart(coherence: pd.DataFrame, line: float = COHERENT_SHARE) -> AnyChart:
    """Chart the share of coherent outputs a condition, against the line below which it can't be interpreted.

    Args:
        coherence: columns `condition`, `about`, `role`, `share` (0 to 1, or missing), in the order to draw.
        line: the share a condition needs.
    """
    known = coherence[coherence["share"].notna()]
    if known.empty:
        return no_data_chart()
    order = known["condition"].tolist()
    percent_axis = alt.X(
        "share:Q",
        title="share of outputs that are coherent",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format="%", tickCount=5),
    )
    bars = (
        alt.Chart(known, name="bars")
        .mark_bar(height=10, cornerRadiusEnd=2)
        .encode(
            x=percent_axis,
            y=alt.Y("condition:N", sort=order, title=None, scale=alt.Scale(domain=order)),
            color=_role_colour(),
            tooltip=[
                alt.Tooltip("condition:N"),
                alt.Tooltip("about:N"),
                alt.Tooltip("share:Q", format=".1%"),
            ],
        )
    )
    limit = (
        alt.Chart(pd.DataFrame({"share": [line]}), name="limit")
        .mark_rule(strokeWidth=1.5, strokeDash=[5, 3], color="#d0573f")
        .encode(x=percent_axis)
    )
    return _dressed(alt.layer(bars, limit), rows=len(order))


def no_data_chart() -> AnyChart:
    """Return a chart that says there is no data."""
    said = alt.Chart(pd.DataFrame({"said": ["no data"]}), name="empty").mark_text(fontSize=13).encode(text="said:N")
    return _dressed(said, rows=1)


def specification(chart: AnyChart) -> dict:
    """Return the chart as a Vega-Lite specification with its data in it, whatever their number."""
    with alt.data_transformers.enable("default", max_rows=None):
        out = chart.to_dict()
    out.pop("$schema", None)
    return out


def _spread(i: int) -> float:
    """Place of the i-th dot across its row, -1 to 1: the golden-ratio sequence, the same every time."""
    return round(2 * ((i * 0.6180339887498949) % 1) - 1, 3)


def _role_colour() -> alt.Color:
    scale = alt.Scale(domain=list(ROLE_COLOURS), range=list(ROLE_COLOURS.values()))
    return alt.Color("role:N", scale=scale, legend=None)


def _dressed(chart: AnyChart, rows: int) -> AnyChart:
    return (
        chart.properties(width="container", height=_ROW * rows + (_AXIS if rows == 1 else 0), background="transparent")
        .configure(font=FONT, autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
        .configure_view(stroke=None)
        .configure_axis(labelFontSize=12, titleFontSize=12, titleFontWeight="normal", titlePadding=8, domain=False)
        .configure_axisY(ticks=False, grid=True, labelPadding=8, labelFontWeight=600)
        .configure_axisX(tickCount=6, ticks=False, grid=True)
    )
