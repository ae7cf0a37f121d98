"""Numbers as a reader who isn't a statistician wants them: rounded, with their unit, in a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.specs.readouts import readouts
from kvpatch.specs.test_kinds import TestKind
from kvpatch.verdicts.margins import NATURAL_SOURCE, NATURAL_TARGET
from kvpatch.verdicts.measure import Measured
from kvpatch.verdicts.rounding import number
from kvpatch.verdicts.texts import PAIR, Texts

_TERM = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
SMALLEST_P = 1e-4
"""A p-value below this is told as being below it."""
NAMED = 4
"""Hypotheses that a sentence names; the rest it counts."""


def percent(share: float) -> str:
    """A share as a whole percentage, rounded down, so that "100%" means all and "90%" is not said of less.

    >>> percent(0.999), percent(1), percent(0.8999), percent(0.29)
    ('99%', '100%', '89%', '29%')
    """
    return f"{math.floor(share * 100 + 1e-9)}%" if math.isfinite(share) else "unknown"


def p_value(p: float) -> str:
    """A p-value; what is below 0.0001 is said to be so.

    >>> p_value(0.0412), p_value(0.00005)
    ('0.0412', '< 0.0001')
    """
    return "unknown" if math.isnan(p) else f"< {SMALLEST_P:.4f}" if p < SMALLEST_P else number(p)


def quantity(value: float, hypothesis: Hypothesis) -> str:
    """A number with the unit of the hypothesis' readout; a logarithm also as the factor it stands for."""
    if hypothesis.transform == "log":
        factor = f" (a factor of {number(math.exp(value))})" if abs(value) < 20 else ""
        return f"{number(value)} log units{factor}"
    readout = readouts().get(hypothesis.readout)
    return f"{number(value)} {readout.unit}" if readout is not None and readout.unit else number(value)


def chance(p: float) -> str:
    """ "p = 0.012" or "p < 0.0001"."""
    equals = "" if math.isnan(p) or p < SMALLEST_P else "= "
    return f"p {equals}{p_value(p)}"


def pairs_text(n: int, n_pairs: int) -> str:
    """How many pairs numbers rest on, and how they were grouped. n: units, as a verdict counts them."""
    pairs = f"{n_pairs} {'pair' if n_pairs == 1 else 'pairs'}"
    if n == n_pairs:
        return pairs
    return f"{n} {'group' if n == 1 else 'groups'} of pairs that share no prompt ({pairs})"


def interval_text(m: Measured) -> str:
    """ "95% interval 0.2 to 0.4"."""
    if math.isnan(m.interval.low):
        return "too few pairs for an interval"
    return f"{m.interval.level:.0%} interval {number(m.interval.low)} to {number(m.interval.high)}"


def figures(m: Measured) -> str:
    """What was measured: the contrast, slope or correlation, how large, on how many pairs, how sure."""
    rest = f"over {pairs_text(m.differences.n, m.differences.n_pairs)} ({interval_text(m)})"
    return f"{finding_text(m.estimate, m.hypothesis, m.kind)} {rest}{m.told}"


def finding_text(estimate: float, h: Hypothesis, kind: TestKind) -> str:
    """The contrast, slope or correlation, and how large it is. kind: of the test that was carried out."""
    given = ", ".join(f"{v.readout} of {v.contrast}" for v in h.controlling)
    return kind.words.finding.format(
        contrast=h.contrast,
        readout=h.readout,
        estimate=quantity(estimate, h),
        number=number(estimate),
        against=_against(h),
        held=f" with {given} held constant" if given else "",
    )


def _against(h: Hypothesis) -> str:
    """What the contrast is held against, in words."""
    if h.against is not None:
        return f"{h.against.contrast} in {h.against.readout}"
    return h.ranked_with or "the level" if h.kind.measures == "ranks" else ""


def limit_text(value: float, m: Measured) -> str:
    """What an estimate is held against, as the kind of test says it."""
    return m.kind.words.limit.format(quantity=quantity(value, m.hypothesis), number=number(value))


_PROMPT = {"neutral": "the neutral scaffold's text", "shuffled_words": "the source's words shuffled as a text"}


def _named(roles: Mapping[str, str | None], names: Iterable[str]) -> str:
    """ "C is the source's text and N1 is the foreign prompt's text"."""
    told = {
        name: _PROMPT.get(str(roles[name]), f"the {roles[name]}'s text" if roles[name] in PAIR else "")
        or f"the {str(roles[name]).replace('_', ' ')} prompt's text"
        for name in names
    }
    return " and ".join(f"{name} is {text}" for name, text in told.items())


def _swapped(texts: Texts, names: Iterable[str]) -> list[str]:
    conditions = texts.protocol.conditions
    return [name for name in names if not conditions[name].is_natural or conditions[name].text_of is not None]


def tautology(texts: Texts, m: Measured) -> str:
    """Why the hypothesis holds by construction, what its numbers re-measure, and where the evidence
    stands."""
    h, roles = m.hypothesis, texts.roles(m.hypothesis)
    named = _named(roles, _swapped(texts, roles))
    natural = {"source": NATURAL_SOURCE, "target": NATURAL_TARGET}
    again = _TERM.sub(lambda term: natural.get(str(roles[term[0]]), term[0]), h.contrast)
    what = f"re-measures {again}" if len(set(roles.values())) > 1 else "compares a text with itself"
    measured = figures(m) if m.differences.n else f"no pair was measured for {h.contrast}"
    return f"A full swap is text substitution ({named}), so this {what}: {measured}; {_where_to_look(texts)}."


def text_contrast(texts: Texts, h: Hypothesis) -> str:
    """What is said of a contrast that compares texts; "" of one that does not, or that has natural runs alone."""
    roles = texts.roles(h)
    swapped = _swapped(texts, roles)
    if texts.evidence(h) == "cache" or not swapped:
        return ""
    return f" This compares texts ({_named(roles, swapped)}): a manipulation check, and no evidence about the cache."


def _where_to_look(texts: Texts) -> str:
    protocol = texts.protocol
    foreign = [name for name, c in protocol.conditions.items() if c.from_ == "foreign"]
    found = [
        h
        for h in protocol.hypotheses
        if not h.kind.certifies_absence and set(foreign) & set(h.conditions) and texts.evidence(h) == "cache"
    ]
    if not found:
        return (
            "this protocol has no contrast against a foreign cache between conditions that no text equals, which is "
            "what would be evidence"
        )
    shown = sorted(found, key=lambda h: not h.confirmatory)[:NAMED]
    used = ", ".join(name for name in foreign if any(name in h.conditions for h in shown))
    more = f" and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    return (
        f"the evidence stands in the contrasts against a foreign cache ({used}): {', '.join(h.id for h in shown)}{more}"
    )
