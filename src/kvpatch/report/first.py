"""The first figure: what the answer rests on, beside the natural gap and the caches that should move nothing."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.report import charts, forest
from kvpatch.report.figure import Figure, figure, rounded
from kvpatch.report.judgements import rests_on
from kvpatch.report.tables import natural_run
from kvpatch.report.text import MINUS
from kvpatch.specs.readouts import readouts
from kvpatch.verdicts import prerequisites as asked

REFERENCE = "natural source"
COLOURS = forest.VERDICT_COLOURS | charts.ROLE_COLOURS | {REFERENCE: "#b8860b"}
MOST = 8
"""Hypotheses that are drawn where a protocol names no primary one."""
ROW = 19


def answer_figures(rows: list[dict], effects: list[dict], protocol: Protocol) -> list[Figure]:
    """Return a forest plot per scale of the hypotheses that answer the question, each with its unit and margins.

    Where a scale is one of differences, the natural gap is drawn beside them. The first such scale also has the change
    that each cache of the contrasts, of their prerequisites and of the controls makes in the natural target. rows:
    verdict rows. effects: as `Effect` has them.
    """
    known = {h.id: h for h in protocol.hypotheses}
    scales: dict[tuple[str, str], list[dict]] = {}
    for row in _answering(rows, protocol):
        if row["estimate"] is not None and row["id"] in known:
            scales.setdefault(forest.scale_of(known[row["id"]]), []).append(row)
    out, has_caches = [], False
    for (_, scale), members in scales.items():
        first = known[members[0]["id"]]
        beside: list[dict] = []
        if first.kind.measures == "difference":
            hypotheses = [known[row["id"]] for row in members]
            beside = _natural_gap(rows, first, protocol)
            beside += _caches(effects, hypotheses, protocol, with_controls=not has_caches)
            has_caches = True
        out.append(_figure(scale, first, members, beside))
    return out


def _answering(rows: list[dict], protocol: Protocol) -> list[dict]:
    """The rows that answer the question; where no hypothesis is primary, those that the answer rests on."""
    read = [row for row in rows if not row["is_tautological"]]
    primary = {h.id for h in asked.primary(protocol.hypotheses)}
    found = [row for row in read if row["id"] in primary]
    return found or [row for row in rests_on(read, protocol) if row["estimate"] is not None] or read[:MOST]


def _figure(scale: str, first: Hypothesis, members: list[dict], beside: list[dict]) -> Figure:
    of_answer = [
        {**forest.hypothesis_row(row), "row": f"{row['badge'].icon} {_minus(row['contrast'])}"} for row in members
    ]
    if len({row["row"] for row in of_answer}) < len(of_answer):  # two hypotheses on one contrast
        of_answer = [forest.hypothesis_row(row) for row in members]
    frame = rounded(pd.DataFrame([*of_answer, *beside], columns=forest.COLUMNS))
    readout = readouts().get(first.readout)
    title = readout.label if readout is not None else first.readout
    chart = forest.forest_chart(frame, forest.axis_of(first), COLOURS, ROW)
    about = "Marked: what the answer rests on. Red: the margin that its test holds it against."
    if beside:
        about += " Below it, each cache's change from the natural target."
    about += " Hollow: not read, or outputs that are not coherent."
    label = f"{title}: the contrasts that the answer rests on, with their intervals"
    return figure(f"primary-{scale}", title, about, chart, label=label)


def _natural_gap(rows: list[dict], first: Hypothesis, protocol: Protocol) -> list[dict]:
    """The natural source less the natural target, from the hypothesis that asks for it in the same phase and scale."""
    source, target = natural_run(protocol, "source"), natural_run(protocol, "target")
    for h in protocol.hypotheses:
        same = (h.phase, h.readout, h.transform) == (first.phase, first.readout, first.transform)
        if same and h.kind.measures == "difference" and h.weights() == {source: 1, target: -1}:
            row = next(row for row in rows if row["id"] == h.id)
            if row["estimate"] is not None:
                drawn = forest.hypothesis_row(row)
                label = f"{source} {MINUS} {target}: natural gap"
                return [{**drawn, "row": label, "colour": REFERENCE, "margin_low": None, "margin_high": None}]
    return []


def _caches(
    effects: list[dict], hypotheses: list[Hypothesis], protocol: Protocol, *, with_controls: bool
) -> list[dict]:
    """A row per condition that the hypotheses, and with `with_controls` the controls, compare: its change from A."""
    first, target = hypotheses[0], natural_run(protocol, "target")
    known = readouts().get(first.readout)
    if known is not None and known.transform != first.transform:
        return []
    others = [*asked.manipulation_checks(protocol.hypotheses), *asked.nulls(protocol.hypotheses)]
    wanted = dict.fromkeys(_conditions([*(others if with_controls else []), *hypotheses]))
    phases = dict.fromkeys(h.phase for h in hypotheses)
    out: dict[str, dict] = {}
    for name in wanted:
        for effect in effects:
            key = (effect["condition"], effect["readout"], effect["natural"])
            if key == (name, first.readout, target) and effect["phase"] in phases and name not in out:
                role = protocol.role(effect["phase"], name)
                out[name] = {**forest.effect_row(effect, role), "row": f"{name}: {effect['about']}"}
    return list(out.values())


def _conditions(hypotheses: Iterable[Hypothesis]) -> list[str]:
    return [name for h in hypotheses for name in h.conditions]


def _minus(contrast: str) -> str:
    return contrast.replace(" - ", f" {MINUS} ")
