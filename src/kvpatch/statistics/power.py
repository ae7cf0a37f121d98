"""What a protocol can see: by simulation of its own decision rule, before anything is run.

Each kind of test is one function of `KINDS`: from simulated noise to the effect that each data set would have needed.
Power counts the hypothesis' own test alone: that its gate passes and its outputs are coherent is taken for granted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from kvpatch.errors import ProtocolError
from kvpatch.patch import Frozen
from kvpatch.protocols.schema import Hypothesis, Protocol
from kvpatch.statistics.margins import calibration_rows, natural_gap
from kvpatch.statistics.measure import measure
from kvpatch.statistics.pairs import Floats, prepare
from kvpatch.statistics.rules import PAST_MARGIN
from kvpatch.statistics.simulation import critical, critical_correlations, critical_dz, critical_slopes
from kvpatch.statistics.tests import sd_of, smallest_n

SETS = 4_000
"""Simulated data sets: the smallest effect is then known to about 1%, a power to about 1 percentage point."""
QUICK_SETS = 1_000
"""The same where an n is sought, and before a run: to about 2%."""
SHARES = (0.80, 0.90)
WANTED_DZ = 0.5
LARGEST_N = 1_000
"""Pairs up to which data sets are simulated; beyond, the figures follow from those at this n."""
GRID = (
    *range(3, 21),
    24,
    28,
    34,
    40,
    48,
    57,
    68,
    80,
    95,
    113,
    135,
    160,
    190,
    226,
    270,
    320,
    380,
    452,
    538,
    640,
    800,
    1000,
)
MOST_WARNINGS = 4
MOST_ZEROS = 0.5


class PowerAt(Frozen):
    """Figures of one hypothesis at one alpha, in dz (true mean over true standard deviation of the pair differences).

    Of an equivalence test they are margins: the smallest that is certified where there is no effect at all.
    None where there is no such number; `Power.notes` say why.
    """

    alpha: float
    needs_pairs: int
    """Fewer can't give p < alpha at all."""
    dz_80: float | None
    dz_90: float | None
    unit_80: float | None
    unit_90: float | None
    power_at_wanted: float
    n_80: int | None
    n_90: int | None


class Power(Frozen):
    """What one hypothesis can see at n pairs. `plain` is at its alpha, the headline; `worst` at alpha over the size of
    its family, which is what Holm asks of the first hypothesis of the family, and so of one that passes alone."""

    id: str
    phase: str
    contrast: str
    readout: str
    test: str
    family: str
    family_size: int
    n: int
    is_margin: bool
    is_tautological: bool
    noise: str
    sd: float | None
    """Spread of the pilot's pair differences, in the readout's unit (of its logarithm, where the test takes one)."""
    wanted_dz: float
    margin_dz: float | None
    """The part of the margin that is fixed, in dz: the margin itself, or the share of the natural gap of a pilot."""
    plain: PowerAt | None
    worst: PowerAt | None
    notes: list[str]


@dataclass(frozen=True)
class Noise:
    """Pair differences to simulate from: a pilot's, centred and scaled to standard deviation 1, or normal ones.

    sd: of the pilot's differences, in the readout's unit. fixed: the part of the margin that is fixed, in sd.
    """

    name: str = "normal"
    pilot: tuple[float, ...] | None = None
    sd: float | None = None
    fixed: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """One simulation: a test at n pairs and one alpha. `alphas`: all that the protocol needs, simulated together."""

    hypothesis: Hypothesis
    noise: Noise
    n: int
    alpha: float
    alphas: tuple[float, ...]
    sets: int


def _directional(q: Question) -> Floats:
    """p < alpha, and the 95% interval wholly beyond the margin (beyond 0 without one), whose parts have 2p < .025."""
    found = critical(q.n, q.sets, q.alphas, q.noise.pilot)
    is_less = q.hypothesis.test in ("less", "much_less")
    by_flips, by_t = (found.below, found.below_t) if is_less else (found.above, found.above_t)
    end = -found.high[0.95] if is_less else found.low[0.95]
    needed = np.maximum(by_flips[q.alpha], -end)
    margin = q.hypothesis.margin if q.hypothesis.test.startswith("much") else None
    if margin is not None and margin.dz is not None:
        needed = np.maximum(needed, margin.dz * found.sd - end)
        needed = np.maximum(needed, critical_dz(q.n, q.sets, margin.dz, q.noise.pilot)[int(is_less)])
    if margin is not None and q.noise.fixed is not None:
        at_margin = np.maximum(np.maximum(by_flips[PAST_MARGIN / 2], by_t[PAST_MARGIN / 2]), -end)
        needed = np.maximum(needed, q.noise.fixed + at_margin)
    return needed


def _equivalent(q: Question) -> Floats:
    """The smallest margin at which both one-sided tests pass and the 90% interval lies within."""
    found = critical(q.n, q.sets, q.alphas, q.noise.pilot)
    by_flips = np.maximum(found.above[q.alpha], found.below[q.alpha])
    by_flips = np.maximum(by_flips, np.maximum(found.above_t[q.alpha], found.below_t[q.alpha]))
    return np.maximum(by_flips, np.maximum(-found.low[0.90], found.high[0.90]))


def _ordering(q: Question) -> Floats:
    names, peak = q.hypothesis.order()
    return critical_slopes(q.n, len(names), peak, q.alpha, q.sets)


def _correlation(q: Question) -> Floats:
    return critical_correlations(q.n, len(q.hypothesis.controlling), q.alpha, q.sets)


KINDS: dict[str, Callable[[Question], Floats]] = {
    "greater": _directional,
    "less": _directional,
    "much_greater": _directional,
    "much_less": _directional,
    "equivalent": _equivalent,
    "trend": _ordering,
    "umbrella": _ordering,
    "correlates": _correlation,
    "replicates": _directional,
}
MEANING = {
    "trend": "dz is that of the pairs' slopes, for noise that is normal and alike at every level",
    "umbrella": "dz is that of the pairs' slopes, for noise that is normal and alike at every level",
    "correlates": "the figures are correlations",
    "replicates": "the second model's own test alone; that the intervals overlap is not counted",
}
"""Kind of test -> [sets], the effect (or margin) that each simulated data set needs to be decided for the claim."""


def power(
    protocol: Protocol,
    *,
    n: int | None = None,
    phases: Sequence[str] | None = None,
    wanted_dz: float = WANTED_DZ,
    pilot: pd.DataFrame | None = None,
    sets: int = SETS,
) -> list[Power]:
    """What each hypothesis can see, in the protocol's order.

    Args:
        n: pairs, in place of each phase's own.
        phases: only hypotheses of these; all if None.
        wanted_dz: the effect (or the margin to be certified) that should be seen.
        pilot: trials of a run, whose pair differences are then simulated from, centred, instead of normal ones.
    Raises:
        ProtocolError: for an unknown phase, an n below 1, or an effect that is not above 0.
    """
    _check(protocol, n, phases)
    if not (math.isfinite(wanted_dz) and wanted_dz > 0):
        raise ProtocolError(f"the wanted effect must be a dz above 0, got {wanted_dz}")
    rows = None if pilot is None else prepare(pilot)
    out = []
    for h in _asked(protocol, phases):
        noise = Noise() if rows is None else _noise_of(protocol, rows, h)
        out.append(_power(protocol, h, noise, n or protocol.phases[h.phase].n, wanted_dz, sets))
    return out


def _check(protocol: Protocol, n: int | None, phases: Sequence[str] | None) -> None:
    if unknown := [name for name in phases or () if name not in protocol.phases]:
        raise ProtocolError(f"no phase {unknown[0]!r} in {protocol.protocol}; it has {', '.join(protocol.phases)}")
    if n is not None and n < 1:
        raise ProtocolError(f"power needs at least 1 pair, got n={n}")


def _asked(protocol: Protocol, phases: Sequence[str] | None) -> list[Hypothesis]:
    return [h for h in protocol.hypotheses if phases is None or h.phase in phases]


def _alphas(protocol: Protocol) -> dict[str, tuple[float, float]]:
    """Hypothesis -> its alpha, and that over the size of its family."""
    sizes = Counter(h.family for h in protocol.hypotheses)
    return {h.id: (h.alpha, h.alpha / sizes[h.family]) for h in protocol.hypotheses}


def _all_alphas(protocol: Protocol) -> tuple[float, ...]:
    return tuple(sorted({PAST_MARGIN / 2, *(alpha for both in _alphas(protocol).values() for alpha in both)}))


def _noise_of(protocol: Protocol, rows: pd.DataFrame, h: Hypothesis) -> Noise:
    """The pilot's pair differences of a hypothesis; normal ones, with the reason, where it has none to speak of."""
    if h.test not in KINDS or h.test in ("trend", "umbrella", "correlates"):
        return Noise()
    values = measure(protocol, rows, h).differences.values
    sd = sd_of(values)
    if len(values) < 3 or not sd > 0:
        why = "its differences do not vary" if len(values) >= 3 else f"it has {len(values)} pairs of {h.contrast}"
        return Noise(notes=(f"normal noise, since the pilot can't be used: {why}",))
    fixed, notes = _fixed_margin(calibration_rows(protocol, rows, h.phase), h)
    zeros = float(np.mean(values == 0))
    if zeros > MOST_ZEROS:
        notes.append(
            f"{zeros:.0%} of the pilot's differences are 0, so an effect would not simply shift them: too rosy"
        )
    centred = (values - values.mean()) / sd
    name = f"pilot, {len(values)} pairs"
    return Noise(name, tuple(centred.tolist()), sd, None if fixed is None else fixed / sd, tuple(notes))


def _fixed_margin(rows: pd.DataFrame, h: Hypothesis) -> tuple[float | None, list[str]]:
    """The part of a margin that does not depend on the spread, in the readout's unit; and why one is not known."""
    if h.margin is None:
        return None, []
    parts = [] if h.margin.value is None else [h.margin.value]
    if h.margin.natural_gap is not None:
        gap = natural_gap(rows, h.readout, h.transform)
        if gap.value is None:
            return None, [f"the margin is not known: {gap.reason}"]
        parts.append(h.margin.natural_gap * gap.value)
    return max(parts, default=None), []


def _power(protocol: Protocol, h: Hypothesis, noise: Noise, n: int, wanted_dz: float, sets: int) -> Power:
    is_margin = h.test == "equivalent"
    if is_margin and noise.fixed:
        wanted_dz = noise.fixed
    plain, worst = _alphas(protocol)[h.id]
    notes = [*noise.notes, *([MEANING[h.test]] if h.test in MEANING else [])]
    if h.test not in KINDS:
        notes.append(f"test {h.test!r} is not simulated")
    elif n < smallest_n(plain):
        notes.append(f"n={n} can't reach p < {plain:g} at all: it needs {smallest_n(plain)} pairs")
    elif n < smallest_n(worst):
        notes.append(f"as the first of its family it would need {smallest_n(worst)} pairs")
    if h.test in KINDS and h.test != "correlates" and n > LARGEST_N:
        notes.append(
            f"beyond {LARGEST_N:,} pairs the figures follow from those at {LARGEST_N:,}, falling as 1 / sqrt(n)"
        )
    if h.test in KINDS and h.test != "correlates" and h.margin is not None and noise.pilot is None:
        if is_margin:
            notes.append("the margin is in the readout's unit, so only a pilot tells whether it can be certified")
        elif h.margin.natural_gap is not None or h.margin.value is not None:
            notes.append("only the margin's dz part counts without a pilot")
    floor = _floor(h, noise)
    if h.test in KINDS and wanted_dz <= floor:
        notes.append(f"no n shows dz {wanted_dz:g}: the margin itself is dz {floor:.3g}")
    q = Question(h, noise, n, plain, _all_alphas(protocol), sets)
    return Power(
        **h.model_dump(include={"id", "phase", "contrast", "readout", "test", "family"}),
        family_size=sum(other.family == h.family for other in protocol.hypotheses),
        n=n,
        is_margin=is_margin,
        is_tautological=protocol.is_tautological(h),
        noise=noise.name,
        sd=noise.sd,
        wanted_dz=wanted_dz,
        margin_dz=noise.fixed,
        plain=_at(q, wanted_dz) if h.test in KINDS else None,
        worst=_at(replace(q, alpha=worst), wanted_dz) if h.test in KINDS else None,
        notes=notes,
    )


def _floor(h: Hypothesis, noise: Noise) -> float:
    """The effect below which no n helps: the margin that a much greater, or much less, effect has to pass."""
    if not h.test.startswith("much") or h.margin is None:
        return 0.0
    return max(h.margin.dz or 0.0, noise.fixed or 0.0)


def _at(q: Question, wanted_dz: float) -> PowerAt:
    needed = _needed(q)
    found = np.sort(needed) if needed is not None else None
    dz = [None if found is None else float(np.quantile(found, share)) for share in SHARES]
    unit = [None if d is None or q.noise.sd is None else d * q.noise.sd for d in dz]
    quick = replace(q, sets=min(q.sets, QUICK_SETS))
    n = [_n_for(quick, wanted_dz, share) for share in SHARES]
    return PowerAt(
        alpha=q.alpha,
        needs_pairs=max(3, smallest_n(q.alpha)),
        dz_80=dz[0],
        dz_90=dz[1],
        unit_80=unit[0],
        unit_90=unit[1],
        power_at_wanted=0.0 if found is None else float(np.mean(found < wanted_dz)),
        n_80=n[0],
        n_90=n[1],
    )


def _needed(q: Question) -> Floats | None:
    """What each data set needs; None where n is too small for the test to pass at all.

    Beyond `LARGEST_N` pairs means are as good as normal, so that what is needed beyond the margin falls as 1 / sqrt(n).
    """
    if q.n < max(3, smallest_n(q.alpha)):
        return None
    if q.n <= LARGEST_N or q.hypothesis.test == "correlates":  # of a correlation the distribution is known for any n
        return KINDS[q.hypothesis.test](q)
    floor = _floor(q.hypothesis, q.noise)
    return floor + (KINDS[q.hypothesis.test](replace(q, n=LARGEST_N)) - floor) * math.sqrt(LARGEST_N / q.n)


def _smallest(q: Question, share: float) -> float:
    needed = _needed(q)
    return math.inf if needed is None else float(np.quantile(needed, share))


def _n_for(q: Question, wanted_dz: float, share: float) -> int | None:
    """The n at which the wanted effect is seen with this power; None where no n helps.

    Found between two values of a grid of n, or beyond it: the excess over the margin falls about as 1 / sqrt(n).
    """
    floor = _floor(q.hypothesis, q.noise)
    at_most = _smallest(replace(q, n=GRID[-1]), share)
    if wanted_dz <= floor or not math.isfinite(at_most):
        return None
    if at_most > wanted_dz:
        return math.ceil(GRID[-1] * ((at_most - floor) / (wanted_dz - floor)) ** 2 - 1e-9)
    low, high = -1, len(GRID) - 1  # the first fails, or is not on the grid; the last passes
    while high - low > 1:
        middle = (low + high) // 2
        passes = _smallest(replace(q, n=GRID[middle]), share) <= wanted_dz
        low, high = (low, middle) if passes else (middle, high)
    if low < 0 or GRID[high] - GRID[low] == 1:
        return GRID[high]
    ends = [_smallest(replace(q, n=GRID[i]), share) - floor for i in (low, high)]
    if not math.isfinite(ends[0]) or ends[0] <= ends[1]:
        return GRID[high]
    part = math.log(ends[0] / (wanted_dz - floor)) / math.log(ends[0] / ends[1])
    return math.ceil(GRID[low] * (GRID[high] / GRID[low]) ** part - 1e-9)


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
    """What every hypothesis that is not true by construction can see with 80% power, each at its own alpha.

    Normal noise, and fewer simulated data sets than `power` takes: within about 2%, in less than a second an n. A
    kind of test that is not simulated is left out.

    Raises:
        ProtocolError: for an unknown phase, or an n below 1.
    """
    _check(protocol, n, phases)
    found = (_smallest_effect(protocol, h, n or protocol.phases[h.phase].n) for h in _asked(protocol, phases))
    return [s for s in found if s is not None]


def _smallest_effect(protocol: Protocol, h: Hypothesis, n: int) -> Smallest | None:
    if protocol.is_tautological(h) or h.test not in KINDS:
        return None
    alphas = tuple(sorted({other.alpha for other in protocol.hypotheses}))
    found = _smallest(Question(h, Noise(), n, h.alpha, alphas, QUICK_SETS), SHARES[0])
    dz = found if math.isfinite(found) else None
    beyond = None if dz is None else dz - _floor(h, Noise())
    needs = max(3, smallest_n(h.alpha))
    return Smallest(id=h.id, test=h.test, alpha=h.alpha, n=n, needs_pairs=needs, dz=dz, beyond_margin=beyond)


def warnings_before(protocol: Protocol, n: int | None = None, phases: Sequence[str] | None = None) -> list[str]:
    """One short line for each group of hypotheses that a run could not decide, or only if the effect is large.

    Large is more than dz 0.5 (beyond the margin, where the effect has to pass one). Empty for a run that can see
    what it asks. At most five lines. It is advice, and stops no run: what can't be computed is named as such.
    """
    groups: dict[str, list[str]] = {}
    for h in _asked(protocol, phases):
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
        elif s.test == "equivalent":
            text = f"(alpha {s.alpha:g}) can certify only margins of dz >= {s.dz:.2f} with 80% power"
        else:
            text = f"(alpha {s.alpha:g}) can see only effects of dz >= {s.dz:.2f} with 80% power"
        groups.setdefault(f"n={s.n}: {{}} {text}", []).append(s.id)
    lines = [text.format(_few(ids)) for text, ids in groups.items()]
    if len(lines) > MOST_WARNINGS:
        rest = len(lines) - MOST_WARNINGS
        lines = [*lines[:MOST_WARNINGS], f"and {rest} more: see kvpatch power {protocol.protocol}"]
    return lines


def _braced(text: str) -> str:
    """The text as a part of a format, where it stands for itself."""
    return text.replace("{", "{{").replace("}", "}}")


def _few(ids: Sequence[str]) -> str:
    return ", ".join(ids) if len(ids) <= 3 else f"{', '.join(ids[:2])} and {len(ids) - 2} others"
