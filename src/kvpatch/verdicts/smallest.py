"""What a run of n pairs could not see, said before it costs anything."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.base import Frozen
from kvpatch.specs.test_kinds import kind_named
from kvpatch.verdicts.attainable import correction_of, planned_pairs, smallest_adjusted_p, strictest_alpha
from kvpatch.verdicts.attainable import smallest_p as attainable_p
from kvpatch.verdicts.deviations import deviations
from kvpatch.verdicts.power import (
    QUICK_SETS,
    SHARES,
    WANTED_DZ,
    asked_hypotheses,
    least_pairs,
    refuse_unasked,
    simulated_as,
    smallest_dz,
    smallest_p,
)
from kvpatch.verdicts.prerequisites import primary
from kvpatch.verdicts.procedures import procedure_of
from kvpatch.verdicts.rounding import number
from kvpatch.verdicts.simulated import Noise, Question
from kvpatch.verdicts.strongest import LEAST_PAIRS

MOST_WARNINGS = 4
LEAST_HELD_OUT = 8
"""Outputs of the natural target that set the limit of coherent output; with fewer a run is warned. Their 95th
percentile calls 14% of ordinary outputs incoherent on average with 8 of them, 22% with 4, 35% with 2."""


class Smallest(Frozen):
    """The smallest effect (of an equivalence test, margin) in dz that a hypothesis sees with 80% power at n pairs."""

    id: str
    test: str
    alpha: float
    n: int
    needs_pairs: int
    dz: float | None
    beyond_margin: float | None
    """The same, less the margin in dz that the effect has to pass."""


def smallest_effects(protocol: Protocol, n: int | None = None, phases: Sequence[str] | None = None) -> list[Smallest]:
    """What every hypothesis that is not true by construction can see with 80% power, each at the alpha that its family
    leaves to one that passes alone.

    Normal noise, and fewer simulated data sets than `power` takes: within about 2%, in less than a second an n. A
    kind of test that is not simulated is left out.

    Raises:
        ProtocolError: for an unknown phase, or an n below 1.
    """
    refuse_unasked(protocol, n, phases)
    found = (_smallest_effect(protocol, h, n or protocol.phases[h.phase].n) for h in asked_hypotheses(protocol, phases))
    return [s for s in found if s is not None]


def _smallest_effect(protocol: Protocol, h: Hypothesis, n: int) -> Smallest | None:
    asked = simulated_as(protocol, h)
    if protocol.is_tautological(h) or procedure_of(asked.test).simulate is None:
        return None
    alpha = strictest_alpha(protocol, h)
    alphas = tuple(sorted({strictest_alpha(protocol, other) for other in protocol.hypotheses}))
    q = Question(asked, Noise(), n, alpha, alphas, QUICK_SETS)
    found = smallest_dz(q, SHARES[0])
    dz = found if math.isfinite(found) else None
    beyond = None if dz is None else dz - smallest_p(asked, Noise())
    needs = least_pairs(q)
    return Smallest(id=h.id, test=h.test, alpha=alpha, n=n, needs_pairs=needs, dz=dz, beyond_margin=beyond)


def warnings_before(protocol: Protocol, n: int | None = None, phases: Sequence[str] | None = None) -> list[str]:
    """One line for each group of hypotheses that a run could not decide, or only if the effect is large.

    Held against alpha over the size of the family, which Holm asks of a hypothesis that passes alone. Large is more
    than dz 0.5 (beyond the margin, where the effect has to pass one). Empty for a run that can see what it asks. At
    most five lines beside those on hypotheses that no data could pass. It is advice, and stops no run: what can't be
    computed is named as such.
    """
    few = [d for d in deviations(protocol, planned_pairs(protocol, n, phases)) if d.kind == "pairs"]
    hopeless = {name for d in few for name in d.hypotheses}
    least = smallest_adjusted_p(protocol, planned_pairs(protocol, n, phases))
    groups: dict[str, list[str]] = {}
    for h in asked_hypotheses(protocol, phases):
        if h.id in hopeless:
            continue
        try:
            s = _smallest_effect(protocol, h, n or protocol.phases[h.phase].n)
        except Exception as error:  # whatever it is, the run goes on, and the line below says that this is not known
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            groups.setdefault("what {} can see is not known: " + _braced(reason), []).append(h.id)
            continue
        if s is None:
            continue
        if s.dz is None:
            text = f"can't reach p < {s.alpha:g} at all: {s.needs_pairs} pairs are needed"
        elif s.beyond_margin is None or s.beyond_margin <= WANTED_DZ:
            continue
        elif kind_named(s.test).certifies_absence:
            text = f"(alpha {s.alpha:g}) can certify only margins of dz >= {s.dz:.2f} with 80% power"
        else:
            text = f"(alpha {s.alpha:g}) can see only effects of dz >= {s.dz:.2f} with 80% power"
        text += _braced(_least(protocol, h, s.n, least.get(h.id)))
        groups.setdefault(f"n={s.n}: {{}} {text}", []).append(s.id)
    lines = [text.format(_few(ids)) for text, ids in groups.items()]
    if len(lines) > MOST_WARNINGS:
        rest = len(lines) - MOST_WARNINGS
        lines = [*lines[:MOST_WARNINGS], f"and {rest} more: see kvpatch power {protocol.protocol}"]
    return [*(d.told for d in few), *lines, *_too_few_held_out(protocol), *_too_few_to_claim(protocol, n, phases)]


def _too_few_held_out(protocol: Protocol) -> list[str]:
    """That the limits of coherent output rest on few texts."""
    texts = protocol.calibration.pairs * protocol.generation.samples
    if texts >= LEAST_HELD_OUT:
        return []
    return [
        f"{texts} held-out outputs set the limits of coherent output, so that ordinary ones may be called incoherent; "
        f"hold out {LEAST_HELD_OUT} or more (calibration: pairs)"
    ]


def _too_few_to_claim(protocol: Protocol, n: int | None, phases: Sequence[str] | None) -> list[str]:
    """That the pairs are fewer than the strongest sentence may rest on, whatever passes."""
    main = primary(asked_hypotheses(protocol, phases))
    pairs = [n or protocol.phases[h.phase].n for h in main]
    if not main or max(pairs) >= LEAST_PAIRS:
        return []
    return [
        f"n={max(pairs)}: with fewer than {LEAST_PAIRS} pairs no answer says that the mode can be read from the cache, "
        "whatever passes"
    ]


def _least(protocol: Protocol, h: Hypothesis, n: int, adjusted: float | None) -> str:
    """What the correction makes of the smallest p that n pairs can give; nothing where no bound is known."""
    own = attainable_p(protocol, h, n)
    if adjusted is None or not own > 0:
        return ""
    name = "Holm" if correction_of(protocol, h.family) == "holm" else "Benjamini-Hochberg"
    holm = "" if adjusted == own else f", {number(adjusted)} after {name} in family {h.family}"
    return f"; the smallest p of {n} pairs is {number(own)}{holm}"


def _braced(text: str) -> str:
    """The text as a part of a format, where it stands for itself."""
    return text.replace("{", "{{").replace("}", "}}")


def _few(ids: Sequence[str]) -> str:
    return ", ".join(ids) if len(ids) <= 3 else f"{', '.join(ids[:2])} and {len(ids) - 2} others"
