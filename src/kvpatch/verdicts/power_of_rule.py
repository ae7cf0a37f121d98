"""Power of the whole rule: how often a run would say yes, prerequisites, families, coherence and all.

Power of a test is not power of the rule: tests of .97 each were a yes in a third of the runs. What is taken to be true
comes from a person, or from a pilot; `simulated_rule` decides simulated runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field, ValidationError

from kvpatch.errors import ProtocolError
from kvpatch.files import NotYaml, bytes_within, read_yaml
from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.base import Frozen
from kvpatch.specs.nearest import instead
from kvpatch.statistics.floors import zeros_dominate
from kvpatch.statistics.trend import order_scores
from kvpatch.verdicts.measure import measure, measured_as
from kvpatch.verdicts.pairs import pair_means, prepare, rows_of
from kvpatch.verdicts.prerequisites import coherence_shares
from kvpatch.verdicts.simulated_cells import SD, Assumptions
from kvpatch.verdicts.simulated_rule import simulate_rule
from kvpatch.verdicts.texts import spelled_role

DRAWS = 50
"""Simulated runs: a power is then known to 7 percentage points, in less than a minute for dec7."""
SLICE = 25
"""Simulated runs between two reports of how far it is."""
OTHER_N = (20, 50)
_UNLIKELY_MOVER = 100.0
"""How reluctantly a dz is explained by a condition that is subtracted, against one that is added."""


class Assumed(Frozen):
    """What a person takes to be true, as a YAML file says it.

    `dz` of a hypothesis is the mean of its contrast over the standard deviation of its pair differences (of an
    ordering, of its slopes), with its sign. `means`, `hits`, `correlations` and `coherent` are those of `Assumptions`.
    """

    dz: dict[str, float] = Field(default={}, description="hypothesis -> dz of its contrast")
    means: dict[str, dict[str, float]] = Field(default={}, description="readout -> condition -> mean, in dz from 0")
    hits: dict[str, dict[str, float]] = Field(
        default={}, description="readout -> condition -> share of outputs with a hit"
    )
    correlations: dict[str, float] = Field(default={}, description="hypothesis -> its true correlation")
    coherent: dict[str, float] = Field(default={}, description="condition -> share of coherent outputs")


class RulePower(Frozen):
    """How often simulated runs of n pairs passed one hypothesis, or certified its equivalence.

    alone: by its own test at its own alpha. whole: by the whole rule. standard_error: of `whole`. is_true: whether the
    claim is true under what was assumed; where it is not, both are rates of error. strongest, any_false: the share of
    runs that had the strongest headline, and that made a false confirmatory claim.
    """

    id: str
    n: int
    is_planned: bool
    alone: float
    whole: float
    standard_error: float
    is_true: bool
    strongest: float
    any_false: float


def read_assumptions(path: Path) -> Assumed:
    """What a YAML file assumes.

    Raises:
        ProtocolError: where it can't be read, or says something else.
    """
    try:
        content = read_yaml(bytes_within(path).decode("utf-8"))
        return Assumed.model_validate(content or {})
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ProtocolError(f"the assumptions {path} can't be read: {reason}") from error
    except NotYaml as error:
        raise ProtocolError(f"the assumptions {path} are no YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ProtocolError(f"the assumptions {path}: {where}: {first['msg']}") from error


def assumptions_of(protocol: Protocol, assumed: Assumed) -> Assumptions:
    """The same by conditions: the smallest means that give every contrast its dz, moved on the side that is added.

    Raises:
        ProtocolError: for what the protocol does not have, and for dz that no means give together.
    """
    known = [h.id for h in protocol.hypotheses]
    for name in assumed.dz:
        if name not in known:
            raise ProtocolError(f"no hypothesis {name!r} to assume a dz of; {instead(name, known)}")
        h = protocol.hypothesis(name)
        if h.kind.measures == "correlation":
            raise ProtocolError(f"{name!r} is a correlation: give it under 'correlations', and not as a dz")
        if h.readout in assumed.hits or h.readout in assumed.means:
            raise ProtocolError(f"{h.readout!r} is assumed by conditions, so that {name!r} can't have a dz as well")
    found, off = means_of(protocol, assumed.dz)
    if off:
        raise ProtocolError(f"no means give these dz together: {', '.join(off)}")
    out = Assumptions({**found, **assumed.means}, assumed.hits, assumed.correlations, assumed.coherent)
    out.refuse_unknown(protocol)
    return out


def every_claim_holds(protocol: Protocol, dz: float) -> Assumptions:
    """What is assumed where nothing is given: every directional claim is true at this dz and every equivalence at 0, as
    nearly as claims that exclude each other allow; a correlation of the same size, r = d / root of (d^2 + 4)."""
    wanted, correlations = dict[str, float](), dict[str, float]()
    for h in protocol.hypotheses:
        asked = measured_as(protocol, h)
        if asked.kind.measures == "correlation":
            correlations[h.id] = h.claimed_side * dz / math.sqrt(dz**2 + 4)
        elif asked.kind.claims in ("beyond", "apart"):
            wanted[h.id] = asked.claimed_side * dz
        else:
            wanted[h.id] = 0.0
    return Assumptions(means_of(protocol, wanted)[0], {}, correlations, {})


def means_of(protocol: Protocol, dz: Mapping[str, float]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Readout -> condition -> mean that gives contrasts their dz, as nearly as can be, and the hypotheses whose dz it
    does not give. Conditions that are one prompt's text have one mean."""
    out: dict[str, dict[str, float]] = {}
    off: list[str] = []
    by_readout: dict[str, list[Hypothesis]] = {}
    for name in dz:
        h = measured_as(protocol, protocol.hypothesis(name))
        by_readout.setdefault(h.readout, []).append(h)
    for readout, members in by_readout.items():
        rows = [_row(protocol, h) for h in members]
        names = list(dict.fromkeys(name for row in rows for name in row))
        matrix = np.array([[row.get(name, 0.0) for name in names] for row in rows])
        wanted = np.array(
            [dz[h.id] * SD * math.sqrt(sum(x**2 for x in row.values())) for h, row in zip(members, rows, strict=True)]
        )
        moved = {
            name for h, row in zip(members, rows, strict=True) for name, x in row.items() if x * (dz[h.id] or 1) > 0
        }
        ease = np.array([1.0 if name in moved else 1 / _UNLIKELY_MOVER for name in names])
        found = ease * np.linalg.lstsq(matrix * ease, wanted, rcond=None)[0]
        out[readout] = {name: float(value) for name, value in zip(names, found, strict=True)}
        off += [h.id for h, miss in zip(members, np.abs(matrix @ found - wanted), strict=True) if miss > 1e-6]
    return out, off


def _row(protocol: Protocol, h: Hypothesis) -> dict[str, float]:
    """Condition -> its weight in what is averaged, texts of one prompt under the name of the first of them."""
    if h.is_ordering:
        names, peak = h.order()
        weights: dict[str, float] = dict(zip(names, order_scores(len(names), peak).tolist(), strict=True))
    else:
        weights = {name: float(weight) for name, weight in h.weights().items()}
    out: dict[str, float] = {}
    for name, weight in weights.items():
        own = _same_text(protocol, name)
        out[own] = out.get(own, 0.0) + weight
    return {name: weight for name, weight in out.items() if weight}


def _same_text(protocol: Protocol, name: str) -> str:
    role = spelled_role(protocol.conditions[name])
    if role is None:
        return name
    return next(other for other, c in protocol.conditions.items() if spelled_role(c) == role)


def assumptions_of_pilot(protocol: Protocol, trials: pd.DataFrame) -> Assumptions:
    """What a pilot's trials say, taken for the truth: dz of every contrast it measured, as nearly as conditions of
    equal spread give them together; shares of hits where a readout is mostly 0; correlations; shares of coherent
    outputs."""
    rows = prepare(trials)
    measured = {h.id: measure(protocol, rows, h) for h in protocol.hypotheses}
    hits = _hits(protocol, rows)
    is_known = {name: m.differences.n >= 3 and math.isfinite(m.dz) for name, m in measured.items()}
    ids = [h.id for h in protocol.hypotheses if is_known[h.id]]
    is_r = {name: measured[name].kind.measures == "correlation" for name in ids}
    dz = {i: measured[i].dz for i in ids if not is_r[i] and protocol.hypothesis(i).readout not in hits}
    correlations = {i: float(np.clip(measured[i].estimate, -0.99, 0.99)) for i in ids if is_r[i]}
    shares: dict[str, list[float]] = {}
    for (_, condition), of in coherence_shares(rows).items():
        if math.isfinite(of.share) and condition in protocol.conditions:
            shares.setdefault(condition, []).append(of.share)
    coherent = {name: float(np.mean(found)) for name, found in shares.items()}
    return Assumptions(means_of(protocol, dz)[0], hits, correlations, coherent)


def _hits(protocol: Protocol, rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Readout -> condition -> share of pairs with a hit, of readouts that are mostly 0. Texts of a prompt have one."""
    test = rows_of(rows, split="test")
    out: dict[str, dict[str, float]] = {}
    for readout in dict.fromkeys(h.readout for h in protocol.hypotheses if h.transform == "none"):
        if readout not in test.columns:
            continue
        names = [name for name in protocol.conditions if name in set(test["condition"])]
        means = pair_means(test, names, readout)
        values = means.to_numpy(dtype=float)
        if not zeros_dominate(values[np.isfinite(values)]):
            continue
        found: dict[str, list[float]] = {}
        for name in names:
            own = means[name].dropna().to_numpy(dtype=float)
            if len(own):
                found.setdefault(_same_text(protocol, name), []).append(float(np.mean(own > 0)))
        out[readout] = {name: float(np.mean(of)) for name, of in found.items()}
    return out


def power_of_rule(
    protocol: Protocol,
    assumptions: Assumptions,
    pairs: Sequence[int | None],
    draws: int = DRAWS,
    seed: int = 0,
    on_draws: Callable[[int], None] = lambda count: None,
) -> list[RulePower]:
    """Power of every hypothesis alone and by the whole rule, for each number of pairs; None for the phases' own.

    on_draws: told how many simulated runs were decided since it was last told; twice `draws` for each number of pairs.
    Raises:
        ProtocolError: for a number of pairs or draws below 1, or assumptions that the protocol can't have.
    """
    out: list[RulePower] = []
    alone = by_itself(protocol)
    bare = Assumptions(assumptions.means, assumptions.hits, assumptions.correlations, {})
    for n in pairs:
        whole = list(_slices(protocol, assumptions, n, draws, seed, on_draws))
        own = list(_slices(alone, bare, n, draws, seed, on_draws))
        share = draws and 1 / draws
        for h in protocol.hypotheses:
            passed = sum(of.passed(h.id) * of.draws for of in whole) * share
            out.append(
                RulePower(
                    id=h.id,
                    n=n or protocol.phases[h.phase].n,
                    is_planned=n is None,
                    alone=sum(of.passed(h.id) * of.draws for of in own) * share,
                    whole=passed,
                    standard_error=math.sqrt(passed * (1 - min(passed, 1.0)) * share),
                    is_true=whole[0].is_true[h.id],
                    strongest=sum(of.strongest for of in whole) * share,
                    any_false=sum(of.any_false for of in whole) * share,
                )
            )
    return out


def _slices(
    protocol: Protocol, assumptions: Assumptions, n: int | None, draws: int, seed: int, on_draws: Callable[[int], None]
) -> Iterable[Any]:
    for place, start in enumerate(range(0, max(draws, 1), SLICE)):
        count = min(SLICE, draws - start)
        yield simulate_rule(protocol, assumptions, n, count, seed + 7_919 * place)
        on_draws(count)


def by_itself(protocol: Protocol) -> Protocol:
    """The protocol of which each hypothesis waits for none and has a family, and its alpha, to itself."""
    alone = [
        h.model_copy(update={"needs": [], "family": f"alone {h.id}", "is_gatekeeper": False})
        for h in protocol.hypotheses
    ]
    return protocol.model_copy(update={"hypotheses": alone, "families": {}, "corrections": {}})
