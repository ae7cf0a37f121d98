"""The report: one HTML file that holds everything it needs and asks the network for nothing.

A content security policy in the page lets only its own scripts run (by hash) and lets nothing be fetched, so
that a text which got past the escaping would still be inert.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from kvpatch.protocols.schema import Protocol
from kvpatch.report import (
    across,
    charts,
    dose,
    first,
    forest,
    geometry,
    judgements,
    maps,
    plan,
    questions,
    samples,
    sections,
    tables,
    text,
    verdict_list,
)
from kvpatch.report import head_maps as attention
from kvpatch.report.library import chart_library
from kvpatch.report.packing import folded, packed, packed_json
from kvpatch.store.validation import gate_zero
from kvpatch.verdicts.answer import Answer, floor_checks
from kvpatch.verdicts.deviations import deviations, error_statement
from kvpatch.verdicts.prerequisites import primary


@dataclass(frozen=True)
class Live:
    """A page that a server shows while the run goes on: what it says on top, where home is, where events come from."""

    says: str
    home: str
    events: str


SCRIPTS = ("report.js", "heads.js", "two.js", "begin.js")
"""The page's script, in the order of its parts; the last one begins to draw."""
SECTIONS = {
    "answer": "Answer",
    "plan": "The plan",
    "attacks": "Where to attack it",
    "questions": "Questions",
    "texts": "Texts",
    "maps": "Layers and tokens",
    "dose": "Dose",
    "geometry": "R_V",
    "attention": "Attention",
    "models": "Models",
    "verdicts": "Verdicts",
    "instruments": "Instruments",
    "effects": "Effects",
    "conditions": "Conditions",
    "how": "How it was run",
    "not-shown": "What was not shown",
}
"""Sections in order; `plan`, `questions`, and `maps` to `models` are there only where there is something to show."""


def render(
    run: dict,
    protocol: Protocol,
    trials: pd.DataFrame,
    verdicts: list[dict],
    headline: str | Answer,
    mark: samples.Marker | None = None,
    effects: list[dict] | None = None,
    with_texts: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
    watched: tuple[pd.DataFrame, ...] | None = None,
    live: Live | None = None,
) -> str:
    """Return the report of a run as one self-contained HTML file.

    Args:
        run: the content of run.json; what is missing reads "not recorded".
        protocol: the protocol the run was made with.
        trials: one row per trial (`store.columns.TRIAL_COLUMNS`); only rows of the test split are reported;
            columns may be missing, and the table may be empty.
        verdicts: the content of verdicts.json.
        headline: the answer, or its one sentence alone.
        mark: (output text, source text, hits) -> spans (start, end, kind) to mark; kind is "hit" or "copied".
        effects: every condition's differences from its natural run (`statistics.effects.Effect`), or None.
        with_texts: adds `text`, `source_text` and `target_text` to the few rows that are shown; None where the
            trials hold them.
        watched: (trials of the phases that read geometry or watch attention, with their lists; every head's
            attention; and, where it is at hand, that by slot, of `head_tokens.stored_by_slot`), or None where there is
            none.
        live: what to say, and where to lead, where the page is served while the run goes on.
    Returns:
        HTML5 text; write it as UTF-8.
    """
    with charts.unchecked():
        prepared = tables.normalised(trials)
        told = headline if isinstance(headline, Answer) else Answer(full=headline, short=headline)
        context = _context(run, protocol, prepared, verdicts, told, effects or [], watched)
        context["samples"] = samples.samples(sections.by_phase(prepared, protocol), protocol, mark, with_texts)
    context["live"] = live
    return _environment().get_template("report.html.j2").render(context | _assets(live is not None))


def context_of(
    run: dict,
    protocol: Protocol,
    trials: pd.DataFrame,
    verdicts: list[dict],
    told: Answer,
    effects: list[dict],
    watched: tuple[pd.DataFrame, ...] | None,
) -> dict[str, Any]:
    """What the page's template is given, all figures in it; arguments as `render` has them."""
    with charts.unchecked():
        return _context(run, protocol, tables.normalised(trials), verdicts, told, effects, watched)


def _context(
    run: dict,
    protocol: Protocol,
    trials: pd.DataFrame,
    verdicts: list[dict],
    told: Answer,
    effects: list[dict],
    watched: tuple[pd.DataFrame, ...] | None,
) -> dict[str, Any]:
    rows = judgements.verdict_rows(verdicts, protocol)
    parts = sections.by_phase(trials, protocol)
    instruments = sections.instruments(run, trials, parts, protocol)
    strip = sections.strip(run, instruments)
    optional = _optional_figures(run, protocol, trials, rows, effects, watched)
    shown = {name: optional.get(name, True) for name in SECTIONS}
    shown["models"] = optional["across"] or optional["replications"]
    planned = plan.plan_rows(verdicts, rows, protocol, sections.model_of_phase(run, protocol))
    asked = [row for row in planned if row["kind"] == "question"]
    shown["questions"], shown["plan"] = asked, planned
    names = [name for name in SECTIONS if shown[name]]
    how = sections.how_it_was_run(run, trials, protocol)
    most = max((part["pair_id"].nunique() for _, _, part in parts), default=0)
    return {
        "sections": [{"id": name, "name": SECTIONS[name]} for name in names],
        "signs": _signs(rows, planned, strip),
        "model_names": [m["name"] for m in instruments["models"] if m["name"]],
        "is_finished": bool(run.get("finished")),
        "protocol": protocol,
        **_answer(told, protocol, trials),
        "rows": rows,
        "groups": verdict_list.groups(rows),
        "counts": verdict_list.counts(rows),
        "lines": verdict_list.drawn(rows, protocol),
        "primary": [row for row in judgements.rests_on(rows, protocol) if row["badge"].word != "tautological"],
        "plan": plan.by_kind(planned),
        "badges": judgements.BADGES.values(),
        "gates": judgements.gates(
            rows, judgements.instruments_badge(instruments["checks"], run.get("validation")), protocol
        ),
        "prerequisites": judgements.prerequisites(rows, protocol),
        "instruments": instruments,
        "gate_zero": gate_zero(run.get("validation")),
        "strip": strip,
        "deviations": [d.told for d in deviations(protocol, {v["id"]: v.get("n") or 0 for v in verdicts})],
        "error_statement": error_statement(protocol),
        "attacks": questions.attacks(rows, strip, protocol, most, not how["protocol_differs"]),
        "validation_failed": judgements.validation_passed(run.get("validation")) is False,
        "figures": sections.readout_figures(parts, protocol, instruments["specificity"]),
        "effects": sections.effect_phases(effects, protocol),
        **optional,
        "questions": asked,
        "how": how,
        "not_shown": sections.not_shown(run, trials, parts, protocol, rows, instruments),
        "gaps": sections.gaps(run, optional),
        "config": charts.CONFIG,
        "abouts": {name: condition.about for name, condition in protocol.conditions.items()},
        "trial_count": len(trials),
        "pair_count": trials.loc[trials["pair_id"] != "", "pair_id"].nunique(),
    }


def _answer(told: Answer, protocol: Protocol, trials: pd.DataFrame) -> dict[str, Any]:
    """Return the answer, whether its readouts register the mode, and what the conditions are that its numbers name."""
    said = set(re.findall(r"[\w.-]+", " ".join(told.numbers)))
    compared = {name for h in primary(protocol.hypotheses) for name in h.conditions}
    named = {name: protocol.conditions[name].about for name in protocol.conditions if name in said & compared}
    return {"told": told, "named": named, "floors": floor_checks(protocol, trials)}


def _signs(rows: list[dict], planned: list[dict], strip: list[dict]) -> dict[str, list[tuple[judgements.Badge, int]]]:
    """Return what stands beside a section's name in the contents: how often each badge stands in the section."""
    questions = [row for row in planned if row["kind"] == "question"]
    return {
        name: verdict_list.counts(found)
        for name, found in (("plan", planned), ("questions", questions), ("verdicts", rows), ("instruments", strip))
    }


def _optional_figures(
    run: dict,
    protocol: Protocol,
    trials: pd.DataFrame,
    rows: list[dict],
    effects: list[dict],
    watched: tuple[pd.DataFrame, ...] | None,
) -> dict[str, list]:
    """Return the figures of the sections that are there only where there is something to show."""
    models = sections.model_of_phase(run, protocol)
    ran = {effect["phase"] for effect in effects}
    names = {phase: str(model.get("name")) for phase, model in models.items() if phase in ran and model}
    named = {phase: str(model.get("name") or "a model that is not recorded") for phase, model in models.items()}
    layers = {phase: model.get("layers") for phase, model in models.items()}
    trajectories = [] if watched is None else attention.trajectory_figures(protocol, watched[0])
    return {
        "first": first.answer_figures(rows, effects, protocol),
        "forest": forest.hypothesis_figures(rows, protocol),
        "maps": maps.map_figures(effects, protocol, layers),
        "dose": dose.dose_figures(trials, protocol),
        "geometry": [*trajectories, *geometry.scatter_figures(trials, protocol, rows)],
        "attention": _attention(protocol, watched),
        "across": across.across_figures(effects, names),
        "replications": across.replication_rows(rows, protocol, named),
    }


def _attention(protocol: Protocol, watched: tuple[pd.DataFrame, ...] | None) -> list:
    """Return the figures of attention, as one list, or none."""
    found = None if watched is None else attention.attention_figures(protocol, *watched)
    return [] if found is None or not found.all else [found]


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvpatch.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": text.number,
        "p_value": text.p_value,
        "percent": text.percent,
        "plain": text.plain,
        "script_json": text.script_json,
        "packed_json": packed_json,
        "folded": folded,
        "as_float": text.as_float,
    }
    return environment


def shown(value: Any) -> Any:
    """Make every string that the template prints visible; it is escaped after this."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else text.visible(value)


def policy(is_live: bool) -> str:
    """Return the content security policy of a page."""
    return str(_assets(is_live)["policy"])


@functools.cache
def _assets(is_live: bool) -> dict[str, Markup]:
    """Return the style sheet, the scripts and the page's policy; a live page may also ask its own server."""
    folder = resources.files("kvpatch.report") / "templates"
    style = folder.joinpath("report.css").read_text("utf-8")
    script = "".join(folder.joinpath(name).read_text("utf-8") for name in SCRIPTS)
    library = chart_library()
    for name, content in (("vega", library), ("report.js", script)):
        if "</script" in content.lower() or "<!--" in content or "\r" in content:
            raise ValueError(f"{name} can't stand inside a script element")
    hashes = " ".join(f"'sha256-{_sha256(content)}'" for content in (library, script))
    allowed = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    if is_live:
        allowed += "; connect-src 'self'"
    return {
        "style": Markup(style),
        "script": Markup(script),
        "library": Markup(packed(library)),
        "policy": Markup(allowed),
    }


def _sha256(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
