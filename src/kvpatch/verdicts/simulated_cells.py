"""What a simulated run holds: the values of its pairs under every condition, from what is taken to be true."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from kvpatch.errors import ProtocolError
from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.nearest import instead
from kvpatch.specs.readouts import readouts
from kvpatch.statistics.grid import Floats
from kvpatch.verdicts.texts import spelled_role

HIT, MORE_HITS = 2.2, 0.5
"""A hit's score per 100 words in an output of some 45 words, and how many more an output with one has on average."""
SD = math.sqrt(0.5)
"""Standard deviation of one condition of a pair, so that the difference of two has 1 and its mean is a dz."""

Values = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Assumptions:
    """What is taken to be true. Conditions that are the same prompt's text, by spelling, have one value between them.

    means: readout -> condition -> mean, in standard deviations of a difference of two conditions, so that B at 1.5 and
    A at 0 is a dz of 1.5; 0 where none is given. Of a readout of which logarithms are tested, of the logarithm.
    hits: readout -> condition -> share of outputs with a hit, for readouts that count something rare; such a readout
    has no means.
    correlations: hypothesis -> its true correlation; 0 where none is given.
    coherent: condition -> share of its outputs that are coherent; 1 where none is given.
    """

    means: Values = field(default_factory=dict)
    hits: Values = field(default_factory=dict)
    correlations: Mapping[str, float] = field(default_factory=dict)
    coherent: Mapping[str, float] = field(default_factory=dict)

    def refuse_unknown(self, protocol: Protocol) -> None:
        """Refuse what the protocol does not have, or what can't be.

        Raises:
            ProtocolError: naming the first such thing.
        """
        for values in (self.means, self.hits):
            _known(values, readouts(), "readout")
            for of_conditions in values.values():
                _known(of_conditions, protocol.conditions, "condition")
        _known(self.coherent, protocol.conditions, "condition")
        _known(self.correlations, [h.id for h in protocol.hypotheses], "hypothesis")
        if both := sorted(set(self.means) & set(self.hits)):
            raise ProtocolError(f"readout {both[0]!r} is assumed to have means and hits; it has one or the other")
        shares = [*self.coherent.values(), *(share for of in self.hits.values() for share in of.values())]
        if wrong := [share for share in shares if not 0 <= share <= 1]:
            raise ProtocolError(f"a share lies from 0 to 1, got {wrong[0]:g}")
        if wrong := [r for r in self.correlations.values() if not -1 < r < 1]:
            raise ProtocolError(f"a correlation lies between -1 and 1, got {wrong[0]:g}")


def _known(names: Iterable[str], known: Iterable[str], what: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise ProtocolError(f"no {what} {name!r} to assume something of; {instead(name, known)}")


class Cells:
    """The values of a chunk of simulated runs, drawn when they are first asked for.

    A pair has one value of a readout under a condition, whichever phase reads it: phases that pair prompts alike have
    their pairs in common, as a run has, and the first pairs of one are those of another.
    """

    def __init__(self, protocol: Protocol, assumptions: Assumptions, n: int | None, draws: int, seed: int) -> None:
        self.protocol, self.assumptions, self.draws, self.seed = protocol, assumptions, draws, seed
        self._pairs = {name: n or phase.n for name, phase in protocol.phases.items()}
        self._drawn: dict[str, Floats] = {}

    def pairs(self, phase: str) -> int:
        """How many pairs a phase has."""
        return self._pairs[phase]

    def values(self, phase: str, condition: str, readout: str) -> Floats:
        """[draws, pairs] of a condition in a phase."""
        of = self.protocol.phases[phase]
        group = f"{of.model}/{phase if of.pairing is not None else ''}"
        return self._cell(f"test/{group}", condition, readout, max(self._pairs.values()))[:, : self._pairs[phase]]

    def calibration(self, phase: str, condition: str, readout: str) -> Floats:
        """[draws, pairs] of a condition on the calibration pairs of a phase's model."""
        model = self.protocol.phases[phase].model
        return self._cell(f"calibration/{model}", condition, readout, self.protocol.calibration.pairs)

    def noise(self, name: str, shape: tuple[int, ...]) -> Floats:
        """Standard normal values that belong to a name, [draws, *shape]."""
        return self._rng(name).standard_normal((self.draws, *shape))

    def coherent(self, phase: str, condition: str) -> list[int]:
        """How many of the outputs of a condition are coherent in each draw."""
        share = self.assumptions.coherent.get(condition, 1.0)
        return self._rng(f"coherent/{phase}/{condition}").binomial(self._pairs[phase], share, self.draws).tolist()

    def weights(self, weights: Mapping[str, int]) -> dict[str, int]:
        """The weights of a contrast by what its conditions are: texts of one prompt are one, and may cancel."""
        out: dict[str, int] = {}
        first: dict[str, str] = {}
        for name, weight in weights.items():
            own = first.setdefault(self._identity(name), name)
            out[own] = out.get(own, 0) + weight
        return {name: weight for name, weight in out.items() if weight}

    def mean(self, condition: str, readout: str) -> float:
        """The true mean of a condition."""
        if readout in self.assumptions.hits:
            return self._assumed(self.assumptions.hits[readout], condition) * HIT * (1 + MORE_HITS)
        return self._assumed(self.assumptions.means.get(readout, {}), condition)

    def variance(self, condition: str, readout: str) -> float:
        """The true variance of a condition."""
        if readout not in self.assumptions.hits:
            return SD**2
        share = self._assumed(self.assumptions.hits[readout], condition)
        return share * HIT**2 * ((1 + MORE_HITS) ** 2 + MORE_HITS) - self.mean(condition, readout) ** 2

    def _identity(self, condition: str) -> str:
        role = spelled_role(self.protocol.conditions[condition])
        return f"condition {condition}" if role is None else f"text of {role}"

    def _assumed(self, of: Mapping[str, float], condition: str) -> float:
        """What is assumed of a condition, or of another one that is the same text."""
        same = [name for name in of if self._identity(name) == self._identity(condition)]
        found = {of[name] for name in same}
        if len(found) > 1:
            raise ProtocolError(f"{' and '.join(same)} are one prompt's text, and can't differ; one value is enough")
        return found.pop() if found else 0.0

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def _cell(self, group: str, condition: str, readout: str, pairs: int) -> Floats:
        key = f"{group}/{self._identity(condition)}/{readout}"
        if key not in self._drawn:
            rng, shape = self._rng(key), (self.draws, pairs)
            if readout in self.assumptions.hits:
                has = rng.random(shape) < self._assumed(self.assumptions.hits[readout], condition)
                self._drawn[key] = np.where(has, HIT * (1 + rng.poisson(MORE_HITS, shape)), 0.0)
            else:
                self._drawn[key] = self.mean(condition, readout) + SD * rng.standard_normal(shape)
        return self._drawn[key]


def true_contrast(cells: Cells, weights: Mapping[str, int], readout: str) -> tuple[float, float]:
    """The true mean of a contrast, and its true standard deviation over pairs."""
    own = cells.weights(weights)
    mean = math.fsum(weight * cells.mean(name, readout) for name, weight in own.items())
    return mean, math.sqrt(math.fsum(weight**2 * cells.variance(name, readout) for name, weight in own.items()))


def true_means(cells: Cells, h: Hypothesis) -> Floats:
    """The true mean of each condition of an ordering, in its order, [levels]."""
    return np.array([cells.mean(name, h.readout) for name in h.order()[0]])
