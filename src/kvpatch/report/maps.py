"""Maps of layers and tokens: the effect of every condition that changes only a part of a cache, drawn where it lies."""

from __future__ import annotations

from dataclasses import dataclass

import altair as alt
import pandas as pd

from kvpatch.protocols.conditions import Condition
from kvpatch.protocols.schema import Protocol
from kvpatch.report import charts
from kvpatch.report.figure import Figure, figure, rounded
from kvpatch.specs.interventions import InPrefill
from kvpatch.specs.patch import Patch
from kvpatch.specs.readouts import Readout, shown
from kvpatch.specs.selectors import LayerAt, LayerBand, SlotQuery

BANDS, BUT_BANDS, SINGLE, TOKENS = "bands of layers", "all layers but a band", "single layers", "parts of the body"
NEEDED, NEEDED_TOKENS = "bands of layers that the source lacks", "parts of the body that the source lacks"
RESIDUAL = "residual stream entering a layer"
ALONE, THROUGH = "bands of layers at every slot", "bands of layers while the prompt runs"
MAPS = {
    BANDS: "Only these layers of the body are put in.",
    BUT_BANDS: "Every layer of the body but these is put in: where the bar is low, those layers were needed.",
    SINGLE: "Only this layer of the body is put in.",
    TOKENS: "Only this part of the body is put in, at every layer.",
    NEEDED: "The source keeps its own cache but for these layers of the body: where the bar is low, they were needed.",
    NEEDED_TOKENS: "The source keeps its own cache but for this part of the body: where the bar is low, it was needed.",
    ALONE: "Only these layers are put in, at every slot of the finished cache, so that they act by themselves.",
    THROUGH: "Q, K and V of these layers are put in while the prompt runs, so that layers above change too.",
    RESIDUAL: "The stream that enters this layer is put in at every position, while the prompt runs.",
}
"""Map -> what its conditions do."""
AGAINST_FOREIGN = "read it against the foreign cache's"
WITHOUT_PARTNER = "no foreign cache was put in alike, so that what any splice does is part of it"


GIVERS = {
    "source": "from the source",
    "foreign": "from a foreign prompt",
    "foreign_matched": "from a foreign prompt like the source",
}
"""Role of a giver -> the name of its series."""


@dataclass(frozen=True)
class Place:
    """Where a condition's patch lies: which map shows it, from where to where as shares, and whose cache it takes."""

    map: str
    start: float
    end: float
    series: str


def place_of(condition: Condition) -> Place | None:
    """Return where on a map a condition stands; None where its patch is not a part by depth or by place in the body."""
    patch = condition.patch
    series = GIVERS.get(condition.from_ or "", f"from {condition.from_}")
    if condition.in_prefill is not None:
        return _place_in_prefill(condition.in_prefill, condition.into, series)
    if patch is None or patch.strength != 1 or patch.donor != "source" or patch.parts != "kv":
        return None
    is_lacking = condition.into == "source"
    if isinstance(patch.layers, LayerBand):
        if not patch.layers.inverse:
            return Place(NEEDED if is_lacking else _bands(patch), *patch.layers.band, series)
        return None if is_lacking else Place(BUT_BANDS, *patch.layers.band, series)
    if isinstance(patch.layers, LayerAt):
        return None if is_lacking else Place(SINGLE, patch.layers.depth, patch.layers.depth, series)
    share = _share_of_body(patch)
    return None if share is None else Place(NEEDED_TOKENS if is_lacking else TOKENS, *share, series)


def _bands(patch: Patch) -> str:
    return ALONE if patch.slots == "all" else BANDS


def _place_in_prefill(spec: InPrefill, into: str, series: str) -> Place | None:
    if spec.slots != "all" or into != "target":
        return None
    if spec.site == "residual" and isinstance(spec.layers, LayerAt):
        return Place(RESIDUAL, spec.layers.depth, spec.layers.depth, series)
    if spec.site == "queries_keys_values" and isinstance(spec.layers, LayerBand) and not spec.layers.inverse:
        return Place(THROUGH, *spec.layers.band, series)
    return None


def _share_of_body(patch: Patch) -> tuple[float, float] | None:
    if patch.layers is not None or patch.align == "replace" or not isinstance(patch.slots, SlotQuery):
        return None
    query = patch.slots
    if query.of != "body" or query.keywords or query.matched_to or query.without:
        return None
    return query.fraction


def map_figures(effects: list[dict], protocol: Protocol, layers: dict[str, int | None]) -> list[Figure]:
    """Return the maps of every phase that has at least two places on one of them.

    effects: as `Effect` has them. layers: phase -> layers of the model it ran on, None where that is not recorded.
    """
    out = []
    for phase in dict.fromkeys(effect["phase"] for effect in effects):
        for kind in MAPS:
            for readout in shown("maps"):
                rows = _segments(effects, protocol, phase, kind, readout.name, layers.get(phase))
                if len(rows) > 1:
                    out.append(_map(rows, phase, kind, readout, layers.get(phase)))
    return out


def _segments(
    effects: list[dict], protocol: Protocol, phase: str, kind: str, readout: str, layers: int | None
) -> list[dict]:
    scale = 100 if kind in (TOKENS, NEEDED_TOKENS) else layers or 1
    out = []
    for effect in effects:
        place = place_of(protocol.conditions[effect["condition"]])
        if place is None or place.map != kind or (effect["phase"], effect["readout"]) != (phase, readout):
            continue
        if effect["estimate"] is None:
            continue
        start, end = place.start * scale, place.end * scale
        end = end if place.end > place.start else start + (1 if layers else 0.03)
        out.append(
            {
                "condition": effect["condition"],
                "series": place.series,
                "where": _where(place, kind, layers),
                "start": start,
                "end": end,
                "middle": (start + end) / 2,
                "mean": effect["estimate"],
                "low": effect["ci_low"],
                "high": effect["ci_high"],
                "n": effect["n"],
            }
        )
    return out


def _where(place: Place, kind: str, layers: int | None) -> str:
    """Return where a part lies in words of the model: "layers 18 to 23 of 24", "25 to 75% of the body"."""
    if kind in (TOKENS, NEEDED_TOKENS):
        return f"{place.start:.0%} to {place.end:.0%} of the body"
    if not layers:
        return f"{place.start:.0%} to {place.end:.0%} of depth"
    if place.end == place.start:
        return f"layer {LayerAt(depth=place.start).index(layers)} of {layers}"
    found = LayerBand(band=(place.start, place.end)).within(layers)
    return f"layers {found[0]} to {found[-1]} of {layers}" if found else f"no layer of {layers}"


def _map(rows: list[dict], phase: str, kind: str, readout: Readout, layers: int | None) -> Figure:
    depth = f"layer of {layers}" if layers else "share of depth"
    axis = "place in the body, %" if kind in (TOKENS, NEEDED_TOKENS) else depth
    chart = map_chart(
        rounded(pd.DataFrame(rows)), axis, f"change of {readout.label.lower()}, {readout.unit or readout.scale}"
    )
    title = f"{kind[0].upper()}{kind[1:]}: {readout.label}"
    is_lacking = kind in (NEEDED, NEEDED_TOKENS)
    natural = "source" if is_lacking else "target"
    series = {row["series"] for row in rows}
    read = AGAINST_FOREIGN if series - {GIVERS["source"]} else WITHOUT_PARTNER
    if is_lacking:
        read = "read one part against another, since any splice does damage"
    about = f"{MAPS[kind]} Height: change from the natural {natural}, with its 95% interval; {read}."
    return figure(f"map-{phase}-{kind}-{readout.name}", title, about, chart, label=title)


def map_chart(rows: pd.DataFrame, x_title: str, y_title: str) -> charts.AnyChart:
    """Chart one bar a condition, from where to where its patch reaches, at the height of its effect.

    Args:
        rows: columns `condition`, `series`, `where` (in words), `start`, `end`, `middle`, `mean`, `low`, `high`, `n`.
        x_title: name of the axis of places.
        y_title: name of the axis of effects.
    """
    names = list(dict.fromkeys(rows["series"]))
    colour = alt.Color("series:N", scale=alt.Scale(domain=names, range=list(charts.SERIES[: len(names)])))
    base = alt.Chart(rows)

    def y(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", title=y_title, axis=alt.Axis(tickCount=5))

    def x(field: str) -> alt.X:
        return alt.X(f"{field}:Q", title=x_title, scale=alt.Scale(zero=True, nice=False))

    zero = alt.Chart(pd.DataFrame({"zero": [0.0]}), name="_zero").mark_rule(strokeWidth=1, color=charts.NEUTRAL)
    ranges = base.transform_filter("isValid(datum.low) && isValid(datum.high)").properties(name="_intervals")
    tips = [
        alt.Tooltip("condition:N"),
        alt.Tooltip("about:N"),
        alt.Tooltip("where:N", title="put in"),
        alt.Tooltip("mean:Q", format=".4g"),
        alt.Tooltip("low:Q", format=".4g", title="interval from"),
        alt.Tooltip("high:Q", format=".4g", title="interval to"),
        alt.Tooltip("n:Q", title="pairs"),
    ]
    layers = [
        zero.encode(y=y("zero")),
        ranges.mark_rule(strokeWidth=1.5, opacity=0.55).encode(
            x=x("middle"),
            y=y("low"),
            y2=alt.Y2("high:Q"),
            color=colour,
            strokeDash=alt.StrokeDash("series:N", legend=None),
        ),
        base.properties(name="_spans")
        .mark_rule(strokeWidth=4, strokeCap="round", opacity=0.85)
        .encode(x=x("start"), x2=alt.X2("end:Q"), y=y("mean"), color=colour),
        base.properties(name="means")
        .mark_point(filled=True, size=55, opacity=1)
        .encode(x=x("middle"), y=y("mean"), color=colour, shape=alt.Shape("series:N", legend=None), tooltip=tips),
    ]
    return charts.dressed(alt.layer(*layers), height=240)
