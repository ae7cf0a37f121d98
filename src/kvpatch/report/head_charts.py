"""Charts of attention and geometry: pure functions from small tables (`report.attention`) to Vega-Lite charts."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from kvpatch.report.charts import FONT, NEUTRAL, AnyChart, no_data_chart

PARTS = {
    "sinks": "#8b919c",
    "template": "#b9a46a",
    "words": "#5d9ec7",
    "trailer": "#9a7fc9",
    "own prompt": "#3f7fd6",
    "put in": "#d0573f",
    "generated": "#2f9e8a",
}
"""Where attention goes, by segment or by origin, in the order of the bars: colour of each."""
REFERENCES = ("#8b919c", "#b8860b")
"""Colours of the runs that every small chart repeats: the natural target and the natural source."""
OWN = "#3f7fd6"
LOW, NONE, HIGH = "#3f7fd6", "#8b919c33", "#d0573f"
"""Ends and middle of a scale of differences; the middle is all but clear, so that none glares on a dark page."""
_MARK = "#b8860b"
_PANEL = 120
_CELL, _SMALLEST = 18, 6
_WIDE = 620


def head_map_chart(heads: pd.DataFrame, title: str) -> AnyChart:
    """Map of a difference, layer by head; a dot marks what is significant, a ring what stands out.

    Args:
        heads: what `statistics.heads.head_differences` gives.
        title: name of the colour scale: the statistic and the contrast.
    """
    known = heads[heads["estimate"].notna()]
    if known.empty:
        return no_data_chart()
    limit = float(known["estimate"].abs().max()) or 1.0
    colour = alt.Color(
        "estimate:Q",
        title=title,
        scale=alt.Scale(domain=[-limit, 0, limit], range=[LOW, NONE, HIGH], interpolate="rgb"),
        legend=alt.Legend(orient="top", gradientLength=220, titleLimit=400),
    )
    tips = [
        alt.Tooltip("layer:O"),
        alt.Tooltip("head:O"),
        alt.Tooltip("estimate:Q", format="+.4f", title="difference"),
        alt.Tooltip("low:Q", format="+.4f", title="interval from"),
        alt.Tooltip("high:Q", format="+.4f", title="interval to"),
        alt.Tooltip("p_adjusted:Q", format=".2g", title="p, corrected over the map"),
        alt.Tooltip("n:Q", title="pairs"),
    ]
    cells = _grid(known, name="heads").mark_rect().encode(color=colour, tooltip=tips)
    layers: list[AnyChart] = [cells]
    significant = known[known["is_significant"]]
    if not significant.empty:
        dots = _grid(significant, name="_significant").mark_circle(size=12, color=_MARK, opacity=0.9)
        layers.append(dots.encode(tooltip=tips))
    out = known[known["stands_out"]]
    if not out.empty:
        rings = _grid(out, name="_standing_out").mark_point(size=130, color=_MARK, strokeWidth=2, opacity=1)
        layers.append(rings.encode(tooltip=tips))
    return _dressed(alt.layer(*layers), known)


def ranked_heads_chart(heads: pd.DataFrame, title: str) -> AnyChart:
    """The heads of a map that differ most, the largest first, with their intervals; filled where one stands out.

    Args:
        heads: what `head_differences` gives, in the order to draw.
        title: name of the value axis.
    """
    known = heads[heads["estimate"].notna()]
    if known.empty:
        return no_data_chart()
    known = known.assign(name=[f"layer {a} head {b}" for a, b in zip(known["layer"], known["head"], strict=True)])
    order = known["name"].tolist()
    y = alt.Y("name:N", sort=order, title=None, scale=alt.Scale(domain=order))
    base = alt.Chart(known)

    def x(field: str) -> alt.X:
        return alt.X(f"{field}:Q", title=title, scale=alt.Scale(padding=8))

    tips = [alt.Tooltip("name:N"), alt.Tooltip("estimate:Q", format="+.4f", title="difference")]
    tips += [alt.Tooltip("p_adjusted:Q", format=".2g", title="p, corrected over the map"), alt.Tooltip("n:Q")]
    zero = alt.Chart(pd.DataFrame({"zero": [0.0]}), name="_zero").mark_rule(strokeWidth=1, color=NEUTRAL)
    filled = alt.FillOpacityValue(1, condition={"test": "!datum.stands_out", "value": 0})
    point = base.properties(name="heads").mark_point(size=60, opacity=1, stroke=OWN, fill=OWN, strokeWidth=1.5)
    layers: list[AnyChart] = [
        zero.encode(x=x("zero")),
        point.encode(x=x("estimate"), y=y, fillOpacity=filled, tooltip=tips),
    ]
    if known["low"].notna().any():  # one pair has no interval
        spans = base.properties(name="_intervals").mark_rule(strokeWidth=2, color=OWN)
        layers.insert(1, spans.encode(x=x("low"), x2=alt.X2("high:Q"), y=y))
    return _plain(alt.layer(*layers).properties(width="container", height=22 * len(order)))


def head_means_chart(heads: pd.DataFrame, title: str) -> AnyChart:
    """Maps of a statistic itself, one a condition side by side, on one scale.

    Args:
        heads: columns condition, layer, head, mean (`statistics.heads.head_means`).
        title: name of the colour scale.
    """
    known = heads[heads["mean"].notna()]
    if known.empty:
        return no_data_chart()
    colour = alt.Color(
        "mean:Q",
        title=title,
        scale=alt.Scale(scheme="viridis"),
        legend=alt.Legend(orient="top", gradientLength=220, titleLimit=400),
    )
    tips = [alt.Tooltip(f"{name}:O") for name in ("condition", "layer", "head")]
    tips.append(alt.Tooltip("mean:Q", format=".4f"))
    width = _cell_size(known) * known["head"].nunique()
    cells = _grid(known, name="heads").mark_rect().encode(color=colour, tooltip=tips)
    cells = cells.properties(width=max(width, 60), height=_cell_size(known) * known["layer"].nunique())
    order = list(dict.fromkeys(known["condition"]))
    columns = max(1, _WIDE // max(width + 40, 100))
    return _plain(cells.facet(facet=alt.Facet("condition:N", title=None, sort=order), columns=columns))


def attention_shares_chart(shares: pd.DataFrame) -> AnyChart:
    """Bars of where each condition's attention goes.

    Args:
        shares: columns condition, part (of `PARTS`), share (mean over pairs), in the order to draw.
    """
    known = shares[shares["share"].notna()]
    if known.empty:
        return no_data_chart()
    order = list(dict.fromkeys(known["condition"]))
    parts = [part for part in PARTS if part in set(known["part"])]
    known = known.assign(rank=[parts.index(part) for part in known["part"]])
    bars = (
        alt.Chart(known, name="bars")
        .mark_bar(height=14)
        .encode(
            x=alt.X("share:Q", stack=True, title="share of attention", scale=alt.Scale(domain=[0, 1])),
            y=alt.Y("condition:N", sort=order, title=None),
            color=alt.Color(
                "part:N",
                title=None,
                scale=alt.Scale(domain=parts, range=[PARTS[part] for part in parts]),
                legend=alt.Legend(orient="top"),
            ),
            order=alt.Order("rank:Q"),
            tooltip=[alt.Tooltip("condition:N"), alt.Tooltip("part:N"), alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(width="container", height=24 * len(order) + 34)
    )
    return _plain(bars)


def trajectory_chart(bands: pd.DataFrame, title: str = "R_V", references: Sequence[str] = ()) -> AnyChart:
    """R_V along the output, a small chart per condition: its line, with a band of its interval over pairs.

    Args:
        bands: columns condition, token, mean, low, high, n; in the order of conditions to draw.
        title: name of the value axis.
        references: conditions whose lines are drawn in every small chart, to compare with: at most as many as
            `REFERENCES` has colours.
    """
    known = bands[bands["mean"].notna()]
    if known.empty:
        return no_data_chart()
    order = list(dict.fromkeys(known["condition"]))
    beside = [name for name in references if name in order][: len(REFERENCES)]
    drawn = [known.assign(panel=known["condition"])]
    for name in beside:
        own = known.loc[known["condition"] == name, ["condition", "token", "mean"]]
        drawn += [own.assign(panel=other, is_reference=True) for other in order if other != name]
    rows = pd.concat(drawn, ignore_index=True)
    rows["is_reference"] = rows["is_reference"].notna() if beside else False
    others = [name for name in order if name not in beside]
    colour = alt.Color(
        "condition:N",
        title=None,
        scale=alt.Scale(domain=[*beside, *others], range=[*REFERENCES[: len(beside)], *[OWN] * len(others)]),
        legend=alt.Legend(orient="top", values=beside) if beside else None,
    )
    x = alt.X("token:Q", title="last token of the window", axis=alt.Axis(tickMinStep=1, tickCount=4))
    scale = alt.Scale(zero=False)
    tips = [alt.Tooltip("condition:N"), alt.Tooltip("token:Q")]
    tips += [alt.Tooltip("mean:Q", format=".3f"), alt.Tooltip("n:Q")]
    y = alt.Y("mean:Q", title=title, scale=scale, axis=alt.Axis(tickCount=4))
    base = alt.Chart(rows)
    own = base.transform_filter("!datum.is_reference")
    area = own.transform_filter("isValid(datum.low)").properties(name="_bands").mark_area(opacity=0.18)
    layered = alt.layer(
        area.encode(x=x, y=alt.Y("low:Q", title=title, scale=scale), y2=alt.Y2("high:Q"), color=colour),
        base.transform_filter("datum.is_reference")
        .properties(name="_references")
        .mark_line(strokeWidth=1, opacity=0.8)
        .encode(x=x, y=y, color=colour),
        own.properties(name="lines").mark_line(strokeWidth=2).encode(x=x, y=y, color=colour, tooltip=tips),
    ).properties(width=_PANEL, height=100)
    return _plain(layered.facet(facet=alt.Facet("panel:N", title=None, sort=order), columns=3))


def _grid(heads: pd.DataFrame, name: str) -> alt.Chart:
    """Layer upwards, head to the right."""
    return alt.Chart(heads, name=name).encode(
        x=alt.X("head:O", title="query head", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("layer:O", title="layer", sort="descending", axis=alt.Axis(labelOverlap=True)),
    )


def _cell_size(heads: pd.DataFrame) -> int:
    return max(_SMALLEST, min(_CELL, _WIDE // max(1, heads["head"].nunique())))


def _dressed(chart: AnyChart, heads: pd.DataFrame) -> AnyChart:
    size = _cell_size(heads)
    return _plain(chart.properties(width=size * heads["head"].nunique(), height=size * heads["layer"].nunique()))


def _plain(chart: AnyChart) -> AnyChart:
    return (
        chart.properties(background="transparent")
        .configure(font=FONT)
        .configure_view(stroke=None)
        .configure_axis(labelFontSize=11, titleFontSize=12, titleFontWeight="normal", domain=False, ticks=False)
    )
