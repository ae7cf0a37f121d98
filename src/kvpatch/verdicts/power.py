"""What a protocol can see: by simulation of its own decision rule, before anything is run.

What each data set would have needed is computed by the kind of test's own procedure (`procedures.py`).
Power counts the hypothesis' own test alone: that what it waits for passes, and that its outputs are coherent, is taken
for granted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from kvpatch.errors import ProtocolError
from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.base import Frozen
from kvpatch.statistics.grid import Floats
from kvpatch.statistics.paired_tests import sd_of
from kvpatch.verdicts.margins import PAST_MARGIN, calibration_rows, natural_gap
from kvpatch.verdicts.measure import measure, measured_as
from kvpatch.verdicts.pairs import prepare
from kvpatch.verdicts.procedures import procedure_of
from kvpatch.verdicts.simulated import Noise, Question

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
    refuse_unasked(protocol, n, phases)
    if not (math.isfinite(wanted_dz) and wanted_dz > 0):
        raise ProtocolError(f"the wanted effect must be a dz above 0, got {wanted_dz}")
    rows = None if pilot is None else prepare(pilot)
    out = []
    for h in asked_hypotheses(protocol, phases):
        noise = Noise() if rows is None else _noise_of(protocol, rows, h)
        out.append(_power(protocol, h, noise, n or protocol.phases[h.phase].n, wanted_dz, sets))
    return out


def refuse_unasked(protocol: Protocol, n: int | None, phases: Sequence[str] | None) -> None:
    if unknown := [name for name in phases or () if name not in protocol.phases]:
        raise ProtocolError(f"no phase {unknown[0]!r} in {protocol.protocol}; it has {', '.join(protocol.phases)}")
    if n is not None and n < 1:
        raise ProtocolError(f"power needs at least 1 pair, got n={n}")


def asked_hypotheses(protocol: Protocol, phases: Sequence[str] | None) -> list[Hypothesis]:
    return [h for h in protocol.hypotheses if phases is None or h.phase in phases]


def _alphas(protocol: Protocol) -> dict[str, tuple[float, float]]:
    """Hypothesis -> its alpha, and that over the size of its family."""
    sizes = Counter(h.family for h in protocol.hypotheses)
    return {h.id: (h.alpha, h.alpha / sizes[h.family]) for h in protocol.hypotheses}


def _all_alphas(protocol: Protocol) -> tuple[float, ...]:
    return tuple(sorted({PAST_MARGIN / 2, *(alpha for both in _alphas(protocol).values() for alpha in both)}))


def simulated_as(protocol: Protocol, h: Hypothesis) -> Hypothesis:
    """The hypothesis whose test is simulated: of a repetition what it repeats, where that has a simulation of its own
    (or none)."""
    asked = measured_as(protocol, h)
    is_same = procedure_of(asked.test).simulate is procedure_of(h.test).simulate
    return h if is_same else asked


def _noise_of(protocol: Protocol, rows: pd.DataFrame, h: Hypothesis) -> Noise:
    """The pilot's pair differences of a hypothesis; normal ones, with the reason, where it has none to speak of."""
    if procedure_of(simulated_as(protocol, h).test).simulate is None or h.kind.measures != "difference":
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
    if h.margin is None or not h.kind.is_in_unit:
        return None, []
    parts = [] if h.margin.value is None else [h.margin.value]
    if h.margin.natural_gap is not None:
        gap = natural_gap(rows, h.readout, h.transform)
        if gap.value is None:
            return None, [f"the margin is not known: {gap.reason}"]
        parts.append(h.margin.natural_gap * gap.value)
    return max(parts, default=None), []


def _power(protocol: Protocol, h: Hypothesis, noise: Noise, n: int, wanted_dz: float, sets: int) -> Power:
    is_margin = h.kind.certifies_absence
    if is_margin and noise.fixed:
        wanted_dz = noise.fixed
    plain, worst = _alphas(protocol)[h.id]
    asked = simulated_as(protocol, h)
    is_simulated = procedure_of(asked.test).simulate is not None
    q = Question(asked, noise, n, plain, _all_alphas(protocol), sets)
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
        plain=_at(q, wanted_dz) if is_simulated else None,
        worst=_at(replace(q, alpha=worst), wanted_dz) if is_simulated else None,
        notes=_notes(q, worst, wanted_dz),
    )


def _notes(q: Question, worst: float, wanted_dz: float) -> list[str]:
    """What has to be said beside the figures. q: at the hypothesis' own alpha. worst: as the first of its family."""
    h, noise, n, plain = q.hypothesis, q.noise, q.n, q.alpha
    procedure, means = procedure_of(h.test), h.kind.words.power
    is_simulated = procedure.simulate is not None
    needed, needed_first = procedure.least_pairs(plain), procedure.least_pairs(worst)
    notes = [*noise.notes, *([means] if means is not None else [])]
    if not is_simulated:
        notes.append(f"test {h.test!r} is not simulated")
    elif n < needed:
        notes.append(f"n={n} can't reach p < {plain:g} at all: it needs {needed} pairs")
    elif n < needed_first:
        notes.append(f"as the first of its family it would need {needed_first} pairs")
    if is_simulated and not procedure.is_known_for_any_n and n > LARGEST_N:
        notes.append(
            f"beyond {LARGEST_N:,} pairs the figures follow from those at {LARGEST_N:,}, falling as 1 / sqrt(n)"
        )
    if is_simulated and h.kind.is_in_unit and h.margin is not None and noise.pilot is None:
        if h.kind.certifies_absence:
            notes.append("the margin is in the readout's unit, so only a pilot tells whether it can be certified")
        elif h.margin.natural_gap is not None or h.margin.value is not None:
            notes.append("only the margin's dz part counts without a pilot")
    floor = smallest_p(h, noise)
    if is_simulated and wanted_dz <= floor:
        notes.append(f"no n shows dz {wanted_dz:g}: the margin itself is dz {floor:.3g}")
    return notes


def smallest_p(h: Hypothesis, noise: Noise) -> float:
    """The effect below which no n helps: the margin that a much greater, or much less, effect has to pass."""
    if not h.kind.beyond_margin or h.margin is None:
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
        needs_pairs=least_pairs(q),
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
    procedure = procedure_of(q.hypothesis.test)
    if procedure.simulate is None or q.n < least_pairs(q):
        return None
    if q.n <= LARGEST_N or procedure.is_known_for_any_n:
        return procedure.simulate(q)
    floor = smallest_p(q.hypothesis, q.noise)
    return floor + (procedure.simulate(replace(q, n=LARGEST_N)) - floor) * math.sqrt(LARGEST_N / q.n)


def least_pairs(q: Question) -> int:
    """Fewer pairs can't pass the test, or have no interval."""
    return max(3, procedure_of(q.hypothesis.test).least_pairs(q.alpha))


def smallest_dz(q: Question, share: float) -> float:
    needed = _needed(q)
    return math.inf if needed is None else float(np.quantile(needed, share))


def _n_for(q: Question, wanted_dz: float, share: float) -> int | None:
    """The n at which the wanted effect is seen with this power; None where no n helps.

    Found between two values of a grid of n, or beyond it: the excess over the margin falls about as 1 / sqrt(n).
    """
    floor = smallest_p(q.hypothesis, q.noise)
    if wanted_dz <= floor:
        return None
    low, high = -1, len(GRID) - 1  # the first fails, or is not on the grid; the last is taken to pass
    while high - low > 1:
        middle = (low + high) // 2
        passes = smallest_dz(replace(q, n=GRID[middle]), share) <= wanted_dz
        low, high = (low, middle) if passes else (middle, high)
    # The largest n is by far the slowest, so it is tried only where no smaller one passed.
    if high == len(GRID) - 1:
        at_most = smallest_dz(replace(q, n=GRID[-1]), share)
        if not math.isfinite(at_most):
            return None
        if at_most > wanted_dz:
            return math.ceil(GRID[-1] * ((at_most - floor) / (wanted_dz - floor)) ** 2 - 1e-9)
    if low < 0 or GRID[high] - GRID[low] == 1:
        return GRID[high]
    ends = [smallest_dz(replace(q, n=GRID[i]), share) - floor for i in (low, high)]
    if not math.isfinite(ends[0]) or ends[0] <= ends[1]:
        return GRID[high]
    part = math.log(ends[0] / (wanted_dz - floor)) / math.log(ends[0] / ends[1])
    return math.ceil(GRID[low] * (GRID[high] / GRID[low]) ** part - 1e-9)
