"""The report: one HTML file that holds everything it needs and asks the network for nothing.

A content security policy in the page lets only its own scripts run (by hash) and lets nothing be fetched, so
that a text which got past the escaping would still be inert.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib import resources
from typing import Any

import jinja2
import pandas as pd
import vl_convert
from markupsafe import Markup

from kvpatch.organisms.record import gate_zero
from kvpatch.protocols.schema import Protocol
from kvpatch.report import judgements, sections, tables, text


def render(
    run: dict,
    protocol: Protocol,
    trials: pd.DataFrame,
    verdicts: list[dict],
    headline: str,
    mark: sections.Marker | None = None,
    effects: list[dict] | None = None,
) -> str:
    """Return the report of a run as one self-contained HTML file.

    Args:
        run: the content of run.json; what is missing reads "not recorded".
        protocol: the protocol the run was made with.
        trials: one row a trial (DESIGN.md 2); only rows of the test split are reported; columns may be
            missing, and the table may be empty.
        verdicts: the content of verdicts.json.
        headline: the one-sentence answer.
        effects: every condition's differences from its natural run (`statistics.effects.Effect`), or None.
        mark: (output text, source text) -> spans (start, end, kind) to mark; kind is "hit" or "copied".
    Returns:
        HTML5 text; write it as UTF-8.
    """
    trials = tables.normalised(trials)
    rows = judgements.verdict_rows(verdicts, protocol)
    instruments = sections.instruments(run, trials, protocol)
    state = judgements.instruments_badge(instruments["checks"], run.get("validation"))
    context = {
        "model_name": (run.get("model") or {}).get("name"),
        "is_finished": bool(run.get("finished")),
        "protocol": protocol,
        "headline": headline,
        "rows": rows,
        "criteria": judgements.criteria(rows),
        "badges": judgements.BADGES.values(),
        "gates": judgements.gates(rows, state),
        "instruments": instruments,
        "gate_zero": gate_zero(run.get("validation")),
        "validation_failed": judgements.validation_passed(run.get("validation")) is False,
        "figures": sections.readout_figures(trials, protocol),
        "effects": sections.effect_rows(effects or []),
        "examples": sections.examples(trials, protocol, mark),
        "how": sections.how_it_was_run(run, trials, protocol),
        "not_shown": sections.not_shown(run, trials, protocol, rows),
        "trial_count": len(trials),
        "pair_count": trials.loc[trials["pair_id"] != "", "pair_id"].nunique(),
    }
    return _environment().get_template("report.html.j2").render(context | _assets())


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvpatch.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": text.number,
        "p_value": text.p_value,
        "percent": text.percent,
        "plain": text.plain,
        "script_json": text.script_json,
        "as_float": text.as_float,
    }
    return environment


def _shown(value: Any) -> Any:
    """Make every string that the template prints visible; it is escaped after this."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else text.visible(value)


@functools.cache
def _assets() -> dict[str, Markup]:
    folder = resources.files("kvpatch.report") / "templates"
    style, script = (folder.joinpath(name).read_text("utf-8") for name in ("report.css", "report.js"))
    library = vl_convert.javascript_bundle()  # pyright: ignore[reportCallIssue] (its stub forgets the default)
    for name, content in (("vega", library), ("report.js", script)):
        if "</script" in content.lower() or "<!--" in content or "\r" in content:
            raise ValueError(f"{name} can't stand inside a script element")
    hashes = " ".join(f"'sha256-{_sha256(content)}'" for content in (library, script))
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    return {
        "style": Markup(style),
        "script": Markup(script),
        "library": Markup(library),
        "policy": Markup(policy),
    }


def _sha256(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
