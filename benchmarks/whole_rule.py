"""Familywise error and power of a protocol's whole rule: prerequisites, families, their graph, coherence and headline.

    python benchmarks/whole_rule.py [dec7] [--draws 2000] [--n 20] [--only NAME,...]
        [--part 1/6] [--processes 2] [--seed 2009]

Each line is one truth. "nothing": the global null. "mode": the sources evoke the mode, and nothing else is true, so
that most of what waits for it is read. Any other name is a family that is true beside the mode, all else null.
"transfer": B hits in 90% of outputs, a joined or partly swapped cache in 50%, and the likelihood has dz 1.5; at
n = 20, 50, 100.

Of every family the share of runs with a false claim must not pass its alpha, and what may be passed to it, by more than
two standard errors. Each line has a seed of its own, so that `--only` and `--part` give the lines of a whole run; a
sixth of dec7's takes some six minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

from kvpatch.protocols.load import load_protocol
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.readouts import readouts
from kvpatch.verdicts.families import most_alpha
from kvpatch.verdicts.simulated_rule import Assumptions, SimulatedRule, simulate_rule
from kvpatch.verdicts.texts import spelled_role

SEED = 2009
DZ = 1.5
CORRELATION = 0.7
POWER_N = (20, 50, 100)
SCORES = ("recursive_score", "recursive_score_masked")

Values = dict[str, dict[str, float]]


def mode_exists() -> Assumptions:
    """The sources evoke the mode, on every readout of it."""
    return Assumptions(means={"mode_llr": {"B": DZ}}, hits={name: {"B": 0.9} for name in SCORES})


def transfer(protocol: Protocol) -> Assumptions:
    """A strong transfer: whatever takes the source's cache, in part or read before, hits in half of its outputs."""
    moved = [
        name
        for name, c in protocol.conditions.items()
        if spelled_role(c) is None
        and c.from_ == "source"
        and (c.joined is not None or (c.patch is not None and c.patch.donor == "source" and c.patch.layers is None))
    ]
    return Assumptions(
        means={"mode_llr": {"B": DZ} | dict.fromkeys(moved, DZ)},
        hits={name: {"B": 0.9} | dict.fromkeys(moved, 0.5) for name in SCORES},
    )


def one_family(protocol: Protocol, family: str) -> Assumptions:
    """The mode exists, and every claim of one family is true by a large effect."""
    base = mode_exists()
    means: Values = {name: dict(of) for name, of in base.means.items()}
    hits: Values = {name: dict(of) for name, of in base.hits.items()}
    correlations: dict[str, float] = {}
    for h in protocol.hypotheses:
        if h.family != family or h.kind.certifies_absence:
            continue
        if h.kind.measures == "correlation":
            correlations[h.id] = CORRELATION * h.claimed_side
            continue
        names, peak = h.order() if h.is_ordering else ([], 0)
        raised = {name: DZ * (1 - abs(i - peak) / len(names)) for i, name in enumerate(names)}
        raised = raised or {name: DZ * h.claimed_side for name, weight in h.weights().items() if weight > 0}
        for name, effect in raised.items():
            _raise(protocol, means, hits, (h.readout, name), effect)
    return replace(base, means=means, hits=hits, correlations=correlations)


def _raise(protocol: Protocol, means: Values, hits: Values, cell: tuple[str, str], effect: float) -> None:
    """Give a condition an effect, where what is assumed of the mode does not say already what it has."""
    readout, name = cell
    role = spelled_role(protocol.conditions[name])
    if readout in hits:
        if role not in ("source", "target"):
            hits[readout][name] = 0.6 * effect / DZ if effect > 0 else 0.0
    elif not (readout in ("mode_llr",) and role in ("source", "target")):
        of = means.setdefault(readout, {})
        same = next((n for n in of if role is not None and spelled_role(protocol.conditions[n]) == role), name)
        of[same] = effect


def truth_named(protocol: Protocol, name: str) -> Assumptions:
    if name == "nothing":
        return Assumptions(hits={score: {} for score in SCORES})
    if name == "mode":
        return mode_exists()
    return transfer(protocol) if name == "transfer" else one_family(protocol, name)


def simulated(job: tuple[str, str, int | None, int, int]) -> tuple[str, int | None, SimulatedRule, float]:
    name, protocol_name, n, draws, seed = job
    protocol, start = load_protocol(protocol_name), time.monotonic()
    found = simulate_rule(protocol, truth_named(protocol, name), n, draws, seed + zlib.crc32(name.encode()))
    return name, n, found, time.monotonic() - start


def told(protocol: Protocol, name: str, n: int | None, found: SimulatedRule, seconds: float) -> str:
    """One line of the table: errors of the family that comes nearest to its bound, of all, and the headline."""
    bounds: Mapping[str, float] = most_alpha(protocol)
    draws = found.draws
    most = {f: a + 2 * math.sqrt(a * (1 - a) / draws) for f, a in bounds.items()}
    exploratory = {h.family for h in protocol.hypotheses if not h.confirmatory}
    mapped = {f for f, c in protocol.corrections.items() if c == "benjamini_hochberg"} | exploratory
    over = [f"{f} {k / draws:.4f} > {most[f]:.4f}" for f, k in found.false_in.items() if k / draws > most[f]]
    worst = max((f for f in found.false_in if f not in mapped), key=lambda f: found.false_in[f] / draws / most[f])
    rate = found.false_in[worst] / draws
    said = "; ".join(f for f in over if f.split()[0] not in mapped) or "none"
    nearest = f"{worst} {rate:.4f} of {bounds[worst]:.4f} (at most {most[worst]:.4f})"
    return (
        f"| {name} | {n or 'planned'} | {nearest} | {said} | "
        f"{found.any_false / draws:.3f} | {found.strongest / draws:.3f} | {seconds:.0f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", nargs="?", default="dec7")
    parser.add_argument("--draws", type=int, default=2_000)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--only", default="")
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    protocol = load_protocol(given.protocol)
    known = set(readouts())
    assert all(h.readout in known for h in protocol.hypotheses), "a readout is not registered"
    confirmatory = list(dict.fromkeys(h.family for h in protocol.hypotheses if h.confirmatory))
    names = given.only.split(",") if given.only else ["nothing", "mode", *confirmatory, "transfer"]
    jobs = [
        (name, given.protocol, n, given.draws, given.seed)
        for name in names
        for n in (POWER_N if name == "transfer" else (given.n,))
    ]
    part, parts = map(int, given.part.split("/"))
    jobs = jobs[part - 1 :: parts]
    print("| true | n | nearest to its bound | over it | any false claim | strongest sentence | time |")
    print("|---|---|---|---|---|---|---|")
    with ProcessPoolExecutor(given.processes) as pool:
        for done in as_completed([pool.submit(simulated, job) for job in jobs]):
            name, n, found, seconds = done.result()
            print(told(protocol, name, n, found, seconds), flush=True)


if __name__ == "__main__":
    main()
