"""How each kind of test is computed, and how its power is simulated: one procedure per kind, by its id.

What a kind of test needs, claims and is called stands in `specs/test_kinds.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real

from kvpatch.errors import ExtensionError
from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.specs.test_kinds import kind_named
from kvpatch.statistics import paired_tests as tests
from kvpatch.statistics.correlation import partial_correlation
from kvpatch.statistics.grid import Floats
from kvpatch.statistics.intervals import Interval, bca_interval
from kvpatch.statistics.resampling import SMALLEST_P as SMALLEST_P_DRAWN
from kvpatch.statistics.trend import mean_rho_p, ordered_trend
from kvpatch.statistics.trend import smallest_p as smallest_p_of_order
from kvpatch.verdicts import simulated
from kvpatch.verdicts.margins import Bound


@dataclass(frozen=True, eq=False)
class Sample:
    """What a test is computed from.

    differences: [units], what is averaged, in the readout's unit: the contrast, or for an ordering each unit's slope.
    table: [units, columns]. Of a slope the readout under each condition, in rising order up to the peak. Of a
    correlation the contrast, what it is held against, and each thing held constant. Of ranks the levels' numbers, or
    the other readout under each condition, and then the readout. Of a difference the differences.
    margin: the whole margin. fixed: its part that is fixed before the test, None without one; both in the readout's
    unit.
    """

    hypothesis: Hypothesis
    differences: Floats
    table: Floats
    margin: Bound
    fixed: float | None = None


@dataclass(frozen=True)
class Figures:
    """What a test finds; NaN where there is no number.

    p: of the claim. interval: of the estimate, at the kind's level. p_margin: one-sided against the margin, for a kind
    that has to pass it. estimate: None for the mean of the differences. effect_size: None for dz.
    """

    p: float
    interval: Interval
    p_margin: float = math.nan
    estimate: float | None = None
    effect_size: float | None = None


@dataclass(frozen=True)
class Procedure:
    """How one kind of test is carried out.

    test: the numbers of a sample of at least one unit.
    simulate: [sets], the effect (of what certifies an absence, the margin) that each simulated data set needs to be
    decided for the claim, in standard deviations. None where power is not simulated; the power table then says so.
    is_known_for_any_n: whether `simulate` takes any n; else it is asked up to `power.LARGEST_N`.
    needs_pairs: the smallest number of units at which p can be below alpha.
    smallest_p: the smallest p that so many units can give, whatever the data say; None where no bound is known.
    tested: share of the pairs that are tested, where others only choose what is tested.
    """

    test: Callable[[Sample], Figures]
    simulate: Callable[[simulated.Question], Floats] | None = None
    is_known_for_any_n: bool = False
    needs_pairs: Callable[[float], int] = tests.smallest_n
    smallest_p: Callable[[int], float] | None = None
    tested: float = 1.0

    def least_pairs(self, alpha: float) -> int:
        """How many pairs a phase must have for p to come below alpha."""
        return math.ceil(self.needs_pairs(alpha) / self.tested)


def _directional(sample: Sample) -> Figures:
    side = "less" if sample.hypothesis.sign == -1 else "greater"
    return Figures(tests.sign_flip(sample.differences, side), bca_interval(sample.differences, 0.95))


def _past_margin(sample: Sample) -> Figures:
    """The directional test, and one-sided against the margin."""
    h, found = sample.hypothesis, _directional(sample)
    if h.margin is None or sample.margin.value is None:
        return found
    past = tests.past_margin(sample.differences, h.claimed_side, sample.fixed, h.margin.dz)
    return Figures(found.p, found.interval, past)


def _equivalent(sample: Sample) -> Figures:
    """Two one-sided tests. p is the larger of the two."""
    if sample.margin.value is None:
        return Figures(math.nan, bca_interval(sample.differences, 0.90))
    found = tests.equivalence(sample.differences, sample.margin.value)
    return Figures(found.p, found.interval)


def _ordered(sample: Sample) -> Figures:
    """p by ranks within pairs, the interval by each pair's slope per step."""
    _, peak = sample.hypothesis.order()
    return Figures(ordered_trend(sample.table, peak), bca_interval(sample.differences, 0.95))


def _correlated(sample: Sample) -> Figures:
    """A partial correlation over pairs of the contrast with another variable."""
    r = partial_correlation(sample.table[:, 0], sample.table[:, 1], sample.table[:, 2:])
    p = r.p_greater if sample.hypothesis.claimed_side == 1 else r.p_less
    return Figures(p, r.interval, estimate=r.r, effect_size=r.r)


def _rank_correlated(sample: Sample) -> Figures:
    """p by permuting ranks within pairs, the interval over the pairs' own rhos."""
    half = sample.table.shape[1] // 2
    p = mean_rho_p(sample.table[:, :half], sample.table[:, half:], sample.hypothesis.claimed_side)
    return Figures(p, bca_interval(sample.differences, 0.95), effect_size=float(sample.differences.mean()))


_FLIPS = tests.smallest_p
_OWN: dict[str, Procedure] = {
    "greater": Procedure(_directional, simulated.directional, smallest_p=_FLIPS),
    "less": Procedure(_directional, simulated.directional, smallest_p=_FLIPS),
    "much_greater": Procedure(_past_margin, simulated.directional, smallest_p=_FLIPS),
    "much_less": Procedure(_past_margin, simulated.directional, smallest_p=_FLIPS),
    "equivalent": Procedure(_equivalent, simulated.equivalent, smallest_p=lambda n: max(_FLIPS(n), SMALLEST_P_DRAWN)),
    "trend": Procedure(_ordered, simulated.ordering, smallest_p=smallest_p_of_order),
    "umbrella": Procedure(_ordered, simulated.ordering, smallest_p=smallest_p_of_order),
    "correlates": Procedure(_correlated, simulated.correlation, is_known_for_any_n=True),
    "rank_correlates": Procedure(_rank_correlated, simulated.ordering, smallest_p=lambda n: SMALLEST_P_DRAWN),
    "chosen_heads": Procedure(
        _directional, simulated.in_half, smallest_p=lambda n: _FLIPS(math.ceil(n / 2)), tested=0.5
    ),
    # Measured by the test of what it repeats.
    "replicates": Procedure(_directional, simulated.directional, smallest_p=_FLIPS),
}
_FROM_OUTSIDE: dict[str, Procedure] = {}


def register(name: str, procedure: Procedure) -> None:
    """Say how a kind of test from outside the package is carried out. name: the id of its `TestKind`.

    Registering again from the same place, as a cell of a notebook that is run twice does, takes the newer procedure.

    Raises:
        ExtensionError: if it is no procedure, or another one of this id is there.
    """
    if not isinstance(procedure, Procedure):
        raise ExtensionError(f"test kind {name!r} is registered with a Procedure, got {procedure!r}")
    known = _OWN.get(name) or _FROM_OUTSIDE.get(name)
    if known is not None and _place(known) != _place(procedure):
        raise ExtensionError(f"there is another procedure of test kind {name!r} already; give this kind another id")
    _FROM_OUTSIDE[name] = procedure


def _place(procedure: Procedure) -> tuple[str, str]:
    test = procedure.test
    return getattr(test, "__module__", ""), getattr(test, "__qualname__", repr(test))


def procedure_of(name: str) -> Procedure:
    """How the kind of test of this id is carried out.

    Raises:
        ExtensionError: where there is no such kind, or it has no procedure.
    """
    found = _OWN.get(name) or _FROM_OUTSIDE.get(name)
    if found is None:
        kind_named(name)  # an installed package registers its kinds and procedures together
        found = _FROM_OUTSIDE.get(name)
    if found is None:
        raise ExtensionError(
            f"test kind {name!r} has no procedure; kvpatch.verdicts.procedures.register says how it is carried out"
        )
    return found


def refuse_unknown(hypotheses: Iterable[Hypothesis]) -> None:
    """Refuse hypotheses whose kind of test nobody can carry out.

    Raises:
        ExtensionError: naming the first such kind.
    """
    for h in hypotheses:
        procedure_of(h.test)


def carry_out(sample: Sample) -> Figures:
    """The numbers of a test; all NaN where there is no unit.

    Raises:
        ExtensionError: where a procedure from outside fails, or returns what is no result.
    """
    name, kind = sample.hypothesis.test, sample.hypothesis.kind
    if len(sample.differences) == 0:
        return Figures(math.nan, Interval(math.nan, math.nan, kind.level))
    procedure = procedure_of(name)
    if name in _OWN:
        return procedure.test(sample)
    at = f"test {name!r} of hypothesis {sample.hypothesis.id!r}"
    try:
        found = procedure.test(sample)
    except Exception as error:
        raise ExtensionError(f"{at} failed: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(found, Figures) or not isinstance(found.interval, Interval):
        raise ExtensionError(f"{at} must return the Figures of a test with an Interval, got {found!r}")
    if not isinstance(found.p, Real) or not (math.isnan(found.p) or 0 <= found.p <= 1):
        raise ExtensionError(f"{at} must return a p from 0 to 1, got {found.p}")
    if found.interval.level != kind.level:
        raise ExtensionError(f"{at} must return an interval of level {kind.level}, got {found.interval.level}")
    if found.interval.low > found.interval.high:
        ends = f"{found.interval.low} to {found.interval.high}"
        raise ExtensionError(f"{at} must return an interval whose low end is not above its high one, got {ends}")
    return found
