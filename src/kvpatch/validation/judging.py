"""Hold what the pipeline said against what was planted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy import stats

from kvpatch.protocols.conditions import NATURAL_SOURCE, NATURAL_TARGET, Condition
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.readouts import SCORE, readouts
from kvpatch.store.validation import Finding
from kvpatch.validation.jobs import Reading
from kvpatch.validation.recovery import Found
from kvpatch.verdicts.decide import Verdict
from kvpatch.verdicts.margins import SMALL_SHARE, calibration_rows, natural_gap
from kvpatch.verdicts.pairs import contrast_differences, prepare, rows_of
from kvpatch.verdicts.power import power
from kvpatch.verdicts.prerequisites import all_needed, coherence_shares
from kvpatch.verdicts.specificity import LIMIT as SPECIFIC

SIMULATION_ERROR = 0.01
"""A rate is off its nominal value where chance alone would take it so far in one of a hundred validations."""
NOMINAL = 0.05
ROUNDING = 0.005
"""Share of the natural gap that a transfer fraction may miss its truth by: an organism's own imperfection."""
POWER_TEST = "mode_exists_score"
BLOCKED = ("not interpretable", "tautological")


@dataclass(frozen=True)
class OverAll:
    """Findings that rest on many runs, and the figures behind them."""

    findings: list[Finding]
    figures: dict[str, Any]


def expected_verdicts(protocol: Protocol, organism: str) -> dict[str, str]:
    """Hypothesis -> the verdict, or the verdicts joined by "or", that an organism must get."""
    return {name: words for words, names in protocol.expected.get(organism, {}).items() for name in names}


def phases_to_run(protocol: Protocol, expected: Mapping[str, str]) -> list[str]:
    """Phases that an expected verdict, or what it needs, is read from; and phase 1, where the mode is asked for."""
    asked = [name for name, words in expected.items() if words not in BLOCKED]
    needed = {protocol.hypothesis(name).phase for name in [*asked, *all_needed(protocol.hypotheses, asked)]}
    return [name for name in protocol.phases if name in needed | {"1"}]


def verdict_findings(
    organism: str, decided: Sequence[Verdict], expected: Mapping[str, str], protocol: Protocol, rows: pd.DataFrame
) -> list[Finding]:
    """One finding an expected verdict. "slight" is a verdict of "supported" whose whole interval lies within
    `SMALL_SHARE` of the natural gap of the calibration pairs.

    rows: the stored trials.
    """
    by_id = {v.id: v for v in decided}
    trials = prepare(rows)
    out = []
    for name, words in expected.items():
        verdict = by_id[name]
        found = "slight" if _is_slight(verdict, protocol, trials) else verdict.verdict
        holds = found in words.split(" or ")
        told = found if holds else f"{verdict.verdict} ({verdict.because})"
        out.append(Finding(organism=organism, asked=f"verdict {name}", planted=words, found=told, holds=holds))
    return out


def _is_slight(verdict: Verdict, protocol: Protocol, trials: pd.DataFrame) -> bool:
    """Whether an effect, over all steps of its contrast, was found and is small. trials: prepared rows."""
    if verdict.verdict != "supported" or verdict.ci_high is None:
        return False
    transform = protocol.hypothesis(verdict.id).transform
    gap = natural_gap(calibration_rows(protocol, trials, verdict.phase), verdict.readout, transform).value
    steps = max(1, verdict.contrast.count("<"))
    return gap is not None and steps * verdict.ci_high < SMALL_SHARE * gap


_PLURAL = {"layer": "layers", "head": "KV heads", "slot": "slots of the body", "part": "parts"}


def place_finding(organism: str, kind: str, truth: Sequence[int | str], found: Found, how: str) -> Finding:
    """Whether the places that were found to carry the mode are those that do."""
    carriers = found.carriers(kind)
    asked = _PLURAL[kind] if how == "locate" else f"{_PLURAL[kind]} of a drawn wiring"
    return Finding(
        organism=organism,
        asked=asked,
        planted=_listed(truth),
        found=_listed(carriers),
        holds=set(carriers) == set(truth),
    )


def impostor_findings(organism: str, own: pd.DataFrame, real: pd.DataFrame) -> list[Finding]:
    """One finding per readout of the mode: its natural gap in an impostor, as a share of that of a real mode.

    own, real: stored trials of the natural runs of the same pairs.
    """
    out = []
    for name, readout in readouts().items():
        if not readout.may_be_evidence or name not in own or own[name].isna().all():
            continue
        gap, gap_of_real = (
            contrast_differences(
                rows_of(prepare(rows), split="test"), {NATURAL_SOURCE: 1, NATURAL_TARGET: -1}, name, readout.transform
            ).values.mean()
            for rows in (own, real)
        )
        is_real = bool(gap_of_real > 0)
        found = f"{gap / gap_of_real:.2f}" if is_real else "nothing to be a share of: the real mode has no gap"
        holds = is_real and bool(gap <= SPECIFIC * gap_of_real)
        planted = f"no mode: at most {SPECIFIC} of the gap of a real one"
        out.append(Finding(organism=organism, asked=f"{name}, B - A", planted=planted, found=found, holds=holds))
    return out


def _listed(places: Sequence[int | str]) -> str:
    return ", ".join(str(place) for place in places) or "none"


def merged(findings: Sequence[Finding]) -> list[Finding]:
    """One line for what several seeds were asked; a seed that failed is told, and how many there were."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.organism, finding.asked), []).append(finding)
    return [_of_seeds(group) for group in groups.values()]


def _of_seeds(group: Sequence[Finding]) -> Finding:
    first = next((f for f in group if not f.holds), group[0])
    if len(group) == 1:
        return first
    held = sum(f.holds for f in group)
    same = len({f.planted for f in group}) == 1
    planted = first.planted if same or not first.holds else f"{len(group)} different ones"
    found = f"recovered in {held} of {len(group)}" + ("" if first.holds else f"; once {first.found}")
    return first.model_copy(update={"planted": planted, "found": found})


def coherence_alarms(protocol: Protocol, rows: pd.DataFrame) -> tuple[int, int]:
    """Of the conditions made of whole caches, which are fluent: how many the coherence gate stopped, of how many."""
    shares = coherence_shares(prepare(rows))
    fluent = [name for name, c in protocol.conditions.items() if _is_fluent(c)]
    found = [outputs.is_too_low for (_, name), outputs in shares.items() if name in fluent]
    return sum(found), len(found)


def _is_fluent(condition: Condition) -> bool:
    return condition.change is not None and condition.change.keeps_text_whole


def over_all(readings: Sequence[Reading], protocol: Protocol) -> OverAll:
    """Coverage of intervals, false positives on null, and power on weak."""
    readings = [r for r in readings if r.figures]
    parts = [
        _coverage([r for r in readings if r.job.kind in ("locate", "draw")]),
        _false_positives([r.figures for r in readings if r.job.kind == "null"]),
        _power([r.figures for r in readings if r.job.kind == "weak"], protocol),
        OverAll([], _alarms([r.figures["coherence"] for r in readings if r.job.kind == "verdicts"])),
    ]
    return OverAll(
        [finding for part in parts for finding in part.findings],
        {key: value for part in parts for key, value in part.figures.items()},
    )


def _alarms(counts: Sequence[tuple[int, int]]) -> dict[str, Any]:
    if not counts:
        return {}
    stopped, total = (sum(pair[i] for pair in counts) for i in (0, 1))
    return {"fluent_conditions_the_coherence_gate_stopped": {"stopped": stopped, "conditions": total}}


def _coverage(readings: Sequence[Reading]) -> OverAll:
    """Whether intervals of transfer fractions cover 1 on the plant and 0 off it, as often as they should."""
    rows = [
        {"organism": r.job.organism, "truth": p["truth"], "covers": _covers(p)}
        for r in readings
        for p in r.figures["places"]
    ]
    if not rows:
        return OverAll([], {})
    table = pd.DataFrame(rows)
    out, figures = [], {}
    for truth, where in ((1.0, "on the plant"), (0.0, "off the plant")):
        part = table[table["truth"] == truth]["covers"]
        covered, total = int(part.sum()), len(part)
        least = int(stats.binom.ppf(SIMULATION_ERROR, total, 1 - NOMINAL))
        figures[where] = {"covered": covered, "intervals": total}
        out.append(
            Finding(
                organism="all",
                asked=f"transfer fraction {where}",
                planted=f"{truth:g}, within 95% of the intervals",
                found=f"within {covered} of {total} ({covered / total:.1%})",
                holds=covered >= least,
            )
        )
    return OverAll(out, {"coverage": figures})


def _covers(place: Mapping[str, Any]) -> bool:
    low, high = place["low"], place["high"]
    return low is not None and low - ROUNDING <= place["truth"] <= high + ROUNDING


def _false_positives(runs: Sequence[Mapping[str, Any]]) -> OverAll:
    """How often a run on null is given a mode; and how often each test alone would have given one at 5%."""
    if not runs:
        return OverAll([], {})
    most = int(stats.binom.ppf(1 - SIMULATION_ERROR, len(runs), NOMINAL))
    given = sum(any(entry["verdict"] == "supported" for entry in run.values()) for run in runs)
    alone = {name: sum(run[name]["p"] is not None and run[name]["p"] < NOMINAL for run in runs) for name in runs[0]}
    findings = [
        Finding(
            organism="null",
            asked="runs with a supported mode verdict",
            planted="at most 5%",
            found=f"{given} of {len(runs)}",
            holds=given <= most,
        )
    ]
    findings += [
        Finding(
            organism="null",
            asked=f"p < .05 of {name} by itself",
            planted="5%",
            found=f"{count} of {len(runs)}",
            holds=count <= most,
        )
        for name, count in alone.items()
    ]
    return OverAll(findings, {"false_positives": {"runs": len(runs), "supported": given, "p_below_05": alone}})


def _power(runs: Sequence[Mapping[str, Any]], protocol: Protocol) -> OverAll:
    """How often the effect of weak is seen, against what `kvpatch power` says of an effect of that size."""
    if not runs:
        return OverAll([], {})
    rows = pd.concat([run["rows"] for run in runs], ignore_index=True)
    test = rows[rows["split"] == "test"].pivot(index="pair_id", columns="condition", values=SCORE)
    differences = (test["B"] - test["A"]).to_numpy(dtype=float)
    dz = float(differences.mean() / max(differences.std(ddof=1), 1e-9))
    if not dz > 0:
        none = Finding(organism="weak", asked="power", planted="an effect", found=f"dz {dz:.2f}", holds=False)
        return OverAll([none], {})
    # The effect itself is known to within its standard error over all pairs that were run.
    error = math.sqrt((1 + dz**2 / 2) / len(differences))
    predicted, low, high = (
        _predicted(protocol, rows, runs[0]["n"], wanted) for wanted in (dz, max(dz - 2 * error, 1e-3), dz + 2 * error)
    )
    seen, total = sum(run["verdict"] == "supported" for run in runs), len(runs)
    least = int(stats.binom.ppf(SIMULATION_ERROR, total, low))
    most = int(stats.binom.ppf(1 - SIMULATION_ERROR, total, high))
    finding = Finding(
        organism="weak",
        asked=f"power at dz {dz:.2f}, n = {runs[0]['n']}, alpha .001",
        planted=f"{predicted:.0%} by kvpatch power",
        found=f"{seen} of {total} runs ({seen / total:.0%})",
        holds=least <= seen <= most,
    )
    figures = {"dz": dz, "n": runs[0]["n"], "predicted": predicted, "seen": seen, "runs": total}
    return OverAll([finding], {"power": figures})


def _predicted(protocol: Protocol, pilot: pd.DataFrame, n: int, dz: float) -> float:
    """What `kvpatch power` says of the weak organism's test; its family is that of phase 1's manipulation check."""
    asked = [h for h in protocol.hypotheses if h.family == protocol.hypothesis(POWER_TEST).family]
    update = {"hypotheses": asked, "expected": {}, "corrections": {}, "families": {}}
    found = power(protocol.model_copy(update=update), n=n, wanted_dz=dz, pilot=pilot)
    plain = next(entry.plain for entry in found if entry.id == POWER_TEST)
    return 0.0 if plain is None else plain.power_at_wanted
