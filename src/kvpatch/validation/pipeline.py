"""`kvpatch validate`: run the real pipeline on organisms, and hold what it says against what was planted.

    jobs (plain data) -> a process a core -> readings -> findings, each with what was planted and what was found

Every job has a seed of its own, which draws a prompt bank, the pairs and the trials' noise.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import kvpatch
from kvpatch.checks.identities import check
from kvpatch.engine.loading import load
from kvpatch.engine.model import Model
from kvpatch.files import cache_directory
from kvpatch.organisms.directories import WEIGHTS, organism_directory
from kvpatch.organisms.language import BODY
from kvpatch.organisms.wired import KV_HEADS, Wiring, wire, write_directory
from kvpatch.protocols.load import load_protocol
from kvpatch.protocols.schema import Calibration, Protocol
from kvpatch.specs.organisms import ORGANISMS, PREFIX, Organism, Plant
from kvpatch.specs.readouts import MODE, SCORE
from kvpatch.store.validation import Finding, Validation, code_sha256
from kvpatch.validation import judging
from kvpatch.validation.banks import LADDERS, Sizes, bank_entries, write_bank
from kvpatch.validation.jobs import Job, Reading
from kvpatch.validation.recovery import decide, expected_carriers, locate

PROTOCOL = "validate"
MODE_TESTS = ("mode_exists_score", "mode_exists_llr", "transfer_llr", "transfer_masked", "transfer_joined_llr",
              "transfer_joined_masked")  # fmt: skip


@dataclass(frozen=True)
class Scope:
    """How much is run: seeds an organism, pairs, and numbers of the simulated runs."""

    name: str
    seeds: int
    draws: int
    pairs: int
    located_pairs: int
    null_runs: int
    weak_runs: int
    checked: tuple[str, ...]


QUICK = Scope("quick", 1, 4, 13, 8, 12, 12, ("wired-mistral", "early"))
FULL = Scope("full", 5, 50, 24, 16, 200, 100, tuple(ORGANISMS))
CALIBRATION = 10
REAL = "wired"
"""The organism beside which impostors are held: the same weights, with a mode."""
NULL_PAIRS, WEAK_PAIRS = 20, 20


def jobs_of(scope: Scope, seed: int, names: Sequence[str], weights: Path) -> list[Job]:
    """Everything a validation does, the longest first."""

    def job(kind: str, name: str, number: int, pairs: int) -> Job:
        return Job(kind, name, seed * 100_003 + number, pairs, str(weights))

    seeds = range(scope.seeds)
    out = [job("verdicts", name, i, scope.pairs) for i in seeds for name in names if not ORGANISMS[name].impostor]
    out += [job("locate", name, i, scope.located_pairs) for i in seeds for name in names if _is_located(name)]
    out += [job("impostor", name, i, scope.pairs) for i in seeds for name in names if ORGANISMS[name].impostor]
    if "wired" in names:
        out += [job("draw", "wired", 1000 + i, scope.located_pairs) for i in range(scope.draws)]
    if "null" in names:
        out += [job("null", "null", 2000 + i, NULL_PAIRS) for i in range(scope.null_runs)]
    if "weak" in names:
        out += [job("weak", "weak", 3000 + i, WEAK_PAIRS) for i in range(scope.weak_runs)]
    return out + [job("check", name, 0, 0) for name in scope.checked if name in names]


def _is_located(name: str) -> bool:
    organism = ORGANISMS[name]
    return organism.plant is not None and name != "umbrella"  # umbrella has the weights of dose


def validate(
    scope: Scope,
    *,
    seed: int = 0,
    names: Sequence[str] | None = None,
    processes: int | None = None,
    weights: Path = WEIGHTS,
    on_job: Callable[[Job, int, int], None] | None = None,
) -> Validation:
    """Run a validation.

    Args:
        names: organisms, all if None; a part of them vouches for nothing, and is not kept for gate 0.
        processes: one a core, up to 16, if None; 1 works in this process.
        weights: directory of trained weights, the shipped ones if not given.
        on_job: told of each job that is done, how many are, and how many there are.
    """
    chosen = list(ORGANISMS) if names is None else list(names)
    start = time.monotonic()
    jobs = jobs_of(scope, seed, chosen, weights)
    readings = []
    for reading in _done(jobs, processes or min(os.cpu_count() or 1, 16)):
        readings.append(reading)
        if on_job:
            on_job(reading.job, len(readings), len(jobs))
    readings.sort(key=lambda r: jobs.index(r.job))
    findings = [finding for reading in readings for finding in reading.findings]
    measured = judging.over_all(readings, load_protocol(PROTOCOL))
    return Validation(
        version=kvpatch.__version__,
        code_sha256=code_sha256(),
        scope=scope.name if names is None else f"{scope.name}, {', '.join(chosen)} alone",
        seed=seed,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - start, 1),
        findings=[*judging.merged(findings), *measured.findings],
        measured=measured.figures,
    )


def _done(jobs: Sequence[Job], processes: int):
    """Readings as they come."""
    if processes == 1:
        yield from map(run_job, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin) as pool:
        waiting: list[Future[Reading]] = [pool.submit(run_job, job) for job in jobs]
        for done in as_completed(waiting):
            yield done.result()


def _begin() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    gc.freeze()  # statsmodels collects garbage at every correction; what is imported need not be looked through


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next job for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_job(job: Job) -> Reading:
    """Do one job, in a directory of its own that is gone afterwards. A job that can't be done is a finding too."""
    with tempfile.TemporaryDirectory(prefix="kvpatch-validate-") as folder:
        try:
            return _KINDS[job.kind](job, Path(folder))
        except Exception as error:
            if os.environ.get("KVPATCH_DEBUG"):
                raise
            found = f"{type(error).__name__}: {' '.join(str(error).split())}"
            failed = Finding(
                organism=job.organism, asked=f"{job.kind} runs", planted="it does", found=found, holds=False
            )
            return Reading(job, [failed], {})


@functools.lru_cache(maxsize=4)
def _model(name: str, weights: str) -> Model:
    return load(organism_directory(name, cache_directory(), Path(weights)), device="cpu")


def _bank(organism: Organism, folder: Path, seed: int, sizes: Sizes, slot: int | None = None) -> Path:
    entries = bank_entries(organism.slot if slot is None else slot, seed, sizes, dose=LADDERS[organism.ladder])
    return write_bank(folder / "bank", entries)


def _base(bank: Path) -> Protocol:
    base = load_protocol(PROTOCOL)
    calibration = base.calibration.model_copy(update={"pairs": CALIBRATION})
    return base.model_copy(update={"bank": str(bank), "calibration": calibration})


def _check(job: Job, folder: Path) -> Reading:
    bad = [i.identity for i in check(_model(job.organism, job.weights)) if i.holds is False]
    found = "all hold" if not bad else f"fails: {bad[0]}"
    return Reading(
        job, [Finding(organism=job.organism, asked="check", planted="all hold", found=found, holds=not bad)], {}
    )


def _verdicts(job: Job, folder: Path) -> Reading:
    organism = ORGANISMS[job.organism]
    bank = _bank(organism, folder, job.seed, Sizes(pairs=job.pairs + CALIBRATION))
    protocol = _base(bank)
    expected = judging.expected_verdicts(protocol, job.organism)
    phases = judging.phases_to_run(protocol, expected)
    models: dict[str | None, Model] = {None: _model(job.organism, job.weights)}
    needed = {protocol.phases[name].model for name in phases} - {None}
    models |= {key: _model(protocol.models[key].removeprefix(PREFIX), job.weights) for key in needed if key}
    rows, decided = decide(protocol, models, folder / "run", seed=job.seed, n=job.pairs, phases=phases)
    figures = {"coherence": judging.coherence_alarms(protocol, rows)}
    return Reading(job, judging.verdict_findings(job.organism, decided, expected, protocol, rows), figures)


def _locate(job: Job, folder: Path) -> Reading:
    organism = ORGANISMS[job.organism]
    assert organism.plant is not None
    return _located(job, folder, _model(job.organism, job.weights), organism.plant, organism.slot)


def _draw(job: Job, folder: Path) -> Reading:
    """A wired organism whose layer, KV head, slot and part are drawn."""
    rng = np.random.default_rng(job.seed)
    wiring = Wiring(
        layer=int(rng.integers(0, 6)),
        kv_head=int(rng.integers(0, KV_HEADS)),
        slot=int(rng.integers(0, BODY)),
        part=("k", "v", "kv")[rng.integers(0, 3)],
    )
    model = load(write_directory(wire(wiring), folder / "model"), device="cpu")
    plant = Plant((wiring.layer,), (wiring.kv_head,), (wiring.slot,), () if wiring.part == "kv" else (wiring.part,))
    return _located(job, folder, model, plant, wiring.slot)


def _located(job: Job, folder: Path, model: Model, plant: Plant, slot: int) -> Reading:
    organism = ORGANISMS[job.organism]
    bank = _bank(organism, folder, job.seed, Sizes(pairs=job.pairs + CALIBRATION, others=1, subjects=1), slot)
    protocol = load_protocol(PROTOCOL)
    found = locate(protocol, bank, model, folder / "run", seed=job.seed, pairs=job.pairs, calibration=CALIBRATION)
    truth = expected_carriers(plant)
    return Reading(
        job,
        [judging.place_finding(job.organism, kind, truth[kind], found, job.kind) for kind in truth],
        {"places": [p.model_dump() | {"truth": float(p.index in truth[p.kind])} for p in found.places]},
    )


def _null(job: Job, folder: Path) -> Reading:
    _, decided = _phase_1(job, folder, MODE_TESTS, ["A", "B", "C", "N1", "M1", "M1n"])
    return Reading(job, [], {v.id: {"verdict": v.verdict, "p": v.p} for v in decided})


def _weak(job: Job, folder: Path) -> Reading:
    rows, decided = _phase_1(job, folder, (judging.POWER_TEST, "mode_exists_llr"), ["A", "B"])
    kept = rows[["pair_id", "phase", "split", "condition", SCORE, MODE, "error"]].copy()
    kept["pair_id"] = [f"{job.seed}:{pair}" for pair in kept["pair_id"]]
    verdict = next(v.verdict for v in decided if v.id == judging.POWER_TEST)
    return Reading(job, [], {"verdict": verdict, "rows": kept, "n": job.pairs})


def _phase_1(
    job: Job, folder: Path, hypotheses: Sequence[str], conditions: list[str]
) -> tuple[pd.DataFrame, list[judging.Verdict]]:
    """Phase 1 with some of its conditions and hypotheses alone."""
    organism = ORGANISMS[job.organism]
    bank = _bank(organism, folder, job.seed, Sizes(pairs=job.pairs + CALIBRATION, others=1, subjects=1))
    base = _base(bank)
    phase = base.phases["1"].model_copy(update={"conditions": conditions, "controls": []})
    asked = [h for h in base.hypotheses if h.id in hypotheses]
    update = {
        "phases": {"1": phase},
        "hypotheses": asked,
        "models": {},
        "expected": {},
        "corrections": {},
        "families": {},
    }
    model = _model(job.organism, job.weights)
    return decide(base.model_copy(update=update), {None: model}, folder / "run", seed=job.seed, n=job.pairs)


def _impostor(job: Job, folder: Path) -> Reading:
    """How far the marker moves every readout of the mode in an impostor, beside the organism in which it is a mode; the
    mode readout is fitted on the caches that a real run destroys."""
    organism, calibration = ORGANISMS[job.organism], load_protocol("dec7").calibration
    sizes = Sizes(pairs=job.pairs + CALIBRATION, others=1, subjects=1, in_persons=organism.impostor == "register")
    bank = _bank(organism, folder, job.seed, sizes)
    own = _phase_1_of(job, folder / "own", bank, calibration.model_copy(update={"pairs": CALIBRATION}))
    real = replace(job, organism=REAL)
    beside = _phase_1_of(real, folder / "real", bank, Calibration(pairs=CALIBRATION))
    return Reading(job, judging.impostor_findings(job.organism, own, beside), {})


def _phase_1_of(job: Job, folder: Path, bank: Path, calibration: Calibration) -> pd.DataFrame:
    """The trials of the natural runs of phase 1, calibrated so."""
    base = _base(bank)
    phase = base.phases["1"].model_copy(update={"conditions": ["A", "B"], "controls": []})
    update = {"phases": {"1": phase}, "hypotheses": [], "models": {}, "expected": {}, "corrections": {}, "families": {}}
    readouts = base.readouts.model_copy(update={"semantic": None})  # its direction is of another mode, in English
    protocol = base.model_copy(update=update | {"calibration": calibration, "readouts": readouts})
    return decide(protocol, {None: _model(job.organism, job.weights)}, folder, seed=job.seed, n=job.pairs)[0]


_KINDS: dict[str, Callable[[Job, Path], Reading]] = {
    "check": _check,
    "verdicts": _verdicts,
    "locate": _locate,
    "draw": _draw,
    "null": _null,
    "weak": _weak,
    "impostor": _impostor,
}
