"""The same conditions on several models, side by side."""

from __future__ import annotations

import altair as alt
import pandas as pd

from kvpatch.protocols.schema import Protocol
from kvpatch.report import charts
from kvpatch.report.figure import Figure, figure, rounded
from kvpatch.specs.readouts import shown


def replication_rows(rows: list[dict], protocol: Protocol, models: dict[str, str]) -> list[dict]:
    """Return, for every hypothesis that repeats another, both rows and the names of their models.

    models: phase -> name of the model it ran on.
    """
    known = {row["id"]: row for row in rows}
    out = []
    for h in protocol.hypotheses:
        if h.of is not None:
            first = protocol.hypothesis(h.of)
            pair = [
                (models.get(first.phase, first.phase), known[first.id]),
                (models.get(h.phase, h.phase), known[h.id]),
            ]
            out.append({"claim": first.claim, "readout": h.readout, "contrast": h.contrast, "pair": pair})
    return out


def across_figures(effects: list[dict], models: dict[str, str]) -> list[Figure]:
    """Return a chart a readout: conditions that ran on two models, each model's effect in a colour of its own."""
    names = list(dict.fromkeys(models[e["phase"]] for e in effects if e["phase"] in models))
    out = []
    if len(names) < 2:
        return out
    for readout in (each.name for each in shown("across")):
        frame = pd.DataFrame(_rows(effects, models, names, readout))
        if frame.empty or frame["model"].nunique() < 2:
            continue
        about = (
            "Change from the natural run of the same prompt on the same model, in standard deviations of the pair "
            "differences (dz) with its 95% interval, since two models share no other unit."
        )
        chart = across_chart(rounded(frame), f"dz of the change of {readout}", names)
        title = f"{readout} on each model"
        out.append(figure(f"across-{readout}", title, about, chart, label=title))
    return out


def _rows(effects: list[dict], models: dict[str, str], names: list[str], readout: str) -> list[dict]:
    """One row per condition and model, in dz: of several phases on one model, the first that ran the condition."""
    found: dict[tuple[str, str], dict] = {}
    for effect in effects:
        if effect["readout"] == readout and effect["dz"] is not None and effect["phase"] in models:
            found.setdefault((effect["condition"], models[effect["phase"]]), effect)
    shared = [c for c in dict.fromkeys(c for c, _ in found) if all((c, name) in found for name in names)]
    keys = ("condition", "about", "n", "phase")
    return [
        {**{k: e[k] for k in keys}, "estimate": e["dz"], "low": e["dz_low"], "high": e["dz_high"], "model": name}
        for condition in shared
        for name in names
        for e in [found[condition, name]]
    ]


def across_chart(rows: pd.DataFrame, title: str, models: list[str]) -> charts.AnyChart:
    """Chart one effect a condition and model.

    Args:
        rows: columns `condition`, `about`, `model`, `phase`, `estimate`, `low`, `high`, `n`, in the order to draw.
        title: name of the value axis.
        models: names in the order of their colours.
    """
    order = list(dict.fromkeys(rows["condition"]))
    y = alt.Y("condition:N", sort=order, title=None, scale=alt.Scale(domain=order))
    offset = alt.YOffset("model:N", sort=models, scale=alt.Scale(domain=models, paddingOuter=0.6))
    colour = alt.Color("model:N", scale=alt.Scale(domain=models, range=list(charts.SERIES[: len(models)])))
    base = alt.Chart(rows)

    def x(field: str) -> alt.X:
        return alt.X(f"{field}:Q", title=title, scale=alt.Scale(padding=8))

    zero = alt.Chart(pd.DataFrame({"zero": [0.0]}), name="_zero").mark_rule(strokeWidth=1, color=charts.NEUTRAL)
    ranges = base.transform_filter("isValid(datum.low) && isValid(datum.high)").properties(name="_intervals")
    tips = [alt.Tooltip(f"{c}:N") for c in ("condition", "about", "model")]
    tips += [alt.Tooltip("estimate:Q", format=".4g"), alt.Tooltip("n:Q", title="pairs")]
    layers = [
        zero.encode(x=x("zero")),
        ranges.mark_rule(strokeWidth=2.5).encode(x=x("low"), x2=alt.X2("high:Q"), y=y, yOffset=offset, color=colour),
        base.properties(name="estimates")
        .mark_point(filled=True, size=60, opacity=1)
        .encode(
            x=x("estimate"), y=y, yOffset=offset, color=colour, shape=alt.Shape("model:N", legend=None), tooltip=tips
        ),
    ]
    return charts.dressed(alt.layer(*layers), rows=len(order))
