"""The whole rule: from the numbers of every hypothesis to the decision on each, after what it waits for.

Order: tautological; gate 0 (instrument); prerequisites or earlier gates; coherence; specificity; then the numbers
(`rules.decide`), held against alpha as families share it and pass it on. The simulation of the rule calls this too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.store.readout_calibration import ReadoutCalibration
from kvpatch.verdicts.families import adjusted_in
from kvpatch.verdicts.measure import Measured
from kvpatch.verdicts.prerequisites import (
    COHERENT_SHARE,
    MOSTLY,
    Coherence,
    are_equally_coherent,
    coherence_read,
    decision_order,
    failed_gatekeeper,
    gatekeepers,
    incoherent_conditions,
    missing,
)
from kvpatch.verdicts.rules import Decision, decide, shown_absent
from kvpatch.verdicts.specificity import unspecific
from kvpatch.verdicts.texts import Texts
from kvpatch.verdicts.wording import figures, percent, tautology

Again = Callable[[Measured], Decision]
AtWorst = Callable[[Hypothesis, Decision, Again], Decision]
BROKEN = "Gate 0 did not pass: the check that this model is patched correctly failed, so no number can be read."


@dataclass(frozen=True)
class Circumstances:
    """What beside its own numbers decides whether a hypothesis may be read.

    texts: what the conditions equal. shares: (phase, condition) -> how many outputs are coherent. instrument_ok:
    whether the model's check passed; None if unknown, which blocks nothing. calibrations: model's key -> how far
    destroyed caches move its readouts. explained: hypothesis -> share of the natural gap that unequal damage could
    explain in it, where that is known.
    """

    texts: Texts
    shares: Mapping[tuple[str, str], Coherence] = field(default_factory=dict)
    instrument_ok: bool | None = None
    calibrations: Mapping[str | None, ReadoutCalibration] = field(default_factory=dict)
    explained: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decided:
    """adjusted: hypothesis -> p after correction, to be held against its alpha. decisions: hypothesis -> what was
    decided."""

    adjusted: dict[str, float]
    decisions: dict[str, Decision]


def decide_all(
    protocol: Protocol,
    measured: Mapping[str, Measured],
    around: Circumstances,
    at_worst: AtWorst | None = None,
) -> Decided:
    """Decide every hypothesis of a protocol.

    measured: hypothesis -> its numbers. at_worst: asked of each one that may be read, with what was decided and how it
    would be from other numbers; where rows are missing it may decide otherwise.
    """
    p_values = {name: m.p for name, m in measured.items()}
    adjusted = adjusted_in(protocol, p_values)
    decided: dict[str, Decision] = {}
    for h in decision_order(protocol):
        m = measured[h.id]
        weak = _incoherent(h, around)
        blocked = _blocked(h, m, around, decided, weak)
        if blocked is None:
            because = unspecific(protocol, h, around.calibrations, around.explained)
            blocked = None if because is None else Decision("not interpretable", because, "specificity")
        first = None if h.of is None else measured[h.of]
        found = blocked or _by_numbers(protocol, m, adjusted[h.id], first)
        if blocked is None and at_worst is not None:

            def again(other: Measured, first: Measured | None = first) -> Decision:
                name = other.hypothesis.id
                p = adjusted_in(protocol, {**p_values, name: other.p})[name]
                return _by_numbers(protocol, other, p, first)

            found = at_worst(h, found, again)
        if blocked is None and weak:
            note = f"Only {_told(weak)} are coherent, but about equally many under each condition."
            found = replace(found, because=f"{found.because} {note}")
        decided[h.id] = _with_figures(m, found) if protocol.families else found
    return Decided(adjusted, decided)


def _by_numbers(protocol: Protocol, m: Measured, p_adjusted: float, first: Measured | None) -> Decision:
    """The rules of tests. A protocol with `families` says "contradicted" of what the data speak against, an absence of
    what should be repeated among it, and names the bound that it lacks; others keep the words of before."""
    found = decide(m, p_adjusted, first)
    if not protocol.families:
        return found
    if found.word == "inconclusive" and first is not None:
        found = shown_absent(m, first) or found
    if found.word == "not supported":
        return replace(found, word="contradicted")
    if found.word == "inconclusive" and m.no_small and not m.kind.certifies_absence and m.differences.n:
        told = f"{found.because} No bound says when such an effect counts as none: {m.no_small}."
        return replace(found, because=told)
    return found


def _with_figures(m: Measured, found: Decision) -> Decision:
    """What can't be read tells its estimate, interval and n all the same."""
    if found.blocked_by in (None, "prerequisite", "gate"):
        return found
    return replace(found, because=f"{_measured(m)}; that is not interpreted. {found.because}")


def _measured(m: Measured) -> str:
    return figures(m) if m.differences.n else f"No pair was measured for {m.hypothesis.contrast}"


def _blocked(
    h: Hypothesis, m: Measured, around: Circumstances, decided: Mapping[str, Decision], weak: Mapping[str, float]
) -> Decision | None:
    """The verdict of a hypothesis that may not be interpreted, or None. weak: its incoherent conditions."""
    texts = around.texts
    if texts.is_tautological(h):
        also = f" {BROKEN}" if around.instrument_ok is False else ""
        return Decision("tautological", tautology(texts, m) + also)
    if around.instrument_ok is False:
        return Decision("not interpretable", BROKEN, "instrument")
    waits = _behind_a_gate(h, texts.protocol, decided) if h.needs is None else _lacks(h, m, texts.protocol, decided)
    if waits is not None:
        return waits
    if weak and not _is_equally_coherent(h, around):
        or_alike = f", or {MOSTLY:.0%} and about equally many under each condition" if texts.protocol.families else ""
        needed = f"where at least {COHERENT_SHARE:.0%} are needed{or_alike}"
        return Decision(
            "not interpretable", f"Only {_told(weak)} are coherent in phase {h.phase}, {needed}.", "coherence"
        )
    return None


def _incoherent(h: Hypothesis, around: Circumstances) -> dict[str, float]:
    """Condition -> share, for those too incoherent to be read. In a protocol with `families` a condition that equals a
    natural run is none of them: nothing was patched in it, so that what the model writes there is what it writes."""
    weak, texts = incoherent_conditions(h, around.shares), around.texts
    if not texts.protocol.families:
        return weak
    return {name: share for name, share in weak.items() if texts.role(h.phase, name) is None}


def _is_equally_coherent(h: Hypothesis, around: Circumstances) -> bool:
    """Whether a contrast can be read though its outputs are not coherent enough. Only of protocols with `families`;
    others are decided as they always were."""
    return bool(around.texts.protocol.families) and are_equally_coherent(coherence_read(h, around.shares).values())


def _told(weak: Mapping[str, float]) -> str:
    return " and ".join(f"{percent(share)} of the outputs of {name}" for name, share in weak.items())


def words_of(decided: Mapping[str, Decision]) -> dict[str, str]:
    """Hypothesis -> its verdict's word."""
    return {name: decision.word for name, decision in decided.items()}


def _behind_a_gate(h: Hypothesis, protocol: Protocol, decided: Mapping[str, Decision]) -> Decision | None:
    keeper = failed_gatekeeper(gatekeepers(protocol), words_of(decided), h.gate)
    if keeper is None:
        return None
    found = decided[keeper.id]
    because = f"Gate {keeper.gate} did not pass: {keeper.id} is {found.word} ({found.because.rstrip('.')})."
    return Decision("not interpretable", because, "gate")


def _lacks(h: Hypothesis, m: Measured, protocol: Protocol, decided: Mapping[str, Decision]) -> Decision | None:
    """The verdict of a hypothesis of which a prerequisite did not pass, with its numbers all the same; else None."""
    words, told = words_of(decided), []
    for name in missing(h, words):
        found = decided[name]
        beneath = ", ".join(missing(protocol.hypothesis(name), words))
        why = f"for want of {beneath}" if found.blocked_by == "prerequisite" else f"({found.because.rstrip('.')})"
        told.append(f"{name} is {found.word} {why}")
    if not told:
        return None
    because = f"{_measured(m)}; that is not interpreted, since {' and '.join(told)}."
    return Decision("not interpretable", because, "prerequisite")
