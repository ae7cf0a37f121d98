"""What the strongest sentence may rest on, and what forbids it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvpatch.protocols.conditions import NATURAL_SOURCE, NATURAL_TARGET
from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.readouts import readouts
from kvpatch.specs.test_kinds import AGAINST, kind_named
from kvpatch.verdicts.missing import MOST_MISSING
from kvpatch.verdicts.places import place_of
from kvpatch.verdicts.prerequisites import PASSED, all_needed, coherence_of
from kvpatch.verdicts.records import Verdict
from kvpatch.verdicts.wording import percent

LEAST_PAIRS = 10
"""Fewest pairs that the strongest sentence may rest on: the smallest n of the plan's own experiments."""
LIKE_THE_SOURCE = "foreign_matched"
"""The role of foreign prompts that are like the source in person and speech act."""


@dataclass(frozen=True)
class Strongest:
    """rests_on: primary verdicts that carry the claim, empty where the strongest sentence may not be said. moved:
    those that show that the mode moves with the cache, though outputs may not be read. lacks: why the sentence may not
    be said, as the end of one; "" where it may be, or where nothing that passed could carry it."""

    rests_on: list[Verdict]
    moved: list[Verdict]
    lacks: str = ""


def strongest(protocol: Protocol, primary: Sequence[Verdict], verdict_of: Mapping[str, Verdict]) -> Strongest:
    """What the strongest sentence rests on.

    primary: every primary verdict, those that could not be read too. A protocol with `families` reads each readout by
    itself: all that is primary in a readout must have passed, since a source that merely addresses the reader passes
    against one foreign prompt and not against one like it. Nothing primary may be contradicted, or unread for what the
    outputs or the rows were. A protocol without families asks that all that could be read passed.
    """
    if protocol.families:
        whole = [r for r in dict.fromkeys(v.readout for v in primary) if _all_passed(primary, r)]
        able = [v for v in primary if v.readout in whole]
    else:
        read = [v for v in primary if v.blocked_by is None]
        able = read if all(v.verdict in PASSED for v in read) else []
    carrying = [v for v in able if _is_directional_on_the_mode(v)]
    short = {v.id: _lack(protocol, v, verdict_of) for v in carrying}
    moved = [v for v in carrying if not short[v.id]]
    unclear = {v.id: _incoherent(v) for v in moved}
    rests_on = [v for v in moved if not unclear[v.id]]
    against = [v for v in primary if _forbids(protocol, v)]
    if against:
        return Strongest([], moved, "; ".join(f"{v.id}: {v.verdict}" for v in against))
    lacks = [] if rests_on else [lack for lack in (*short.values(), *unclear.values()) if lack]
    return Strongest(rests_on, moved, "; ".join(dict.fromkeys(lacks)))


def _all_passed(primary: Sequence[Verdict], readout: str) -> bool:
    return all(v.verdict in PASSED for v in primary if v.readout == readout)


def _forbids(protocol: Protocol, v: Verdict) -> bool:
    """Whether a primary verdict that did not pass forbids the sentence, whatever the others say: the data speak against
    it, the outputs or rows can't be read, or it is the comparison with prompts like the source."""
    if not protocol.families or v.verdict in PASSED:
        return False
    if v.verdict in AGAINST or v.blocked_by in ("coherence", "missing", "specificity", "instrument"):
        return True
    return any(protocol.conditions[name].giver == LIKE_THE_SOURCE for name in protocol.hypothesis(v.id).conditions)


def _is_directional_on_the_mode(v: Verdict) -> bool:
    """Never an equivalence, nor a readout that is none of the mode, such as length."""
    readout = readouts().get(v.readout)
    return kind_named(v.test).claims == "beyond" and readout is not None and readout.may_be_evidence


def _lack(protocol: Protocol, v: Verdict, verdict_of: Mapping[str, Verdict]) -> str:
    """Why a directional verdict on the mode that passed can't carry the strongest sentence; "" where it can."""
    if v.evidence == "text":
        return "it compares texts"
    if v.n < LEAST_PAIRS:
        return f"at least {LEAST_PAIRS} pairs, and there are {v.n}"
    if v.n_dropped > MOST_MISSING * (v.n_pairs + v.n_dropped):
        return f"{percent(v.n_dropped / (v.n_pairs + v.n_dropped))} of its pairs lack a value"
    if not _mode_is_shown(protocol, v, verdict_of):
        return "that the mode exists was not shown"
    return ""


def _incoherent(v: Verdict) -> str:
    """Which outputs are too incoherent for anything to be said of what a reader would see; "" where none are."""
    for name, share in v.coherence.items():
        if share is not None and v.n_pairs and coherence_of(share * v.n_pairs, v.n_pairs).is_too_low:
            return f"only {percent(share)} of the outputs of {name} are coherent"
    return ""


def _mode_is_shown(protocol: Protocol, v: Verdict, verdict_of: Mapping[str, Verdict]) -> bool:
    """Whether the sources were seen to evoke the mode: a directional test of the natural source against the natural
    target that passed, among what the verdict waits for."""
    h = protocol.hypothesis(v.id)
    if h.needs is None:
        waited = {other.id for other in protocol.hypotheses if other.needs is None and other.gate <= h.gate} - {h.id}
    else:
        waited = all_needed(protocol.hypotheses, [h.id])
    known = [verdict_of[name] for name in waited if name in verdict_of]
    return any(
        other.verdict == "supported"
        and _is_directional_on_the_mode(other)
        and _is_natural_gap(protocol.hypothesis(other.id))
        for other in known
    )


def _is_natural_gap(h: Hypothesis) -> bool:
    return h.kind.measures == "difference" and h.weights() == {NATURAL_SOURCE: 1, NATURAL_TARGET: -1}


def rests_text(protocol: Protocol, v: Verdict, *, names_readout: bool = True) -> str:
    """What a sentence rests on: the contrast, its readout, and in brackets n, slots and layers."""
    weights = protocol.hypothesis(v.id).weights()
    places = dict.fromkeys(place_of(protocol.conditions[name]) for name, weight in weights.items() if weight > 0)
    readout = f" in {v.readout}" if names_readout else ""
    return f"{v.contrast}{readout} (n = {v.n}; {' and '.join(places)})"
