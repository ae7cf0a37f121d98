"""What each section of the report says: plain values for the template; only marked texts are HTML."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pandas as pd
import yaml

from kvpatch.protocols.schema import Protocol
from kvpatch.report import charts, forest, specificity, tables
from kvpatch.report.figure import figure, rounded
from kvpatch.report.judgements import DIFFERS, FAILED, PASSED, UNKNOWN, Badge, instruments_badge, validation_passed
from kvpatch.report.text import NOT_RECORDED, facts, number, plain
from kvpatch.store.record import dumped_sha256, sessions_of, told_of_sessions
from kvpatch.verdicts.measure import units_of
from kvpatch.verdicts.pairs import shown_of
from kvpatch.verdicts.specificity import Specificity

FEW_PAIRS = 50
# The smallest paired effect (dz) that a test at alpha .001 sees with 90% power; see docs/statistics.md.
VISIBLE_DZ = ((20, 1.20), (50, 0.69), (100, 0.47))


Parts = list[tuple[str, str, pd.DataFrame]]
"""(phase, its question, its trials), in the protocol's order."""


def by_phase(trials: pd.DataFrame, protocol: Protocol) -> Parts:
    """Return (phase, its question, its trials) for every phase that has rows, in the protocol's order."""
    found = {str(name): part for name, part in trials.groupby("phase", sort=False)}
    present = set(found) - {""}
    order = [p for p in protocol.phases if p in present] + sorted(present - set(protocol.phases))
    questions = {name: phase.question for name, phase in protocol.phases.items()}
    return [(p, questions.get(p, "not in the protocol"), found[p]) for p in order]


def models_of(run: dict) -> list[dict]:
    """Return every model of a run: its key (None for the run's own), name, record, check, noise floor and limits."""
    own = {key: run.get(key) for key in ("model", "check", "noise_floor", "coherence_limits")}
    records = {None: own, **(run.get("other_models") or {})}
    return [
        {
            "key": key,
            "name": (record.get("model") or {}).get("name"),
            "model": record.get("model") or {},
            "checks": [c for c in record.get("check") or [] if isinstance(c, dict)],
            "noise_floor": record.get("noise_floor") or {},
            "limits": record.get("coherence_limits") or {},
        }
        for key, record in records.items()
    ]


def model_of_phase(run: dict, protocol: Protocol) -> dict[str, dict]:
    """Return the model record that each phase ran on."""
    models = {model["key"]: model["model"] for model in models_of(run)}
    return {name: models.get(phase.model, {}) for name, phase in protocol.phases.items()}


def instruments(run: dict, trials: pd.DataFrame, parts: Parts, protocol: Protocol) -> dict:
    """Return the section on prerequisites: checks, validation, coherence, and agreements between conditions."""
    models = models_of(run)
    phases = []
    for phase, question, part in parts:
        coherence = tables.coherence(part, protocol)
        chart = charts.coherence_chart(coherence.drop(columns="about")) if coherence["share"].notna().any() else None
        about = "Share of coherent outputs. Dashed: the 90% a condition needs."
        drawn = figure(
            f"coherence-{phase}", f"Coherence, phase {phase}", about, chart, label="Coherent outputs by condition"
        )
        phases.append({"phase": phase, "question": question, "coherence": records(coherence), "figure": drawn})
    unchanged, checksums = tables.unchanged_caches(trials)
    specific = specificity.of_run(run)
    for model in models:
        model["checks"] = [{**check, "badge": holds_badge(check.get("holds"))} for check in model["checks"]]
        model["limits"] = facts(model["limits"])
    return {
        "models": models,
        "checks": [check for model in models for check in model["checks"]],
        "validation": facts(run["validation"]) if run.get("validation") else [],
        "phases": phases,
        "unchanged": unchanged,
        "checksums": checksums,
        "twins": twin_rows(parts, protocol),
        "is_judged_under_target": any(
            "nll_target" in (run_of.get("coherence_limits") or {})
            for run_of in (run, *(run.get("other_models") or {}).values())
        ),
        "specificity": specific,
        "by_position": specificity.figures(specific),
    }


def strip(run: dict, found: dict) -> list[dict]:
    """Return what stands right under the answer: each instrument with its state, so that a broken one is seen.

    found: what `instruments` returned.
    """
    validation = validation_passed(run.get("validation"))
    checked = instruments_badge(found["checks"], {"passed": True})
    if any(not model["checks"] for model in found["models"]):
        checked = FAILED if checked is FAILED else UNKNOWN
    judged = [row for phase in found["phases"] for row in phase["coherence"] if not pd.isna(row["share"])]
    weak = [row for row in judged if row["is_below"]]
    strict = [twin for twin in found["twins"] if twin["strict"]]
    differ = [twin for twin in strict if twin["same"] != twin["shared"]]
    names = ", ".join(str(model["name"]) for model in found["models"])
    damaged = f"{len(weak)} of {len(judged)} fall below 90%" if weak else "none is below 90%"
    agreed = f"{len(strict) - len(differ)} of {len(strict)} agreements hold exactly"
    return [
        {
            "name": "Validation on planted truth",
            "badge": holds_badge(validation),
            "says": "do the instruments find what was planted?",
        },
        {"name": "Check of the model", "badge": checked, "says": f"is it patched correctly? ({names})"},
        specificity.strip_entry(found["specificity"]),
        {
            "name": "Coherent outputs",
            "badge": UNKNOWN if not judged else (Badge("damaged", "✕", "open", "") if weak else PASSED),
            "says": damaged if judged else "not judged",
        },
        {
            "name": "Agreements by construction",
            "badge": UNKNOWN if not strict else (DIFFERS if differ else PASSED),
            "says": agreed if strict else "no integrity condition ran",
        },
    ]


def holds_badge(holds: Any) -> Badge:
    """Return the badge of a yes/no record."""
    return UNKNOWN if holds is None else (PASSED if bool(holds) else FAILED)


def twin_rows(parts: Parts, protocol: Protocol) -> list[dict]:
    """Return, for conditions that agree with another by construction, how often their outputs do."""
    out = []
    pairs = tables.twins(protocol)
    wanted = {name for name, twin, _ in pairs for name in (name, twin)}
    for phase, _, part in parts:
        said = tables.outputs(part[part["condition"].isin(wanted)])
        for name, twin, why in pairs:
            same, shared = tables.sameness(said, name, twin)
            if shared:
                strict = tables.role(protocol, phase, name) == "integrity"
                state = (PASSED if same == shared else DIFFERS) if strict else None
                row = {"name": name, "twin": twin, "why": why, "same": same, "shared": shared}
                out.append({**row, "badge": state, "strict": strict})
    return out


def readout_figures(parts: Parts, protocol: Protocol, specific: list[Specificity]) -> list[dict]:
    """Return the section on conditions: a phase's figures, one a readout, and its table of means."""
    out = []
    baseline = tables.baseline_of(protocol)
    for phase, question, part in parts:
        figures, means_of, units = [], [], units_of(protocol, part)
        readouts = shown_of("report", part)
        for readout in readouts:
            _, means = tables.condition_means(part, readout.name, protocol, units)
            chart = None
            if means["mean"].notna().any():
                drawn = rounded(means.drop(columns="about"), 4)
                chart = charts.conditions_chart(drawn, readout.axis_title, baseline)
            note = specificity.said_of(specific, protocol, phase, readout.name)
            label = f"{readout.label} by condition; the numbers are in the table of means"
            name = f"readout-{phase}-{readout.name}"
            figures.append(figure(name, readout.label, readout.said, chart, label=label, note=note))
            means_of.append(means.set_index("condition"))
        names = tables.conditions_of(part, protocol)
        conditions = [
            {"name": n, "about": tables.about(protocol, n), "role": tables.role(protocol, phase, n)} for n in names
        ]
        cells = {n: [means.loc[n].to_dict() for means in means_of] for n in names}
        row = {"phase": phase, "question": question, "figures": figures, "readouts": readouts}
        out.append({**row, "conditions": conditions, "cells": cells, "pairs": part["pair_id"].nunique()})
    return out


def effect_phases(effects: list[dict], protocol: Protocol) -> list[dict]:
    """Return, for every phase, its forest plots, and one row a condition with its effects on every readout."""
    found: dict[str, dict[str, dict]] = {}
    for effect in effects:
        head = {key: effect[key] for key in ("condition", "about", "natural", "coherent", "is_incoherent")}
        head["role"] = tables.role(protocol, effect["phase"], effect["condition"])
        row = found.setdefault(effect["phase"], {}).setdefault(effect["condition"], {**head, "cells": []})
        row["cells"].append(effect)
    return [
        {
            "phase": phase,
            "question": protocol.phases[phase].question,
            "figures": forest.effect_figures(effects, protocol, phase),
            "rows": list(rows.values()),
            "pairs": max((cell["n"] for row in rows.values() for cell in row["cells"]), default=0),
        }
        for phase, rows in found.items()
    ]


def gaps(run: dict, optional: dict[str, list]) -> list[str]:
    """Return what kinds of evidence this run holds nothing of."""
    out = []
    if not run.get("validation"):
        out.append("The instruments were not validated on planted truth in this run's record.")
    if not optional["attention"]:
        out.append("Attention maps: no trial holds attention readouts.")
    if not any(figure.id.startswith("rv_") for figure in optional["geometry"]):
        out.append("Trajectories of R_V over the output: no trial holds them.")
    for name, what in (
        ("maps", "Layers and tokens: no condition of a map ran."),
        ("dose", "Dose: no ladder of levels ran."),
        ("geometry", "R_V beside the mode: no correlation over pairs could be drawn."),
        ("across", "Another model: no condition ran on two."),
    ):
        if not optional[name]:
            out.append(what)
    return out


def records(frame: pd.DataFrame) -> list[dict]:
    """Return a table as a list of plain dictionaries."""
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def how_it_was_run(run: dict, trials: pd.DataFrame, protocol: Protocol) -> dict:
    """Return how it was run: groups of (name, value), the protocol's text, and whether it changed."""
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
        **{
            f"Model of key '{other['key']}'": [
                (n.replace("_", " "), plain(other["model"].get(n))) for n in other["model"]
            ]
            for other in models_of(run)[1:]
        },
        "Code": [
            ("kvpatch", plain(run.get("kvpatch_version"))),
            ("git commit", plain((git or {}).get("commit"))),
            ("uncommitted changes", plain(dirty)),
            *(facts(run.get("versions") or {}) or [("versions", NOT_RECORDED)]),
        ],
        "Design": [
            ("protocol", protocol.protocol),
            ("protocol sha256", plain(stored)),
            ("prompt bank sha256", plain(run.get("bank_sha256"))),
            ("seed", plain(run.get("seed"))),
            ("pairs planned", plain(run.get("n"))),
            ("phases", plain(run.get("phases"))),
            ("new tokens at most", plain(protocol.generation.max_new_tokens)),
            ("temperature", plain(protocol.generation.temperature)),
            ("samples of a pair and condition", plain(protocol.generation.samples)),
        ],
        "Work": [
            *(facts(hardware) if hardware else [("hardware", NOT_RECORDED)]),
            ("created", plain(run.get("created"))),
            ("finished", plain(run.get("finished"))),
            ("from start to end", f"{number(seconds)} s" if seconds is not None else NOT_RECORDED),
            ("time at work", f"{number(run['seconds'])} s" if run.get("seconds") else NOT_RECORDED),
            *([("workers", told)] if (told := told_of_sessions(sessions_of(run))) else []),
            ("trials", number(len(trials))),
            ("tokens in these trials", number(tokens) if tokens else NOT_RECORDED),
            ("tokens generated, calibration included", number(run["tokens"]) if run.get("tokens") else NOT_RECORDED),
            ("command", " ".join(map(str, run.get("command") or [])) or NOT_RECORDED),
        ],
    }
    dumped = protocol.model_dump(mode="json", by_alias=True)
    written = protocol.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    text = yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=110)
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


def not_shown(run: dict, trials: pd.DataFrame, parts: Parts, protocol: Protocol, rows: list[dict], found: dict) -> dict:
    """Return what the run leaves open, and why. found: what `instruments` returned."""
    failed = trials.assign(message=tables.errors(trials))
    failed = failed[failed["message"] != ""]
    error_rows = [
        {"phase": phase, "condition": condition, "count": len(group), "message": group["message"].iloc[0]}
        for (phase, condition), group in failed.groupby(["phase", "condition"], sort=True)
    ]
    sizes = []
    for phase, _, part in parts:
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
    models = models_of(run)
    return {
        "skipped": [s for s in run.get("skipped") or [] if isinstance(s, dict)],
        "dropped": dropped if isinstance(dropped, int) else None,
        "passed_over": dict(run.get("passed_over") or {}),
        "sizes": sizes,
        "stored": run.get("stored") or 0,
        "planned": run.get("planned") or 0,
        "few": [s for s in sizes if s["pairs"] < FEW_PAIRS],
        "visible_dz": VISIBLE_DZ,
        "absent_phases": [(n, p.question) for n, p in protocol.phases.items() if n not in ran],
        "tautologies": [row for row in rows if row["is_tautological"]],
        "text_contrasts": [row for row in rows if row["compares_texts"]],
        "is_spelled": "equals_text" not in trials or trials["equals_text"].isna().all(),
        "swaps": [t for t in found["twins"] if not t["strict"]],
        "incoherent": weak,
        "errors": error_rows,
        "noise_floors": [(m["name"], facts(m["noise_floor"])) for m in models if m["noise_floor"]],
        "models": [m["name"] for m in models if m["name"]],
        "open": [row for row in rows if row["badge"].word in ("inconclusive", "not interpretable", "no verdict")],
        "exploratory": [row for row in rows if row["is_exploratory"]],
    }
