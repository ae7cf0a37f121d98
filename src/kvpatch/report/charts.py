"""The report's charts: pure functions from small tables to Vega-Lite charts that need no network.

Colours of axes and text come from the page's CSS (light, dark, print); only the data's colours are set here,
in tones that stand out on both backgrounds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import altair as alt
import pandas as pd
from altair.utils.schemapi import debug_mode

from kvpatch.verdicts.prerequisites import COHERENT_SHARE

ROLE_COLOURS = {"experiment": "#3f7fd6", "control": "#8b919c", "integrity": "#2f9e8a"}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
NEUTRAL = "#8b919c"
SERIES = ("#3f7fd6", "#c2571a", "#2f9e8a", "#9a5fc4", "#b8860b", "#8b919c")
LIMIT = "#d0573f"
_ROW = 24
_AXIS = 34

AnyChart: TypeAlias = alt.Chart | alt.LayerChart | alt.FacetChart


@dataclass(frozen=True, eq=False)
class Drawing:
    """A chart apart from its numbers, so that many of one kind are built by altair once.

    draw: (tables, rows, *said) -> chart. It reads no table, only which there are. tables: name -> what a layer draws.
    rows: names of the rows to draw, in order; none where it is of one height. said: what else the chart depends on,
    hashable. row_height: pixels per row.
    """

    draw: Callable[..., AnyChart]
    tables: dict[str, pd.DataFrame]
    rows: list[str]
    said: tuple[Hashable, ...]
    row_height: int = 24

    def packed(self) -> dict:
        """Return what `packed` returns of the chart."""
        known = _template(self.draw, tuple(self.tables), self.said)
        datasets = {
            key: {"name": found["name"], **_columns(self.tables[found["columns"][0]])}
            for key, found in known["datasets"].items()
        }
        height = _height(len(self.rows), self.row_height) if self.rows else known["height"]
        return {**_with_rows(known, self.rows), "height": height, "datasets": datasets}


Drawn: TypeAlias = AnyChart | Drawing
_ROWS = "the rows to draw"


@functools.cache
def _template(draw: Callable[..., AnyChart], names: tuple[str, ...], said: tuple[Hashable, ...]) -> dict:
    """The specification of a drawing. Each of its data sets has one column, whose name is that of the table."""
    stand_ins = {name: pd.DataFrame({name: []}) for name in names}
    return packed(draw(stand_ins, [_ROWS], *said))


def _with_rows(part: Any, rows: list[str]) -> Any:
    """The specification with the rows in the place that the template holds for them."""
    if isinstance(part, dict):
        return {key: _with_rows(value, rows) for key, value in part.items()}
    if isinstance(part, list):
        return rows if part == [_ROWS] else [_with_rows(value, rows) for value in part]
    return part


def conditions_chart(means: pd.DataFrame, title: str, baseline: str | None = None) -> Drawn:
    """Chart one readout: each condition's mean with its interval, over how its pairs spread.

    A thin bar reaches from the 10th to the 90th percentile of the pairs, a thick one from the 25th to the 75th. A text
    says how many lie above 0, where that is known.

    Args:
        means: columns `condition`, `about`, `role`, `mean`, `low`, `high`, `n`, `p10`, `p25`, `p50`, `p75`, `p90`,
            `above` (share of the pairs above 0), in the order to draw; all but the mean may be missing.
        title: name of the value axis.
        baseline: condition whose mean is drawn as a dashed line through all rows.
    """
    means = means[means["mean"].notna()]
    if means.empty:
        return no_data_chart()
    order = means["condition"].tolist()
    there = {"baseline": means.loc[means["condition"] == baseline, ["mean"]], "means": means}
    tables = {name: table for name, table in there.items() if not table.empty}
    return Drawing(_conditions, tables, order, (title, bool(means["above"].notna().any())))


def _conditions(tables: dict[str, pd.DataFrame], order: list[str], title: str, says_above: bool) -> AnyChart:
    y = alt.Y("condition:N", title=None, scale=alt.Scale(domain=order))
    colour, base = _role_colour(), alt.Chart(tables["means"])

    def x(field: str) -> alt.X:
        return alt.X(f"{field}:Q", title=title, scale=alt.Scale(zero=False, nice=True, padding=6))

    def reach(name: str, low: str, high: str, **style: Any) -> AnyChart:
        known = base.transform_filter(f"isValid(datum.{low}) && isValid(datum.{high})").properties(name=name)
        return known.mark_rule(**style).encode(x=x(low), x2=alt.X2(f"{high}:Q"), y=y, color=colour)

    layers = [
        reach("_spread", "p10", "p90", strokeWidth=2, opacity=0.35),
        reach("_middle", "p25", "p75", strokeWidth=9, opacity=0.25),
        reach("_intervals", "low", "high", strokeWidth=2.5, strokeCap="round"),
    ]
    tips = [
        alt.Tooltip("condition:N"),
        alt.Tooltip("about:N"),
        alt.Tooltip("mean:Q", format=".4g"),
        alt.Tooltip("low:Q", format=".4g", title="interval from"),
        alt.Tooltip("high:Q", format=".4g", title="interval to"),
        alt.Tooltip("p50:Q", format=".4g", title="median pair"),
        alt.Tooltip("above:Q", format=".0%", title="pairs above 0"),
        alt.Tooltip("n:Q", title="units"),
    ]
    centre = base.properties(name="means").mark_point(shape="diamond", filled=True, size=80, opacity=1)
    layers.append(centre.encode(x=x("mean"), y=y, color=colour, tooltip=tips))
    if says_above:
        said = base.transform_filter("isValid(datum.above)").transform_calculate(
            said="format(datum.above, '.0%') + ' above 0'"
        )
        text = said.properties(name="_above").mark_text(align="right", fontSize=10)
        layers.append(text.encode(x=alt.XValue("width"), y=y, text=alt.Text("said:N"), color=alt.value(NEUTRAL)))
    if "baseline" in tables:
        dashed = alt.Chart(tables["baseline"], name="_baseline")
        layers.insert(0, dashed.mark_rule(strokeDash=[3, 3], strokeWidth=1, color=NEUTRAL).encode(x=x("mean")))
    return dressed(alt.layer(*layers), rows=len(order))


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
        alt.Chart(pd.DataFrame({"share": [line]}), name="_limit")
        .mark_rule(strokeWidth=1.5, strokeDash=[5, 3], color=LIMIT)
        .encode(x=percent_axis)
    )
    return dressed(alt.layer(bars, limit), rows=len(order))


def no_data_chart() -> AnyChart:
    """Return a chart that says there is no data."""
    said = (
        alt.Chart(pd.DataFrame({"said": ["no data"]}), name="_empty")
        .mark_text(fontSize=13)
        .encode(text=alt.Text("said:N"))
    )
    return dressed(said, rows=1)


def built(chart: Drawn) -> AnyChart:
    """Return a chart as altair has it."""
    return chart.draw(chart.tables, chart.rows, *chart.said) if isinstance(chart, Drawing) else chart


def specification(chart: Drawn) -> dict:
    """Return the chart as a Vega-Lite specification with its data in it, whatever their number."""
    chart = built(chart)
    with alt.data_transformers.enable("default", max_rows=None):
        out = chart.to_dict()
    out.pop("$schema", None)
    return out


def packed(chart: Drawn) -> dict:
    """Return the chart as a Vega-Lite specification with each data set by columns: `{name, columns, rows}`.

    `name` is that of the first layer which draws the data set; one that starts with an underscore is for drawing
    only, and gets no table.
    """
    if isinstance(chart, Drawing):
        return chart.packed()
    frames: dict[str, pd.DataFrame] = {}

    def by_name(data: Any) -> dict:
        """Leave the table out of the specification: altair would copy it, value by value, for every layer."""
        name = next((name for name, frame in frames.items() if frame is data), f"data-{len(frames)}")
        frames[name] = data
        return {"name": name}

    alt.data_transformers.register("kvpatch_by_name", by_name)
    with alt.data_transformers.enable("kvpatch_by_name"):
        out = chart.to_dict(validate=False)
    out.pop("$schema", None)
    names = _drawn_by(out, {})
    return {**out, "datasets": {key: {"name": names.get(key, "data"), **_columns(f)} for key, f in frames.items()}}


def _columns(frame: pd.DataFrame) -> dict:
    cells = [[_plain(value) for value in frame[column].tolist()] for column in frame]
    return {"columns": [str(column) for column in frame], "rows": [list(row) for row in zip(*cells, strict=True)]}


def _plain(value: object) -> object:
    return None if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)) else value


@contextmanager
def unchecked() -> Iterator[None]:
    """Build charts without holding every part against the Vega-Lite schema, which takes most of a report's time.

    The tests build each chart with the check.
    """
    with debug_mode(False):
        yield


def _drawn_by(view: dict, found: dict[str, str]) -> dict[str, str]:
    """Data set -> the first layer's name that draws it; a name for a table wins over one without."""
    data, name = view.get("data"), view.get("name", "data")
    if isinstance(data, dict) and isinstance(data.get("name"), str) and "mark" in view:
        key = data["name"]
        if key not in found or (found[key].startswith("_") and not name.startswith("_")):
            found[key] = name
    for part in ("layer", "hconcat", "vconcat", "concat"):
        for inner in view.get(part, []):
            _drawn_by({"data": data, **inner} if data else inner, found)
    if isinstance(view.get("spec"), dict):
        _drawn_by({"data": data, **view["spec"]} if data else view["spec"], found)
    return found


def _role_colour() -> alt.Color:
    scale = alt.Scale(domain=list(ROLE_COLOURS), range=list(ROLE_COLOURS.values()))
    return alt.Color("role:N", scale=scale, legend=None)


def dressed(chart: AnyChart, rows: int = 0, height: int | None = None) -> AnyChart:
    """Return the chart as wide as its place, `rows` rows (or `height` pixels) high, without colours of its own."""
    tall = _height(rows) if height is None else height
    # Set in place: `properties` would copy the whole chart, and nobody else holds it yet.
    chart.width, chart.height, chart.background, chart.config = "container", tall, "transparent", CONFIG
    return chart


def _height(rows: int, each: int = _ROW) -> int:
    return each * rows + (_AXIS if rows == 1 else 0)


_AXES = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8, "domain": False}
CONFIG = {
    "font": FONT,
    "autosize": {"type": "fit-x", "contains": "padding"},
    "view": {"continuousWidth": 300, "continuousHeight": 300, "stroke": None},
    "axis": _AXES,
    "axisY": {"ticks": False, "grid": True, "labelPadding": 8, "labelLimit": 230},
    "axisX": {"tickCount": 6, "ticks": False, "grid": True},
    "legend": {"orient": "top", "title": None, "labelFontSize": 12, "labelLimit": 300, "offset": 4, "symbolOpacity": 1},
}
