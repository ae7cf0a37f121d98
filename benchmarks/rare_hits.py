"""How often "equivalent" is said of a readout with few hits, where the true effect is twice the margin.

    python benchmarks/rare_hits.py [--draws 1000] [--power-draws 200]

Every draw is judged by the whole verdict (`kvpatch.verdicts.decide.verdicts`) at a fixed margin. A draw that the
floors alone keep from being equivalent needs no test, so thousands of draws are quick; `is_equivalent` says
what the verdict would, and tests/statistics/test_rare_hits.py holds one to the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kvpatch.protocols.schema import Protocol
from kvpatch.statistics.floors import rare_contrast_bounds, zeros_dominate
from kvpatch.verdicts.decide import verdicts

SEED = 15
N = (12, 20, 50, 100)
SHARES = (0.03, 0.05, 0.10)
RATE = 2.0
"""Mean hits per 100 words where there are any."""
READOUT = "score"


@dataclass(frozen=True)
class Case:
    """What is drawn: shares of outputs with a hit under X and under A, how hits vary, and the margin.

    rates: "equal" (every hit is `RATE`), "exponential" or "lognormal" with that mean.
    """

    share: float
    base: float
    rates: str
    margin: float

    @property
    def effect(self) -> float:
        """Mean of X - A, in hits per 100 words."""
        return (self.share - self.base) * RATE


def protocol(margin: float) -> Protocol:
    """One equivalence test of X - A within a fixed margin."""
    conditions = {
        "A": {"about": "natural target"},
        "B": {"about": "natural source", "into": "source"},
        "X": {"about": "body only", "from": "source", "patch": {"slots": "body"}},
    }
    hypothesis = {
        "id": "h", "claim": "nothing moves", "phase": "1", "contrast": "X - A", "readout": READOUT,
        "test": "equivalent", "margin": {"value": margin}, "family": "f", "gate": 1, "alpha": 0.05,
    }  # fmt: skip
    return Protocol.model_validate(
        {
            "protocol": "rare", "title": "Rare hits", "question": "?", "conditions": conditions,
            "phases": {"1": {"question": "?", "n": 12, "conditions": list(conditions)}}, "hypotheses": [hypothesis],
        }
    )  # fmt: skip


def draw(case: Case, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Condition -> the readout of n pairs, one output each."""
    shares = {"A": case.base, "X": case.share}
    return {name: (rng.random(n) < share) * _rates(case.rates, n, rng) for name, share in shares.items()}


def trials_of(values: dict[str, np.ndarray]) -> pd.DataFrame:
    """The rows of a run that gave these values."""
    rows = [
        {
            "trial_id": f"{condition}-{i}", "phase": "1", "split": "test", "condition": condition,
            "pair_id": f"p{i:03d}", "sample": 0, READOUT: value, "coherent": True, "error": None,
        }
        for condition, column in values.items()
        for i, value in enumerate(column)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _rates(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "equal":
        return np.full(n, RATE)
    return rng.exponential(RATE, n) if kind == "exponential" else rng.lognormal(np.log(RATE) - 0.5, 1, n)


def may_be_equivalent(values: dict[str, np.ndarray], margin: float) -> bool:
    """Whether the floors alone leave room for "equivalent"."""
    both = np.concatenate(list(values.values()))
    if (both == both[0]).all():
        return False
    if not zeros_dominate(both):
        return True
    bounds = rare_contrast_bounds([(1, values["X"]), (-1, values["A"])], np.empty(0))
    return -margin < bounds.low and bounds.high < margin


def is_equivalent(asked: Protocol, values: dict[str, np.ndarray], margin: float) -> bool:
    """Whether the whole verdict is "equivalent"."""
    return may_be_equivalent(values, margin) and verdicts(asked, trials_of(values))[0].verdict == "equivalent"


def rate(case: Case, n: int, draws: int) -> float:
    """Share of draws whose verdict is "equivalent"."""
    asked, rng = protocol(case.margin), np.random.default_rng([SEED, n, int(1000 * case.share)])
    return float(np.mean([is_equivalent(asked, draw(case, n, rng), case.margin) for _ in range(draws)]))


def rare_cases(rates: str) -> Iterator[Case]:
    """A true effect of twice the margin: hits under X alone, or on top of hits that A has as well."""
    for share in SHARES:
        yield Case(share, 0.0, rates, share * RATE / 2)
        yield Case(2 * share, share, rates, share * RATE / 2)


def plenty() -> Iterator[Case]:
    """No effect, and hits in 40 to 95% of outputs; the margin is a fifth of a gap of 5 hits per 100 words."""
    for share in (0.4, 0.6, 0.8, 0.95):
        yield Case(share, share, "exponential", 1.0)


def table(title: str, cases: Iterator[Case], draws: int) -> None:
    print(f"\n{title}, {draws} draws a cell")
    print("| hits X | hits A | rates | margin | effect | " + " | ".join(f"n={n}" for n in N) + " |")
    print("|---" * (5 + len(N)) + "|")
    for case in cases:
        cells = " | ".join(f"{rate(case, n, draws):.1%}" for n in N)
        what = f"{case.share:.0%} | {case.base:.0%} | {case.rates} | {case.margin:.3g} | {case.effect:.3g}"
        print(f"| {what} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--power-draws", type=int, default=200)
    args = parser.parse_args()
    for rates in ("equal", "exponential", "lognormal"):
        table(f'"equivalent" at twice the margin, {rates} rates', rare_cases(rates), args.draws)
    table('"equivalent" where there is no effect and plenty of hits', plenty(), args.power_draws)


if __name__ == "__main__":
    main()
