"""What the commands print: summaries as plain data, and the tables that show them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kvpatch.cli.console import PlainConsole, styled
from kvpatch.errors import StoreError, visible
from kvpatch.planning.listener import Report, unreported
from kvpatch.planning.plan import Plan
from kvpatch.prompts.bank import Bank
from kvpatch.protocols.schema import Protocol
from kvpatch.store.directory import Store
from kvpatch.store.record import told_of_sessions
from kvpatch.verdicts.wording import number, p_value

if TYPE_CHECKING:
    from kvpatch.checks.identities import Identity
    from kvpatch.executors.estimate import Estimate
    from kvpatch.store.validation import Validation
    from kvpatch.verdicts.decide import Verdict
    from kvpatch.verdicts.power import Power, PowerAt


STATUS_COLUMNS = ("trial_id", "phase", "error", "n_tokens")
"""What is read of every trial to say how far a run is."""


def plan_summary(
    plan: Plan,
    protocol: Protocol,
    tokens: Callable[[str | None, str], int],
    cost: Estimate | None = None,
    report: Report = unreported,
) -> dict[str, Any]:
    """Trials by phase and condition; the experiment's own conditions and controls counted apart. `plan_sha256` is a
    hash over the ids of all batches, which hold those of all trials: two machines plan the same where it is the same.

    tokens: number of tokens of a prompt's text for the model of a key.
    """
    phases: dict[str, Any] = {}
    prefills: set[tuple[str | None, str]] = set()
    used: dict[str, set[str]] = {}
    total, done, content = plan.n_trials, 0, hashlib.sha256()
    for draft in plan.drafts:
        report("naming trials", done, total)
        content.update(f"{draft.batch_id}\n".encode())
        done += draft.size
        phase = phases.setdefault(draft.phase, {"experiment": 0, "controls": 0, "conditions": Counter()})
        for name, count in draft.counts.items():
            own = draft.split == "test" and draft.roles[name] == "experiment"
            phase["experiment" if own else "controls"] += count
            if count:
                phase["conditions"][name] += count
        if draft.phase not in used:
            asked = (role for c in draft.conditions.values() for role in (c.from_, c.text_of) if role)
            used[draft.phase] = {"target", "source", *asked}
        prefills |= {(draft.model, pair.texts[r]) for pair in draft.pairs for r in used[draft.phase] & set(pair.texts)}
    for name, phase in phases.items():
        phase["conditions"] = dict(phase["conditions"])
        phase["seconds"] = None if cost is None else round(cost.seconds_by_phase[name], 1)
    new = sum(draft.size * draft.generation.max_new_tokens for draft in plan.drafts)
    return {
        "protocol": protocol.protocol,
        "protocol_sha256": protocol.sha256,
        "trials": total,
        "batches": len(plan.drafts),
        "plan_sha256": content.hexdigest(),
        "phases": phases,
        "distinct_prefills": len(prefills),
        "prefill_tokens": sum(tokens(key, text) for key, text in prefills),
        "new_tokens_at_most": new,
        "seconds": None if cost is None else round(cost.seconds, 1),
        "peak_memory_bytes": None if cost is None else cost.peak_bytes,
        "available_memory_bytes": None if cost is None else cost.available_bytes,
        "fits": None if cost is None else cost.peak_bytes <= cost.available_bytes,
        "calibrated_in_seconds": None if cost is None else round(cost.calibrated_in, 1),
        "skipped": [s.model_dump() for s in plan.skipped],
        "dropped_pairs": plan.dropped_pairs,
        "passed_over": plan.passed_over,
    }


def print_plan(summary: dict[str, Any]) -> None:
    """A table of phases and conditions."""
    table = Table(title=f"{summary['protocol']}: {summary['trials']} trials")
    for column in ("phase", "experiment's own", "controls", "time", "conditions"):
        table.add_column(column)
    for name, phase in summary["phases"].items():
        conditions = " ".join(f"{k}:{v}" for k, v in phase["conditions"].items())
        spent = "-" if phase["seconds"] is None else _clock(phase["seconds"])
        table.add_row(name, str(phase["experiment"]), str(phase["controls"]), spent, conditions)
    console = PlainConsole()
    console.print(table)
    console.print(
        f"{summary['distinct_prefills']} distinct prefills of {summary['prefill_tokens']:,} tokens, at most "
        f"{summary['new_tokens_at_most']:,} new tokens; {len(summary['dropped_pairs'])} pairs dropped"
    )
    if summary["seconds"] is not None:
        console.print(
            f"about {_clock(summary['seconds'])} (h:mm:ss) and {summary['peak_memory_bytes'] / 1e9:.1f} GB on this "
            f"machine, from a calibration of {summary['calibrated_in_seconds']:.0f} s; loading and check not counted"
        )
        have = f"{summary['available_memory_bytes'] / 1e9:.1f} GB can be had"
        console.print(
            f"it fits: {have}"
            if summary["fits"]
            else f"it does not fit: {have}; --device-map auto splits or offloads the model, --dtype makes it smaller"
        )
    for name, places in summary.get("placement", {}).items():
        told = ", ".join(f"{size / 1e9:.2g} GB on {place}" for place, size in places.items())
        console.print(f"weights of {name}: {told}")
    for phase, count in summary["passed_over"].items():
        console.print(
            f"passed over in phase {phase}: {count} pairs whose prompts lack what it compares; others take their place"
        )
    console.print(summary["error_statement"])
    for skipped in summary["skipped"]:
        console.print(f"left out in phase {skipped['phase']}: {skipped['condition']} ({skipped['reason']})")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def status_summary(store: Store) -> dict[str, Any]:
    """How far a run is, whether a process is at it, and how long it will take."""
    from kvpatch.view.runs import LiveRun

    record = store.read_record()
    store.each_once()
    run = LiveRun("run", store.directory, STATUS_COLUMNS)
    run.refresh()
    if run.trouble is not None:
        raise StoreError(run.trouble)
    progress = run.progress()
    over_all = record.tokens / record.seconds if record.seconds else None
    return {
        "protocol": record.protocol["protocol"],
        "model": record.model.name,
        "state": progress.state,
        "done": progress.done,
        "left": max(0, record.planned - progress.done),
        "failed": progress.failed,
        "finished": record.finished if progress.done >= record.planned else None,
        "tokens_per_second": progress.tokens_per_second if progress.state == "running" else over_all,
        "seconds": record.seconds,
        "seconds_left": progress.left,
        "phases": progress.by_phase,
        "workers": told_of_sessions(record.sessions),
    }


MOST_PHASES = 500
"""Rows of the table of phases; a table of a hundred thousand takes half a minute to lay out."""


def print_status(summary: dict[str, Any]) -> None:
    """A row a phase, and under it what is known of the whole."""
    console = PlainConsole()
    table = Table(title=f"{summary['protocol']} on {summary['model']}: {summary['state']}")
    for column in ("phase", "done", "of", "progress", "failed"):
        table.add_column(column, justify="right" if column in ("done", "of", "failed") else "left")
    for row in summary["phases"][:MOST_PHASES]:
        share = min(1.0, row["done"] / row["planned"]) if row["planned"] else 1.0
        bar = "█" * round(20 * share) + "░" * (20 - round(20 * share))
        failed = styled(str(row["failed"]), "red") if row["failed"] else "0"
        table.add_row(row["phase"], str(row["done"]), str(row["planned"]), bar, failed)
    console.print(table)
    if (more := len(summary["phases"]) - MOST_PHASES) > 0:
        console.print(f"and {more} more phases: --json lists all")
    left, speed = summary["seconds_left"], summary["tokens_per_second"]
    told = [
        f"{summary['done']} trials done, {summary['left']} left, {summary['failed']} failed",
        "" if speed is None else f"{speed:.0f} tokens/s",
        "" if left is None else f"about {_clock(left)} left (h:mm:ss)",
        "" if summary["finished"] is None else f"finished {summary['finished']}",
    ]
    console.print("; ".join(part for part in told if part))
    if summary["workers"] is not None:
        console.print(summary["workers"])


WIDE = 120
"""Columns from which on a table of verdicts is read at a glance; below, its cells break."""


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """The verdict table, and under it the reason for each; on a narrow terminal the reasons alone, with the verdict.
    Hypotheses that have one reason share it."""
    console = PlainConsole()
    is_wide = console.width >= WIDE
    if is_wide:
        table = Table(title="verdicts")
        for column in ("hypothesis", "verdict", "contrast", "readout", "estimate [interval]", "p adjusted", "n"):
            table.add_column(column, no_wrap=column in ("hypothesis", "verdict", "estimate [interval]"))
        for v in verdicts:
            interval = "" if v.ci_low is None or v.ci_high is None else f" [{number(v.ci_low)}, {number(v.ci_high)}]"
            estimate = "-" if v.estimate is None else f"{number(v.estimate)}{interval}"
            p = "-" if v.p_adjusted is None else p_value(v.p_adjusted)
            table.add_row(v.id, v.verdict, v.contrast, v.readout, estimate, p, str(v.n))
        console.print(table)
    reasons: dict[tuple[str, str], list[str]] = {}
    for v in verdicts:
        reasons.setdefault((v.verdict, v.because), []).append(v.id)
    for (verdict, because), ids in reasons.items():
        told = visible(because) if is_wide else f"{verdict}. {visible(because)}"
        console.print(styled(", ".join(ids), "bold") + f": {told}")


def print_power(entries: Sequence[Power]) -> None:
    """A row for every alpha of a hypothesis; hypotheses that have the same figures share their rows."""
    console = PlainConsole()
    table = Table(title="smallest effect (dz) seen with 80% / 90% power, and the pairs that the wanted one needs")
    for column in ("hypothesis", "test, n", "alpha", "smallest dz", "in its unit", "power at wanted dz", "pairs"):
        table.add_column(column, no_wrap=column in ("hypothesis", "smallest dz"))
    groups: dict[str, list[Power]] = {}
    for e in entries:
        groups.setdefault(e.model_dump_json(exclude={"id", "phase", "contrast", "readout", "family"}), []).append(e)
    for members in groups.values():
        first = members[0]
        names, test = "\n".join(e.id for e in members), f"{first.test}, {first.n}"
        if first.plain is None or first.worst is None:
            table.add_row(names, test, "-", "not simulated", "-", "-", "-")
            continue
        table.add_row(names, test, *_power_cells(first, first.plain))
        if first.family_size > 1:
            table.add_row("", "", *_power_cells(first, first.worst), style="dim")
    console.print(table)
    console.print(
        "First line, the headline: at the hypothesis' own alpha. Second line: at alpha over the size of its family,"
        " which Holm asks of one that passes alone. Of an equivalence test the figures are margins: the smallest that"
        " is certified where there is no effect. That what it waits for has passed is taken for granted."
    )
    notes: dict[str, list[str]] = {}
    for e in entries:
        for note in [*e.notes, *["true by construction of a full swap"] * e.is_tautological]:
            notes.setdefault(note, []).append(e.id)
    for note, ids in notes.items():
        console.print(styled(", ".join(ids), "bold") + f": {visible(note)}")


def _power_cells(entry: Power, at: PowerAt) -> list[str]:
    """Alpha, smallest dz, the same in its unit, power at the wanted dz, pairs for it."""
    if at.dz_80 is None or at.dz_90 is None:
        dz = f"needs {at.needs_pairs} pairs"
    else:
        dz = f"{at.dz_80:.2f} / {at.dz_90:.2f}"
    unit = "-" if at.unit_80 is None or at.unit_90 is None else f"{at.unit_80:.3g} / {at.unit_90:.3g}"
    pairs = " / ".join("-" if n is None else str(n) for n in (at.n_80, at.n_90))
    return [f"{at.alpha:.2g}", dz, unit, f"{at.power_at_wanted:.0%} at {entry.wanted_dz:.2g}", pairs]


def print_check(identities: Sequence[Identity]) -> None:
    """The identities with their measured errors."""
    table = Table()
    for column in ("identity", "holds", "error", "bound", "note"):
        table.add_column(column)
    for i in identities:
        word = {True: "yes", False: "NO", None: "does not apply"}[i.holds]
        table.add_row(i.identity, word, f"{i.error:.2g}", f"{i.bound:.2g}", i.note)
    PlainConsole().print(table)


def print_validation(validation: Validation) -> None:
    """A row a finding that failed, a count of those that hold for each organism, and the outcome in one line."""
    console = PlainConsole()
    table = Table(title=f"validation of kvpatch {validation.version}, {validation.scope}, seed {validation.seed}")
    for column in ("organism", "asked", "planted", "found", ""):
        table.add_column(column)
    for organism in dict.fromkeys(f.organism for f in validation.findings):
        own = [f for f in validation.findings if f.organism == organism]
        verdicts = [f for f in own if f.asked.startswith("verdict ")]
        for f in own:
            if f not in verdicts or not f.holds:
                table.add_row(organism, f.asked, f.planted, f.found, "holds" if f.holds else "FAILS")
        if verdicts:
            held = sum(f.holds for f in verdicts)
            table.add_row(organism, "verdicts", f"{len(verdicts)} known", f"{held} as known", "")
    console.print(table)
    failed = [f for f in validation.findings if not f.holds]
    outcome = "everything planted was recovered" if not failed else f"{len(failed)} not recovered"
    console.print(f"{outcome}: {len(validation.findings)} findings in {_clock(validation.seconds)} (h:mm:ss)")


def bank_summary(bank: Bank, body_length: Callable[[str], int], group: str | None) -> dict[str, Any]:
    """Prompts of a bank with their lengths in tokens."""
    prompts = bank.group(group) if group else bank.prompts
    return {
        "bank": bank.name,
        "sha256": bank.sha256,
        "groups": dict(Counter(p.group for p in prompts)),
        "continuations": dict(Counter(f"{c.mode}, {c.topic_of}'s topic" for c in bank.continuations)),
        "prompts": [
            {"id": p.id, "group": p.group, "topic": p.topic, "tokens": body_length(p.text), "text": p.text}
            for p in prompts
        ],
    }


def print_bank(summary: dict[str, Any]) -> None:
    """A row a prompt."""
    table = Table(title=f"bank {summary['bank']}: {summary['groups']}; continuations {summary['continuations']}")
    for column in ("id", "group", "topic", "tokens"):
        table.add_column(column)
    table.add_column("text", ratio=1)
    for p in summary["prompts"]:
        table.add_row(p["id"], p["group"], p["topic"], str(p["tokens"]), p["text"])
    PlainConsole().print(table)


def print_models(models: Sequence[dict[str, Any]], organisms: Sequence[str]) -> None:
    """A row a named model, and under the table the organisms, which need no fetching."""
    table = Table()
    table.add_column("name", no_wrap=True, min_width=max(len(m["name"]) for m in models))
    for column in ("about", "licence", "MB to fetch", "GB in bfloat16", "account", "here"):
        table.add_column(column)
    for m in models:
        licence = m["licence"] if m["terms"] is None else f"{m['licence']}\n{m['terms']}"
        account = "accept its terms" if m["gated"] else "none"
        layers = "".join(f"; {name} layer {layer}" for name, layer in m["layers"].items())
        memory = "" if m["memory_gb"] is None else str(m["memory_gb"])
        is_here = "yes" if m["pulled"] else "no"
        table.add_row(m["name"], m["about"] + layers, licence, str(m["megabytes"]), memory, account, is_here)
    console = PlainConsole()
    console.print(table)
    console.print(f"small models with planted truth (kvpatch validate): {', '.join(organisms)}")
