"""Protocol and trials in, verdicts out: measure, correct, decide each after what it waits for.

Order of the rules: tautological; gate 0 (instrument); prerequisites or earlier gates; coherence; specificity; then the
numbers (`rules.decide`), which must hold whatever missing rows were (`worst_case`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.statistics.clustering import Clustered
from kvpatch.store.readout_calibration import ReadoutCalibration
from kvpatch.verdicts.deviations import beside_verdicts
from kvpatch.verdicts.families import adjusted_by_family
from kvpatch.verdicts.headline import headline
from kvpatch.verdicts.measure import Measured, measure, units_of
from kvpatch.verdicts.pairs import prepare, rows_of
from kvpatch.verdicts.prerequisites import (
    COHERENT_SHARE,
    Coherence,
    coherence_shares,
    decision_order,
    failed_gatekeeper,
    gatekeepers,
    incoherent_conditions,
    missing,
)
from kvpatch.verdicts.records import Verdict, verdicts_json
from kvpatch.verdicts.rules import Decision, decide
from kvpatch.verdicts.sensitivity import Sensitivity, by_domain, sensitivity
from kvpatch.verdicts.specificity import unspecific
from kvpatch.verdicts.texts import Texts, texts_of
from kvpatch.verdicts.wording import figures, percent, tautology, text_contrast
from kvpatch.verdicts.worst_case import decided_at_worst, lacking

__all__ = ["Verdict", "headline", "verdicts", "verdicts_json"]

Shares = Mapping[tuple[str, str], Coherence]
ASKED = {
    "id", "claim", "phase", "contrast", "readout", "transform", "test", "family", "gate", "criterion", "confirmatory",
    "alpha",
}  # fmt: skip
"""What a verdict repeats of its hypothesis."""
BROKEN = "Gate 0 did not pass: the check that this model is patched correctly failed, so no number can be read."


def verdicts(
    protocol: Protocol,
    trials: pd.DataFrame,
    *,
    instrument_ok: bool | None = None,
    calibrations: Mapping[str | None, ReadoutCalibration] | None = None,
) -> list[Verdict]:
    """Decide every hypothesis of a protocol, in the protocol's order.

    trials: one row per trial, with the columns of `store.columns.TRIAL_COLUMNS`; any order of the rows gives the same
    verdicts. instrument_ok: whether the model's check passed; None if unknown, which blocks
    nothing. calibrations: model's key -> how far destroyed caches move its readouts; a model without one is not held
    to it.

    Raises:
        StoreError: if a column is missing.
    """
    rows = prepare(trials)
    shares, texts = coherence_shares(rows), texts_of(protocol, rows)
    phases = {
        name: rows_of(rows, split="test", phase=name) for name in dict.fromkeys(h.phase for h in protocol.hypotheses)
    }
    units = {name: units_of(protocol, part) for name, part in phases.items()}
    measured = {h.id: measure(protocol, rows, h, units[h.phase]) for h in protocol.hypotheses}
    families = {h.id: h.family for h in protocol.hypotheses}
    p_values = {name: m.p for name, m in measured.items()}
    adjusted = adjusted_by_family(p_values, families, protocol.corrections)
    decided: dict[str, Decision] = {}
    for h in decision_order(protocol):
        blocked = _blocked(h, measured[h.id], instrument_ok, shares, texts, decided)
        because = None if blocked else unspecific(protocol, h, calibrations or {})
        if because is not None:
            blocked = Decision("not interpretable", because, "specificity")
        first = None if h.of is None else measured[h.of]
        found = blocked or decide(measured[h.id], adjusted[h.id], first)
        lacks = {} if blocked else lacking(protocol, phases[h.phase], measured[h.id])
        if lacks:

            def again(m: Measured, first: Measured | None = first) -> Decision:
                name = m.hypothesis.id
                p = adjusted_by_family({**p_values, name: m.p}, families, protocol.corrections)[name]
                return decide(m, p, first)

            found = decided_at_worst(protocol, rows, measured[h.id], units[h.phase], lacks, found, again)
        decided[h.id] = found
    found = [
        _record(
            measured[h.id],
            adjusted[h.id],
            decided,
            texts,
            _shares_of(h, shares),
            sensitivity(phases[h.phase], h, measured[h.id].differences),
            by_domain(phases[h.phase], h),
        )
        for h in protocol.hypotheses
    ]
    return beside_verdicts(protocol, found)


def _blocked(
    h: Hypothesis,
    m: Measured,
    instrument_ok: bool | None,
    shares: Shares,
    texts: Texts,
    decided: Mapping[str, Decision],
) -> Decision | None:
    """The verdict of a hypothesis that may not be interpreted, or None."""
    if texts.is_tautological(h):
        also = f" {BROKEN}" if instrument_ok is False else ""
        return Decision("tautological", tautology(texts, m) + also)
    if instrument_ok is False:
        return Decision("not interpretable", BROKEN, "instrument")
    waits = _behind_a_gate(h, texts.protocol, decided) if h.needs is None else _lacks(h, m, texts.protocol, decided)
    if waits is not None:
        return waits
    weak = incoherent_conditions(h, shares)
    if weak:
        told = " and ".join(f"{percent(share)} of the outputs of {name}" for name, share in weak.items())
        because = f"Only {told} are coherent in phase {h.phase}, where at least {COHERENT_SHARE:.0%} are needed."
        return Decision("not interpretable", because, "coherence")
    return None


def _words(decided: Mapping[str, Decision]) -> dict[str, str]:
    return {name: decision.word for name, decision in decided.items()}


def _behind_a_gate(h: Hypothesis, protocol: Protocol, decided: Mapping[str, Decision]) -> Decision | None:
    keeper = failed_gatekeeper(gatekeepers(protocol), _words(decided), h.gate)
    if keeper is None:
        return None
    found = decided[keeper.id]
    because = f"Gate {keeper.gate} did not pass: {keeper.id} is {found.word} ({found.because.rstrip('.')})."
    return Decision("not interpretable", because, "gate")


def _lacks(h: Hypothesis, m: Measured, protocol: Protocol, decided: Mapping[str, Decision]) -> Decision | None:
    """The verdict of a hypothesis of which a prerequisite did not pass, with its numbers all the same; else None."""
    words, told = _words(decided), []
    for name in missing(h, words):
        found = decided[name]
        beneath = ", ".join(missing(protocol.hypothesis(name), words))
        why = f"for want of {beneath}" if found.blocked_by == "prerequisite" else f"({found.because.rstrip('.')})"
        told.append(f"{name} is {found.word} {why}")
    if not told:
        return None
    measured = figures(m) if m.differences.n else f"No pair was measured for {h.contrast}"
    because = f"{measured}; that is not interpreted, since {' and '.join(told)}."
    return Decision("not interpretable", because, "prerequisite")


def _shares_of(h: Hypothesis, shares: Shares) -> dict[str, float | None]:
    found = {name: shares.get((h.phase, name)) for name in h.conditions}
    return {name: None if of is None else _known(of.share) for name, of in found.items()}


def _known(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _record(
    m: Measured,
    p_adjusted: float,
    decided: Mapping[str, Decision],
    texts: Texts,
    shares: dict[str, float | None],
    beside: Sensitivity,
    clustered: Clustered | None,
) -> Verdict:
    h, found, ratio = m.hypothesis, m.differences, m.transfer
    decision = decided[h.id]
    told = "" if decision.word == "tautological" else text_contrast(texts, h)
    return Verdict(
        **h.model_dump(include=ASKED),
        n=found.n,
        n_pairs=found.n_pairs,
        n_dropped=found.n_dropped,
        n_error_rows=found.n_error_rows,
        estimate=_known(m.estimate),
        ci_low=_known(m.interval.low),
        ci_high=_known(m.interval.high),
        ci_level=m.interval.level,
        effect_size=_known(m.dz),
        rank_biserial=_known(m.rank_biserial),
        bayes_factor=_known(m.bayes_factor),
        p=_known(m.p),
        p_adjusted=_known(p_adjusted),
        p_margin=_known(m.p_margin),
        margin=m.margin.value,
        transfer_fraction=ratio.value if ratio else None,
        transfer_fraction_low=ratio.low if ratio else None,
        transfer_fraction_high=ratio.high if ratio else None,
        transfer_fraction_note=ratio.reason if ratio else None,
        se_clustered=clustered.se if clustered else None,
        p_clustered=clustered.p if clustered else None,
        clusters={"sources": clustered.sources, "targets": clustered.targets} if clustered else None,
        coherence=shares,
        sensitivity=beside,
        verdict=decision.word,
        blocked_by=decision.blocked_by,
        needs=h.needs or [],
        missing=missing(h, _words(decided)),
        because=decision.because + told,
        evidence=texts.evidence(h),
        evidence_from=texts.decided_from,
    )
