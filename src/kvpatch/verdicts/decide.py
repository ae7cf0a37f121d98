"""Protocol and trials in, verdicts out: measure every hypothesis, decide all (`rule`), which must hold whatever missing
rows were (`worst_case`), and record each."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.statistics.clustering import Clustered
from kvpatch.store.readout_calibration import ReadoutCalibration
from kvpatch.verdicts.deviations import beside_verdicts
from kvpatch.verdicts.headline import headline
from kvpatch.verdicts.measure import Measured, measure, units_of
from kvpatch.verdicts.missing import partial_conditions
from kvpatch.verdicts.pairs import prepare, rows_of
from kvpatch.verdicts.prerequisites import Coherence, coherence_shares, missing
from kvpatch.verdicts.records import Verdict, verdicts_json
from kvpatch.verdicts.rule import Again, Circumstances, Decided, decide_all, words_of
from kvpatch.verdicts.rules import Decision
from kvpatch.verdicts.sensitivity import Sensitivity, by_domain, sensitivity
from kvpatch.verdicts.specificity import explained_shares
from kvpatch.verdicts.texts import Texts, texts_of
from kvpatch.verdicts.wording import text_contrast
from kvpatch.verdicts.worst_case import decided_at_worst, lacking, planned_pairs

__all__ = ["Verdict", "headline", "verdicts", "verdicts_json"]

ASKED = {
    "id", "claim", "phase", "contrast", "readout", "transform", "test", "family", "gate", "criterion", "confirmatory",
    "alpha",
}  # fmt: skip
"""What a verdict repeats of its hypothesis."""


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
    calibrations = calibrations or {}
    explained = explained_shares(protocol, rows, calibrations, units)
    around = Circumstances(texts, shares, instrument_ok, calibrations, explained)

    def at_worst(h: Hypothesis, found: Decision, again: Again) -> Decision:
        m = measured[h.id]
        lacks = lacking(protocol, phases[h.phase], m)
        return decided_at_worst(protocol, rows, m, units[h.phase], lacks, found, again) if lacks else found

    decided = decide_all(protocol, measured, around, at_worst)
    found = [
        _record(
            measured[h.id],
            decided,
            texts,
            _dropped(protocol, h, measured[h.id], phases[h.phase]),
            _shares_of(h, shares),
            sensitivity(phases[h.phase], h, measured[h.id].differences),
            by_domain(phases[h.phase], h),
        )
        for h in protocol.hypotheses
    ]
    return beside_verdicts(protocol, found)


def _shares_of(h: Hypothesis, shares: Mapping[tuple[str, str], Coherence]) -> dict[str, float | None]:
    found = {name: shares.get((h.phase, name)) for name in h.conditions}
    return {name: None if of is None else _known(of.share) for name, of in found.items()}


def _dropped(protocol: Protocol, h: Hypothesis, m: Measured, rows: pd.DataFrame) -> int:
    """Pairs left out. In a protocol with families a pair that has no row of the contrast at all counts, where every
    condition of it is planned for every pair."""
    if set(h.conditions) & partial_conditions(protocol):
        return m.differences.n_dropped
    return max(m.differences.n_dropped, len(planned_pairs(protocol, rows)) - m.differences.n_pairs)


def _known(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _record(
    m: Measured,
    decided: Decided,
    texts: Texts,
    dropped: int,
    shares: dict[str, float | None],
    beside: Sensitivity,
    clustered: Clustered | None,
) -> Verdict:
    h, found, ratio = m.hypothesis, m.differences, m.transfer
    decision, lacks = decided.decisions[h.id], missing(h, words_of(decided.decisions))
    told = "" if decision.word == "tautological" else text_contrast(texts, h)
    return Verdict(
        **h.model_dump(include=ASKED),
        expected=texts.protocol.expected_of(h),
        n=found.n,
        n_pairs=found.n_pairs,
        n_dropped=dropped,
        n_error_rows=found.n_error_rows,
        estimate=_known(m.estimate),
        ci_low=_known(m.interval.low),
        ci_high=_known(m.interval.high),
        ci_level=m.interval.level,
        effect_size=_known(m.dz),
        rank_biserial=_known(m.rank_biserial),
        bayes_factor=_known(m.bayes_factor),
        p=_known(m.p),
        p_adjusted=_known(decided.adjusted[h.id]),
        p_margin=_known(m.p_margin),
        margin=m.margin.value if h.margin or not texts.protocol.families else _known(m.small),
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
        missing=lacks[0] if lacks else None,
        because=decision.because + told,
        evidence=texts.evidence(h),
        evidence_from=texts.decided_from,
    )
