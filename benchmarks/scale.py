"""Simulate a run on 1, 8, 64 and 512 GPUs: where the time goes, what saturates first, and what it costs in GPU-hours.

    python benchmarks/scale.py [--trials 5000000] [--gpus 1 8 64 512] [--store s3|disk] [--tokens 200] [--scored 1480]

Discrete events: one driver, workers that hold a model each on `gpus_per_worker` GPUs, one store. A worker asks the
driver for a batch, runs it, and writes its part in a second thread while the next batch runs; the driver names what has
arrived in the index, many parts at a time, and hands out more. Every rate below says whether it was measured (see
LOG.md) or is assumed, and any of them can be given: `--set driver=5000`.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

BATCH = 120
"""Trials of a batch (`kvpatch.planning.plan.ROWS_PER_BATCH`)."""


@dataclass(frozen=True)
class Rates:
    """What things take. `SOURCES` says where each figure is from."""

    decode: float = 32_873.0  # tokens per second and worker
    prefill: float = 42_013.0
    score: float = 40_681.0
    rows: float = 660 / 33.1 * 16  # trials per second whose rows the worker's host makes
    load: float = 60.0  # seconds until a worker holds its model
    gpus_per_worker: float = 1.0
    driver: float = 6_500.0  # trials per second that the driver hands out, watches and names
    hand_over: float = 0.002  # seconds on the way between driver and worker
    part: float = 0.030  # seconds to write a part, beside its bytes
    trial_bytes: float = 4_000.0
    line_bytes: float = 220.0  # of a part's line in the index
    bandwidth: float = 100e6  # bytes per second of one writer
    store: float = 3_000.0  # writes per second that the store takes in one folder
    index: float = 0.030  # seconds to write the index, beside its bytes
    is_rewritten: float = 1.0  # whether the whole index is written each time, as on an object store


EIGHT = Rates()
SEVENTY = replace(
    EIGHT,
    **{name: getattr(EIGHT, name) * 8.03 / 70.6 * 2 * 0.85 for name in ("decode", "prefill", "score")},
    load=180.0,
    gpus_per_worker=2.0,
)
SHAPES = {"8B": EIGHT, "70B": SEVENTY}
DISK = {"part": 0.007, "bandwidth": 500e6, "store": 1_000.0, "index": 0.005, "is_rewritten": 0.0}
"""A file system that all workers see, in place of S3."""

SOURCES = {
    "decode": "8B measured: H200, bf16, 1,024 rows, batch-invariant (LOG.md, 2026-11-29). 70B assumed: by parameters, "
    "two GPUs at 0.85 of twice one",
    "prefill": "the same",
    "score": "the same, 16 texts of 8 tokens and one of 24",
    "rows": "assumed: 16 times what a GPU gives; measured as hidden behind it without the semantic score",
    "load": "assumed: process, imports, 16 GB (140 GB) of weights from a shared file system, check",
    "gpus_per_worker": "assumed: 141 GB each; 70B needs two in bf16",
    "driver": "measured: `benchmarks/workers.py driver`, 2 workers on 2 cores, at 17% of one: a lower bound",
    "hand_over": "assumed",
    "part": "disk measured: 120 rows made into Parquet, flushed and moved in 6.8 ms on two cores. S3 assumed: 30 ms",
    "trial_bytes": "assumed, of 64 tokens with every readout",
    "line_bytes": "measured",
    "bandwidth": "assumed",
    "store": "assumed: S3 documents 3,500 writes per second and prefix",
    "index": "assumed; moto on the loopback interface 2 ms",
    "is_rewritten": "by design (docs/decisions/022-object-stores.md); a disk's is added to",
}


@dataclass(frozen=True)
class Work:
    """What a trial is made of: tokens that are prefilled (its share of a pair's), written and scored.

    The defaults are those of phase 1 of dec7 with every readout: 200 new tokens, and 24 of the 33 s of 660 trials for
    scoring (LOG.md, 2026-11-29). A map with short outputs needs far fewer.
    """

    prefill: float = 40.0
    tokens: float = 200.0
    scored: float = 1_480.0


@dataclass
class Outcome:
    """Seconds of wall time; GPU-hours; share of the GPUs' time by what they did; share of time that each was busy."""

    gpus: int
    seconds: float
    gpu_hours: float
    spent: dict[str, float]
    busy: dict[str, float]

    @property
    def saturated(self) -> str:
        return max(self.busy, key=lambda name: self.busy[name])


class Simulation:
    """One run; `run` gives its outcome."""

    def __init__(self, trials: int, gpus: int, rates: Rates, work: Work, seed: int = 0) -> None:
        self.rates, self.work, self.gpus = rates, work, gpus
        self.left, self.workers = -(-trials // BATCH), max(1, int(gpus / rates.gpus_per_worker))
        self.random = random.Random(seed)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.now, self.count = 0.0, 0
        self.driver_free = self.store_free = self.index_free = 0.0
        self.named = self.lines = 0
        self.arrived = 0
        self.spent = dict.fromkeys(("starting", "prefill", "decode", "scoring", "waiting for the driver"), 0.0)
        self.spent |= dict.fromkeys(("waiting for rows and parts", "idle at the end"), 0.0)
        self.busy = dict.fromkeys(("GPUs", "driver", "store", "index", "hosts' rows"), 0.0)

    def at(self, when: float, do: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.events, (when, self.count, do))

    def run(self) -> Outcome:
        ended = [0.0] * self.workers
        for worker in range(self.workers):
            start = self.rates.load * self.random.uniform(0.9, 1.3)
            self.spent["starting"] += start
            self.at(start, lambda worker=worker: self.ask(worker, ended, 0.0))
        while self.events:
            self.now, _, do = heapq.heappop(self.events)
            do()
        end = max(self.now, self.index_free)
        self.spent["idle at the end"] = sum(end - each for each in ended)
        total = end * self.workers
        per_gpu = {"GPUs": total, "driver": end, "store": end, "index": end, "hosts' rows": total}
        return Outcome(
            self.gpus,
            end,
            end * self.gpus / 3600,
            {name: value / total for name, value in self.spent.items()},
            {name: value / per_gpu[name] for name, value in self.busy.items()},
        )

    def ask(self, worker: int, ended: list[float], writer_free: float) -> None:
        """A worker asks for a batch, while it still has one: it waits only where the driver is behind."""
        if self.left <= 0:
            ended[worker] = max(self.now, writer_free)
            self.spent["waiting for rows and parts"] += ended[worker] - self.now
            return self.at(ended[worker], lambda: None)
        self.left -= 1
        took = BATCH / self.rates.driver
        self.driver_free = max(self.driver_free, self.now - took) + took
        self.busy["driver"] += took
        ready = max(self.now, self.driver_free) + (self.rates.hand_over if self.driver_free > self.now else 0.0)
        self.spent["waiting for the driver"] += ready - self.now
        self.at(ready, lambda: self.measure(worker, ended, writer_free))

    def measure(self, worker: int, ended: list[float], writer_free: float) -> None:
        rates, work = self.rates, self.work
        varied = self.random.lognormvariate(0.0, 0.1)
        stages = {
            "prefill": BATCH * work.prefill / rates.prefill * varied,
            "decode": BATCH * work.tokens / rates.decode * varied,
            "scoring": BATCH * work.scored / rates.score * varied,
        }
        for name, seconds in stages.items():
            self.spent[name] += seconds
        passed = sum(stages.values())
        self.busy["GPUs"] += passed
        self.at(self.now + passed, lambda: self.write(worker, ended, writer_free))

    def write(self, worker: int, ended: list[float], writer_free: float) -> None:
        """Hand the batch to the worker's second thread; wait where that is still at the one before."""
        begin = max(self.now, writer_free)
        self.spent["waiting for rows and parts"] += begin - self.now
        made = BATCH / self.rates.rows
        self.busy["hosts' rows"] += made
        take = 1 / self.rates.store
        self.store_free = max(self.store_free, begin + made) + take
        self.busy["store"] += take
        stored = self.store_free + self.rates.part + BATCH * self.rates.trial_bytes / self.rates.bandwidth
        self.at(stored + self.rates.hand_over, self.arrive)
        self.at(begin, lambda: self.ask(worker, ended, stored))

    def arrive(self) -> None:
        """A part is written: it is named with those that came while the index was last written."""
        self.arrived += 1
        if self.now >= self.index_free:
            self.name()

    def name(self) -> None:
        if not self.arrived:
            return
        lines, self.arrived = self.arrived, 0
        self.lines += lines
        written = self.lines if self.rates.is_rewritten else lines
        took = self.rates.index + written * self.rates.line_bytes / self.rates.bandwidth
        self.index_free = self.now + took
        self.busy["index"] += took
        self.at(self.index_free, self.name)


def told(outcome: Outcome, shape: str) -> str:
    spent = ", ".join(f"{name} {share:.1%}" for name, share in outcome.spent.items() if share >= 0.001)
    busy = ", ".join(f"{name} {share:.1%}" for name, share in outcome.busy.items())
    return (
        f"{shape} on {outcome.gpus} GPUs: {outcome.seconds / 3600:.2f} h, {outcome.gpu_hours:,.0f} GPU-hours\n"
        f"  time of the workers: {spent}\n  busy: {busy}; nearest to its limit: {outcome.saturated}"
    )


def limits(rates: Rates, work: Work) -> dict[str, float]:
    """GPUs at which each part that all workers share would be busy all the time, were the GPUs never to wait."""
    seconds = work.prefill / rates.prefill + work.tokens / rates.decode + work.scored / rates.score
    per_gpu = 1 / seconds / rates.gpus_per_worker  # trials per second
    return {"driver": rates.driver / per_gpu, "store": rates.store * BATCH / per_gpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=5_000_000)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--store", choices=["s3", "disk"], default="s3")
    parser.add_argument("--tokens", type=float, default=Work.tokens)
    parser.add_argument("--scored", type=float, default=Work.scored)
    parser.add_argument("--set", nargs="*", default=[], metavar="RATE=VALUE")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    known = {each.name for each in fields(Rates)}
    given = {name: float(value) for name, _, value in (each.partition("=") for each in asked.set)}
    if unknown := set(given) - known:
        sys.exit(f"no rate {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    work = replace(Work(), tokens=asked.tokens, scored=asked.scored)
    found: list[dict[str, Any]] = []
    for shape in asked.shape:
        rates = replace(SHAPES[shape], **(DISK if asked.store == "disk" else {}), **given)
        for gpus in asked.gpus:
            if gpus < rates.gpus_per_worker:
                told_of = f"{shape} on {gpus} GPU: does not fit; a worker needs {rates.gpus_per_worker:.0f}"
                print(told_of, file=sys.stderr)
                continue
            outcome = Simulation(asked.trials, gpus, rates, work).run()
            found.append({"shape": shape, **asdict(outcome), "saturated": outcome.saturated})
            if not asked.json:
                print(told(outcome, shape), flush=True)
        if not asked.json:
            most = ", ".join(f"the {name} from {gpus:,.0f} GPUs on" for name, gpus in limits(rates, work).items())
            print(f"{shape}: what all share would be the limit: {most}\n")
    if asked.json:
        print(json.dumps(found, indent=1))
        return
    print("figures:")
    for name, where in SOURCES.items():
        print(f"  {name}: {where}")


if __name__ == "__main__":
    main()
