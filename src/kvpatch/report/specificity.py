"""How specific the likelihood readouts are, as the report shows it: in the strip, beside charts, and by position."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from kvpatch.protocols.schema import Protocol
from kvpatch.report.charts import SERIES, AnyChart
from kvpatch.report.figure import Figure, figure, rounded
from kvpatch.report.judgements import PASSED, UNKNOWN, Badge
from kvpatch.specs.readouts import MODE, readouts
from kvpatch.store.readout_calibration import ReadoutCalibration
from kvpatch.verdicts.specificity import LIMIT, Specificity, specificities_of


def of_run(run: dict) -> list[Specificity]:
    """Return what run.json, as plain data, holds of the specificity of every model's likelihood readouts."""
    records = {None: run, **(run.get("other_models") or {})}
    out: list[Specificity] = []
    for key, record in records.items():
        found = record.get("readout_calibration")
        if isinstance(found, dict):
            name = str((record.get("model") or {}).get("name") or key)
            out += specificities_of(ReadoutCalibration.model_validate(found), key, name)
    return out


def strip_entry(found: list[Specificity]) -> dict[str, Any]:
    """Return the entry of the trust strip: whether damage moves the mode readout of any model too far."""
    of_mode = [of for of in found if of.readout == MODE]
    if not of_mode:
        return {"name": "Specific readouts", "badge": UNKNOWN, "says": "how far damage moves them was not measured"}
    bad = [of for of in of_mode if not of.is_specific]
    told = "; ".join(_told(of) for of in bad or of_mode)
    state = Badge("not specific", "✕", "open", "") if bad else PASSED
    return {"name": "Specific readouts", "badge": state, "says": f"{MODE}: {told}"}


def _told(of: Specificity) -> str:
    if of.worst is None:
        return f"no natural gap above 0 on {of.name}"
    worst, share = of.worst
    return f"{worst}, a destroyed cache, moves it by {share:.2f} of the natural gap on {of.name} (at most {LIMIT})"


def said_of(found: list[Specificity], protocol: Protocol, phase: str, readout: str) -> str:
    """Return the sentence that stands beside a readout's chart in a phase; nothing where it was not measured."""
    key = protocol.phases[phase].model if phase in protocol.phases else None
    return next((of.sentence for of in found if of.model == key and of.readout == readout), "")


def figures(found: list[Specificity]) -> list[Figure]:
    """Return, for every model, how the natural gap and each cache's shift grow with the tokens of continuations."""
    out = []
    for of in found:
        if of.readout != MODE or not of.by_position:
            continue
        chart = _curve(rounded(_by_tokens(of)))
        about = (
            f"{readouts()[MODE].label}, nothing subtracted: what the first tokens of the continuations add to its mean "
            "shift from the natural target, over the calibration pairs. B is the natural source."
        )
        label = "What each position adds to the mode readout, by condition"
        out.append(
            figure(f"mode-by-position-{of.model or 'own'}", f"By position, {of.name}", about, chart, label=label)
        )
    return out


def _by_tokens(of: Specificity) -> pd.DataFrame:
    rows = []
    for condition, curve in of.by_position.items():
        known = np.array([np.nan if value is None else value for value in curve], dtype=float)
        total = np.nancumsum(known) / len(known)
        rows += [{"condition": condition, "tokens": at, "nats": float(v)} for at, v in enumerate(total, 1)]
    return pd.DataFrame(rows)


def _curve(table: pd.DataFrame) -> AnyChart:
    names = list(dict.fromkeys(table["condition"]))
    colours = [SERIES[place % len(SERIES)] for place in range(len(names))]
    return (
        alt.Chart(table)
        .mark_line(point=True)
        .encode(
            x=alt.X("tokens:Q", title="first tokens of the continuations", axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y("nats:Q", title="nats per token"),
            color=alt.Color("condition:N", sort=names, scale=alt.Scale(domain=names, range=colours)),
            tooltip=["condition:N", "tokens:Q", "nats:Q"],
        )
        .properties(width="container", height=220)
    )
