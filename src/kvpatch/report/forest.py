"""Forest plots: effects with their intervals, and the margins they are held against."""

from __future__ import annotations

import altair as alt
import pandas as pd

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.report import charts
from kvpatch.report.figure import Figure, figure, rounded
from kvpatch.report.judgements import BADGES
from kvpatch.specs.readouts import readouts

VERDICT_COLOURS = {
    "supported": "#2b8a57",
    "contradicted": "#cc4a3b",
    "not supported": "#cc4a3b",
    "equivalent": "#2f8fbf",
    "inconclusive": "#b57a0b",
    "not interpretable": "#8b919c",
    "tautological": "#9a6fd0",
}
COLUMNS = ["row", "name", "about", "colour", "estimate", "low", "high", "margin_low", "margin_high", "n", "hollow"]


def forest_chart(rows: pd.DataFrame, title: str, colours: dict[str, str], row_height: int = 24) -> charts.Drawn:
    """Chart one effect a row with its interval; a band or a tick shows its margin.

    Args:
        rows: columns `row` (its label), `name`, `about`, `colour` (a key of `colours`), `estimate`, `low`, `high`,
            `margin_low`, `margin_high`, `n`, `hollow` (whether the point is drawn hollow), in the order to draw;
            numbers may be missing.
        title: name of the value axis.
        colours: what `colour` may be, and the colour it is drawn in.
        row_height: pixels per row.
    """
    rows = rows[rows["estimate"].notna()]
    if rows.empty:
        return charts.no_data_chart()
    order = rows["row"].tolist()
    zero = pd.DataFrame({"zero": [0.0]})
    ends = tuple(end for end in ("margin_low", "margin_high") if rows[end].notna().any())
    has_band = bool((rows["margin_low"].notna() & rows["margin_high"].notna()).any())
    has_intervals = bool((rows["low"].notna() & rows["high"].notna()).any())
    said = (title, tuple(colours.items()), ends, has_band, has_intervals)
    return charts.Drawing(_forest, {"zero": zero, "rows": rows}, order, said, row_height)


_HOLLOW = alt.FillOpacityValue(1, condition={"test": "datum.hollow", "value": 0})


def _forest(
    tables: dict[str, pd.DataFrame],
    order: list[str],
    title: str,
    colours: tuple[tuple[str, str], ...],
    ends: tuple[str, ...],
    has_band: bool,
    has_intervals: bool,
) -> charts.AnyChart:
    y = alt.Y("row:N", title=None, scale=alt.Scale(domain=order))
    scale = alt.Scale(domain=[name for name, _ in colours], range=[colour for _, colour in colours])
    colour = alt.Color("colour:N", scale=scale, legend=None)

    def x(field: str) -> alt.X:
        return alt.X(f"{field}:Q", title=title, scale=alt.Scale(nice=True, padding=8))

    base = alt.Chart(tables["rows"])
    zero = alt.Chart(tables["zero"], name="_zero").mark_rule(strokeWidth=1, color=charts.NEUTRAL)
    band = base.transform_filter("isValid(datum.margin_low) && isValid(datum.margin_high)").properties(name="_margins")
    margins: list[charts.AnyChart] = []
    if has_band:
        bar = band.mark_bar(height=14, opacity=0.16, color=charts.LIMIT)
        margins.append(bar.encode(x=x("margin_low"), x2=alt.X2("margin_high:Q"), y=y))
    for end in ends:
        tick = base.transform_filter(f"isValid(datum.{end})").properties(name=f"_{end}")
        margins.append(tick.mark_tick(thickness=2, size=16, color=charts.LIMIT).encode(x=x(end), y=y))
    ranges = base.transform_filter("isValid(datum.low) && isValid(datum.high)").properties(name="_intervals")
    tips = [
        alt.Tooltip("name:N"),
        alt.Tooltip("about:N"),
        alt.Tooltip("estimate:Q", format=".4g"),
        alt.Tooltip("low:Q", format=".4g", title="interval from"),
        alt.Tooltip("high:Q", format=".4g", title="interval to"),
        alt.Tooltip("n:Q"),
    ]
    layers: list[charts.AnyChart] = [
        zero.encode(x=x("zero")),
        *margins,
        base.properties(name="estimates")
        .mark_point(shape="diamond", filled=False, size=70, opacity=1, strokeWidth=1.5)
        .encode(
            x=x("estimate"),
            y=y,
            stroke=alt.Stroke("colour:N", scale=scale, legend=None),
            fill=alt.Fill("colour:N", scale=scale, legend=None),
            fillOpacity=_HOLLOW,
            tooltip=tips,
        ),
    ]
    if has_intervals:
        spans = ranges.mark_rule(strokeWidth=2.5, strokeCap="round")
        layers.insert(-1, spans.encode(x=x("low"), x2=alt.X2("high:Q"), y=y, color=colour))
    return charts.dressed(alt.layer(*layers), rows=len(order))


def hypothesis_charts(rows: list[dict], protocol: Protocol) -> dict[str, charts.Drawn]:
    """Return a forest plot for each scale that hypotheses are measured on, by its name: "mode_llr", "log rv_output",
    "slope of mode_llr a step", "correlation"."""
    return {scale: chart for (_, scale), chart in _by_scale(rows, protocol).items()}


def _by_scale(rows: list[dict], protocol: Protocol) -> dict[tuple[str, str], charts.Drawn]:
    """Return a forest plot for each (sentence on the scale, name of the scale) that hypotheses are measured on."""
    known = {h.id: h for h in protocol.hypotheses}
    scales: dict[tuple[str, str], list[dict]] = {}
    axes: dict[tuple[str, str], str] = {}
    for row in rows:
        h = known.get(row["id"])
        if h is not None and row["estimate"] is not None:
            scales.setdefault(scale_of(h), []).append(hypothesis_row(row))
            axes.setdefault(scale_of(h), axis_of(h))
    frames = {key: rounded(pd.DataFrame(members, columns=COLUMNS)) for key, members in scales.items()}
    return {key: forest_chart(frame, axes[key], VERDICT_COLOURS) for key, frame in frames.items()}


def scale_of(h: Hypothesis) -> tuple[str, str]:
    """Return (sentence on the scale that a hypothesis is measured on, the scale's name)."""
    words = h.kind.words
    return words.scale, words.axis.format(readout=("log " if h.transform == "log" else "") + h.readout)


def axis_of(h: Hypothesis) -> str:
    """Return the title of a hypothesis' axis: its scale in plain words, with the unit."""
    known = readouts().get(h.readout)
    if known is None:
        return scale_of(h)[1]
    name = f"log of {known.label}" if h.transform == "log" else known.label
    said = h.kind.words.axis.format(readout=name)
    unit = known.unit if h.transform == "none" and h.kind.is_in_unit else ""
    return f"{said}, {unit}" if unit else said


def hypothesis_figures(rows: list[dict], protocol: Protocol) -> list[Figure]:
    """Return the figures of `hypothesis_charts`."""
    out = []
    for (says, scale), chart in _by_scale(rows, protocol).items():
        about = f"{says} Red: the margin the test holds it against. Intervals: 95%, of an equivalence 90%."
        out.append(figure(f"forest-{scale}", scale, about, chart, label=f"Hypotheses on {scale}"))
    return out


def hypothesis_row(row: dict) -> dict:
    """Return what a forest plot draws of a verdict row."""
    low, high = margin_ends(row)
    icon = row["badge"].icon
    return {
        "row": f"{icon} {row['id']}",
        "name": row["id"],
        "about": f"{row['contrast']}: {row['badge'].word}",
        "colour": row["badge"].word if row["badge"].word in BADGES else "not interpretable",
        "estimate": row["estimate"],
        "low": row["ci_low"],
        "high": row["ci_high"],
        "margin_low": low,
        "margin_high": high,
        "n": row["n"],
        "hollow": row["badge"].word == "not interpretable",
    }


def margin_ends(row: dict) -> tuple[float | None, float | None]:
    """Return the ends of the margin a row's test asks about: one where the claim has a side, else both."""
    size = row["margin_size"]
    if size is None:
        return None, None
    if row["has_margin_on_both_sides"]:
        return -size, size
    return (-size, None) if row["side"] == -1 else (None, size)


def effect_charts(effects: list[dict], protocol: Protocol, phase: str) -> dict[str, charts.Drawn]:
    """Return a phase's forest plots, by readout: each condition less the natural run of the same prompt."""
    out = {}
    for readout in dict.fromkeys(effect["readout"] for effect in effects if effect["phase"] == phase):
        rows = [e for e in effects if (e["phase"], e["readout"]) == (phase, readout)]
        frame = pd.DataFrame([effect_row(e, protocol.role(phase, e["condition"])) for e in rows], columns=COLUMNS)
        out[readout] = forest_chart(rounded(frame), _unit(readout), charts.ROLE_COLOURS)
    return out


def effect_figures(effects: list[dict], protocol: Protocol, phase: str) -> list[Figure]:
    """Return the figures of `effect_charts`."""
    known = readouts()
    out = []
    for readout, chart in effect_charts(effects, protocol, phase).items():
        title = known[readout].label if readout in known else readout
        unit = _unit(readout)
        about = f"Change of {unit} from the natural run of the same prompt, mean over pairs, with its 95% interval."
        out.append(figure(f"effect-{phase}-{readout}", title, about, chart, label=f"{title}: change by condition"))
    return out


def _unit(readout: str) -> str:
    known = readouts()
    return known[readout].scale if readout in known else readout


def effect_row(effect: dict, role: str) -> dict:
    """Return what a forest plot draws of a condition's effect."""
    return {
        "row": effect["condition"],
        "name": effect["condition"],
        "about": f"{effect['about']}, less {effect['natural']}",
        "colour": role,
        "estimate": effect["estimate"],
        "low": effect["ci_low"],
        "high": effect["ci_high"],
        "margin_low": None,
        "margin_high": None,
        "n": effect["n"],
        "hollow": effect["is_incoherent"],
    }
