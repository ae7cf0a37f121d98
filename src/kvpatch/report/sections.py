"""What each section of the report says: plain values for the template; only marked texts are HTML."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pandas as pd
import yaml
from markupsafe import Markup

from kvpatch.protocols.schema import Protocol, dumped_sha256
from kvpatch.report import charts, tables
from kvpatch.report.judgements import DIFFERS, FAILED, PASSED, UNKNOWN, Badge
from kvpatch.report.text import NOT_RECORDED, Span, facts, marked, number, plain

Marker = Callable[[str, str], list[Span]]
MAX_TEXT = 20_000
FEW_PAIRS = 50
# SCIENCE.md 2.14: smallest paired effect (dz) at 90% power and alpha .001.
VISIBLE_DZ = ((20, 1.20), (50, 0.69), (100, 0.47))


def by_phase(trials: pd.DataFrame, protocol: Protocol) -> list[tuple[str, str, pd.DataFrame]]:
    """Return (phase, its question, its trials) for every phase that has rows, in the protocol's order."""
    present = set(trials["phase"]) - {""}
    order = [p for p in protocol.phases if p in present] + sorted(present - set(protocol.phases))
    questions = {name: phase.question for name, phase in protocol.phases.items()}
    return [(p, questions.get(p, "not in the protocol"), trials[trials["phase"] == p]) for p in order]


def instruments(run: dict, trials: pd.DataFrame, protocol: Protocol) -> dict:
    """Return section 3: check, validation, coherence, and agreements between conditions."""
    checks = [c for c in run.get("check") or [] if isinstance(c, dict)]
    phases = []
    for phase, question, part in by_phase(trials, protocol):
        coherence = tables.coherence(part, protocol)
        chart = charts.specification(charts.coherence_chart(coherence)) if coherence["share"].notna().any() else None
        phases.append({"phase": phase, "question": question, "coherence": records(coherence), "chart": chart})
    unchanged, checksums = tables.unchanged_caches(trials)
    return {
        "checks": [{**check, "badge": holds_badge(check.get("holds"))} for check in checks],
        "validation": facts(run["validation"]) if run.get("validation") else [],
        "limits": facts(run.get("coherence_limits") or {}),
        "phases": phases,
        "unchanged": unchanged,
        "checksums": checksums,
        "twins": twin_rows(trials, protocol),
    }


def holds_badge(holds: Any) -> Badge:
    """Return the badge of a yes/no record."""
    return UNKNOWN if holds is None else (PASSED if bool(holds) else FAILED)


def twin_rows(trials: pd.DataFrame, protocol: Protocol) -> list[dict]:
    """Return, for conditions that agree with another by construction, how often their outputs do."""
    out = []
    for _, _, part in by_phase(trials, protocol):
        for name, twin, why in tables.twins(protocol):
            same, shared = tables.sameness(part, name, twin)
            if shared:
                strict = tables.role(protocol, name) == "integrity"
                state = (PASSED if same == shared else DIFFERS) if strict else None
                row = {"name": name, "twin": twin, "why": why, "same": same, "shared": shared}
                out.append({**row, "badge": state, "strict": strict})
    return out


def readout_figures(trials: pd.DataFrame, protocol: Protocol) -> list[dict]:
    """Return section 4: a phase's figures, one a readout, and its table of means."""
    out = []
    baseline = tables.baseline_of(protocol)
    for phase, question, part in by_phase(trials, protocol):
        figures = []
        for readout in tables.READOUTS:
            points, means = tables.condition_means(part, readout.column, protocol)
            shown = tables.thinned(points)
            chart = None
            if len(points):
                drawn = charts.conditions_chart(rounded(shown), rounded(means), readout.unit, baseline)
                chart = charts.specification(drawn)
            thin = f"{len(shown)} of {len(points)} dots are drawn" if len(shown) < len(points) else ""
            means = means.set_index("condition")
            figures.append({"readout": readout, "chart": chart, "thin": thin, "means": means, "dots": len(shown)})
        names = tables.conditions_of(part, protocol)
        conditions = [{"name": n, "about": tables.about(protocol, n), "role": tables.role(protocol, n)} for n in names]
        cells = {n: [figure["means"].loc[n].to_dict() for figure in figures] for n in names}
        pairs = part["pair_id"].nunique()
        row = {"phase": phase, "question": question, "figures": figures, "conditions": conditions}
        out.append({**row, "cells": cells, "pairs": pairs})
    return out


def effect_rows(effects: list[dict]) -> dict[str, list[dict]]:
    """Return, by phase, one row a condition with its effects on every readout."""
    out: dict[str, dict[str, dict]] = {}
    for effect in effects:
        head = {key: effect[key] for key in ("condition", "about", "natural", "coherent")}
        row = out.setdefault(effect["phase"], {}).setdefault(effect["condition"], {**head, "cells": []})
        row["cells"].append(effect)
    return {phase: list(rows.values()) for phase, rows in out.items()}


def rounded(frame: pd.DataFrame, digits: int = 6) -> pd.DataFrame:
    """Return the table with its floats at `digits` significant digits: all a chart can show."""
    out = frame.copy()
    for name in out.select_dtypes("float").columns:
        out[name] = [float(f"{x:.{digits}g}") for x in out[name]]
    return out


def records(frame: pd.DataFrame) -> list[dict]:
    """Return a table as a list of plain dictionaries."""
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def examples(trials: pd.DataFrame, protocol: Protocol, mark: Marker | None) -> dict:
    """Return section 5: for a few pairs, chosen by rule, their prompts and what every condition wrote."""
    for phase, _, part in by_phase(trials, protocol):
        chosen, by_gap = tables.example_pairs(part, protocol)
        if not chosen:
            continue
        total = part["pair_id"].nunique()
        pairs = [_example(part[part["pair_id"] == pair], pair, gap, protocol, mark) for pair, gap in chosen]
        return {"phase": phase, "pairs": pairs, "by_gap": by_gap, "total": total, "marked": mark is not None}
    return {"phase": None, "pairs": [], "by_gap": False, "total": 0, "marked": mark is not None}


def _example(part: pd.DataFrame, pair: str, gap: float | None, protocol: Protocol, mark: Marker | None) -> dict:
    if "sample" in part:
        part = part.sort_values("sample", kind="stable")
    first = part.drop_duplicates("condition").set_index("condition")
    source, target = (first_text(part, f"{side}_text") for side in ("source", "target"))
    outputs = []
    for name in tables.conditions_of(part, protocol):
        row = first.loc[name].to_dict()
        text = row.get("text")
        error = row.get("error")
        outputs.append(
            {
                "name": name,
                "about": tables.about(protocol, name),
                "role": tables.role(protocol, name),
                "text": shown_text(text, source, mark) if isinstance(text, str) else None,
                "error": error if isinstance(error, str) and error.strip() else "",
                "coherent": None if pd.isna(row.get("coherent")) else bool(row.get("coherent")),
                "recursive_score": row.get("recursive_score"),
                "recursive_score_masked": row.get("recursive_score_masked"),
                "stopped": row.get("stopped") if isinstance(row.get("stopped"), str) else "",
            }
        )
    prompts = {"source": shown_text(source, "", None), "target": shown_text(target, "", None)}
    return {"pair": pair, "gap": gap, "prompts": prompts, "outputs": outputs}


def first_text(part: pd.DataFrame, column: str) -> str:
    """Return the first text a column holds, or the empty string."""
    texts = [t for t in part[column] if isinstance(t, str)] if column in part else []
    return texts[0] if texts else ""


def shown_text(text: str, source: str, mark: Marker | None) -> Markup:
    """Return a text as HTML, marked if a marker is given; cut, and saying so, past `MAX_TEXT` characters."""
    spans = mark(text, source) if mark is not None else []
    out = marked(text[:MAX_TEXT], spans)
    if len(text) > MAX_TEXT:
        out += Markup('<span class="cut"> … {} more characters not shown</span>').format(f"{len(text) - MAX_TEXT:,}")
    return out


def how_it_was_run(run: dict, trials: pd.DataFrame, protocol: Protocol) -> dict:
    """Return section 6: groups of (name, value), the protocol's text, and whether it changed."""
    model, git, hardware = (run.get(k) if isinstance(run.get(k), dict) else {} for k in ("model", "git", "hardware"))
    stored = run.get("protocol_sha256")
    wanted = ("name", "architecture", "layers", "kv_heads", "query_heads", "head_dim", "dtype", "device")
    hashes = ("weights_sha256", "tokenizer_sha256", "template_sha256")
    names = [*wanted, *hashes, *(k for k in model or {} if k not in (*wanted, *hashes))]
    seconds = elapsed(run.get("created"), run.get("finished"))
    tokens = tables.values(trials, "n_tokens").sum()
    dirty = (git or {}).get("dirty")
    groups = {
        "Model": [(n.replace("_", " "), plain((model or {}).get(n))) for n in names],
        "Code": [
            ("kvpatch", plain(run.get("kvpatch_version"))),
            ("git commit", plain((git or {}).get("commit"))),
            ("uncommitted changes", plain(dirty)),
            *(facts(run.get("versions") or {}) or [("versions", NOT_RECORDED)]),
        ],
        "Design": [
            ("protocol", protocol.protocol),
            ("protocol sha256", plain(stored)),
            ("seed", plain(run.get("seed"))),
            ("pairs planned", plain(run.get("n"))),
            ("phases", plain(run.get("phases"))),
            ("new tokens at most", plain(protocol.generation.max_new_tokens)),
            ("temperature", plain(protocol.generation.temperature)),
        ],
        "Work": [
            *(facts(hardware) if hardware else [("hardware", NOT_RECORDED)]),
            ("created", plain(run.get("created"))),
            ("finished", plain(run.get("finished"))),
            ("time", f"{number(seconds)} s" if seconds is not None else NOT_RECORDED),
            ("trials", number(len(trials))),
            ("tokens generated", number(tokens) if tokens else NOT_RECORDED),
        ],
    }
    dumped = protocol.model_dump(mode="json", by_alias=True)
    text = yaml.safe_dump(dumped, sort_keys=False, allow_unicode=True, width=110)
    return {
        "groups": groups,
        "protocol_text": text,
        "protocol_differs": bool(stored) and stored != dumped_sha256(run.get("protocol") or dumped),
    }


def elapsed(created: Any, finished: Any) -> float | None:
    """Return the seconds between two ISO times, or None where one can't be read."""
    try:
        return (datetime.fromisoformat(str(finished)) - datetime.fromisoformat(str(created))).total_seconds()
    except (ValueError, TypeError):
        return None


def not_shown(run: dict, trials: pd.DataFrame, protocol: Protocol, rows: list[dict]) -> dict:
    """Return section 7: what the run leaves open, and why."""
    failed = trials.assign(message=tables.errors(trials))
    failed = failed[failed["message"] != ""]
    error_rows = [
        {"phase": phase, "condition": condition, "count": len(group), "message": group["message"].iloc[0]}
        for (phase, condition), group in failed.groupby(["phase", "condition"], sort=True)
    ]
    sizes = []
    for phase, _, part in by_phase(trials, protocol):
        planned = protocol.phases[phase].n if phase in protocol.phases else None
        sizes.append({"phase": phase, "pairs": part["pair_id"].nunique(), "planned": planned})
    ran = {size["phase"] for size in sizes}
    weak = [
        (phase, row.condition, row.share)
        for phase, _, part in by_phase(trials, protocol)
        for row in tables.coherence(part, protocol).itertuples()
        if row.is_below
    ]
    dropped = run.get("dropped_pairs")
    return {
        "skipped": [s for s in run.get("skipped") or [] if isinstance(s, dict)],
        "dropped": dropped if isinstance(dropped, int) else None,
        "sizes": sizes,
        "few": [s for s in sizes if s["pairs"] < FEW_PAIRS],
        "visible_dz": VISIBLE_DZ,
        "absent_phases": [(n, p.question) for n, p in protocol.phases.items() if n not in ran],
        "tautologies": [h for h in protocol.hypotheses if protocol.is_tautological(h)],
        "swaps": [t for t in twin_rows(trials, protocol) if not t["strict"]],
        "incoherent": weak,
        "errors": error_rows,
        "noise_floor": facts(run.get("noise_floor") or {}),
        "open": [row for row in rows if row["badge"].word in ("inconclusive", "not interpretable", "no verdict")],
        "exploratory": [row for row in rows if row["is_exploratory"]],
    }
