"""Runs with workers: the same answer as locally, what they cost, kills of workers, and how much one driver passes on.

    python benchmarks/workers.py same [--model smollm2-135m] [--n 20] [--workers 2]
    python benchmarks/workers.py cost [--model smollm2-135m] [--n 12] [--workers 2] [--tokens 16] [--repeats 2]
    python benchmarks/workers.py kills [--kills 5] [--n 20]
    python benchmarks/workers.py driver [--trials 1000000] [--workers 4]

same: `kvpatch run` of phase 1 of dec7 with the local executor on all cores and with workers that share them, in turn;
ids and texts compared. cost: the two executors alone on the same plan, models loaded, in turn and back (local, workers,
workers, local); wall time, and processor time of everything that took part, which other work on the machine changes
less. kills: `kvpatch run` with two workers, of which one is killed (SIGKILL) so many times. driver: batches of 100
trials that do nothing; rows are made, written and named as always.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
PER_BATCH = 100


def kvpatch(*words: object, **environment: str) -> subprocess.Popen[str]:
    """Begin a command."""
    return subprocess.Popen(
        [sys.executable, "-m", "kvpatch", *map(str, words)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def same(model: str, n: int, workers: int, repeats: int) -> None:
    """Bar 1."""
    from kvpatch.store.directory import Store

    folder = Path(tempfile.mkdtemp())
    cores = len(os.sched_getaffinity(0))
    words = ["run", "dec7", "--model", model, "--phases", "1", "--n", n, "--dtype", "float32", "--device", "cpu"]
    ways = {"local": [], f"ray, {workers} workers": ["--on", "ray", "--workers", workers]}
    work: dict[str, list[float]] = {name: [] for name in ways}
    whole: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, more in ways.items():
            out = folder / f"{name[:3]}{repeat}"
            start = time.monotonic()
            child = kvpatch(*words, *more, "--out", out, OMP_NUM_THREADS=str(cores))
            said, _ = child.communicate()
            assert child.returncode == 0, said
            whole[name].append(time.monotonic() - start)
            work[name].append(Store(out).read_record().seconds)
            print(f"{name}: {work[name][-1]:.1f} s at work, {whole[name][-1]:.1f} s in all", flush=True)
    one, two = (Store(folder / f"{name[:3]}0").read().to_pandas().set_index("trial_id") for name in ways)
    print(f"trials {len(one)} and {len(two)}, same ids: {set(one.index) == set(two.index)}, each once: ", end="")
    print(one.index.is_unique and two.index.is_unique)
    two = two.loc[one.index]
    print(f"texts equal: {(one['text'] == two['text']).sum()} of {len(one)}; columns that differ in any bit: ", end="")
    print(sorted(name for name in one if (one[name].map(repr) != two[name].map(repr)).any()) or "none")
    first, second = (min(of) for of in work.values())
    print(f"at work: local {first:.1f} s, workers {second:.1f} s, ratio {second / first:.3f}")
    first, second = (min(of) for of in whole.values())
    print(f"in all: local {first:.1f} s, workers {second:.1f} s, ratio {second / first:.3f}")


def _used() -> float:
    """Processor seconds of this process and of all that it started."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
            total += times.user + times.system
        except psutil.Error:
            continue
    return total


def cost(name: str, n: int, workers: int, tokens: int, repeats: int) -> None:
    """Bar 1: what workers cost beside the work."""
    import torch

    import kvpatch as kv
    from kvpatch.executors.cluster import Asked
    from kvpatch.executors.crew import crew_of
    from kvpatch.executors.host import How
    from kvpatch.executors.local import LocalExecutor
    from kvpatch.executors.ray import RayExecutor
    from kvpatch.executors.worker import ModelSource
    from kvpatch.planned import plan_for
    from kvpatch.prompts.bank import load_bank
    from kvpatch.protocols.load import load_protocol
    from kvpatch.store.directory import Store

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    settings = {"device": "cpu", "dtype": "float32"}
    model = kv.load(name, **settings)
    protocol = load_protocol("dec7")
    generation = protocol.generation.model_copy(update={"max_new_tokens": tokens})
    protocol = protocol.model_copy(update={"generation": generation})
    bank = load_bank(protocol.bank, protocol.folder)
    plan, _ = plan_for({None: model}, protocol, bank, seed=0, n=n, phases=["1"])
    print(f"{plan.n_trials} trials, {len(plan.batches)} batches, {cores} cores", flush=True)
    folder, found = Path(tempfile.mkdtemp()), dict[str, list[tuple[float, float]]]()
    with crew_of({None: ModelSource(name, settings)}, Asked(workers=workers)) as crew:
        while len(crew.ready()) < workers:
            crew.wait(0.5)
        ways: dict[str, Any] = {
            "local": LocalExecutor({None: model}),
            "workers": RayExecutor(crew, How({}, {}, {}), lambda session: None),
        }
        for turn in range(2 * repeats):
            way = ["local", "workers"][(turn + turn // 2) % 2]
            store = Store(folder / f"{way}{turn}")
            with store.locked():
                start, cpu = time.monotonic(), _used()
                ways[way].run(plan, store, on_tokens=lambda _: None, on_batch=lambda *_: None)
                found.setdefault(way, []).append((time.monotonic() - start, _used() - cpu))
            print(f"{way}: {found[way][-1][0]:.1f} s, {found[way][-1][1]:.1f} s of processors", flush=True)
    for place, what in enumerate(("wall", "processors")):
        one, two = (min(of[place] for of in found[way]) for way in ("local", "workers"))
        print(f"{what}: local {one:.1f} s, workers {two:.1f} s, ratio {two / one:.3f}")


def kills(count: int, n: int) -> None:
    """Bar 2."""
    from kvpatch.store.directory import Store
    from kvpatch.store.record import told_of_sessions

    out = Path(tempfile.mkdtemp()) / "run"
    words = ["run", "dec7", "--model", "smollm2-135m", "--phases", "1", "--n", n, "--out", out]
    child = kvpatch(*words, "--on", "ray", "--workers", 2)
    killed: list[int] = []
    while child.poll() is None and len(killed) < count:
        time.sleep(6)
        found = [p for p in psutil.process_iter(["name", "cmdline"]) if "ray::Worker" in " ".join(p.cmdline() or [])]
        ours = [p for p in found if p.pid not in killed and str(child.pid) in map(str, _above(p))]
        if ours and out.joinpath("run.json").exists():
            victim = ours[len(killed) % len(ours)]
            victim.kill()
            killed.append(victim.pid)
            print(f"killed {victim.pid}", flush=True)
    child.communicate()
    store = Store(out)
    ids = store.read(["trial_id", "error"]).to_pandas()
    print(f"exit code {child.returncode}, {len(killed)} kills")
    print(f"{len(ids)} trials, {ids['trial_id'].nunique()} different, {store.read_record().planned} planned, ", end="")
    print(f"{ids['error'].notna().sum()} errors")
    print(told_of_sessions(store.read_record().sessions))


def _above(process: psutil.Process) -> list[int]:
    try:
        return [parent.pid for parent in process.parents()]
    except psutil.Error:
        return []


def driver(trials: int, workers: int) -> None:
    """Bar 3."""
    sys.path.insert(0, str(ROOT / "tests"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    from idle import IdleWorker, idle_plan
    from kvpatch.executors.cluster import Asked
    from kvpatch.executors.crew import crew_of
    from kvpatch.executors.host import How
    from kvpatch.executors.ray import RayExecutor
    from kvpatch.executors.worker import ModelSource
    from kvpatch.store.directory import Store

    plan = idle_plan(trials, PER_BATCH)
    process, store = psutil.Process(), Store(Path(tempfile.mkdtemp()) / "run")
    done, marks, start = 0, list[tuple[int, float, float]](), 0.0

    def on_batch(batch: Any, tokens: int) -> None:
        nonlocal done
        done += len(batch.trials)
        if done % max(PER_BATCH, trials // 10) == 0 or done == PER_BATCH:
            marks.append((done, time.monotonic() - start, process.memory_info().rss / 2**20))
            print(f"{done:9} trials, {done / marks[-1][1]:7.0f} trials/s, driver {marks[-1][2]:.0f} MiB", flush=True)

    with crew_of({None: ModelSource("none")}, Asked(workers=workers), IdleWorker) as crew, store.locked():
        while len(crew.ready()) < workers:
            crew.wait(0.5)
        start, cpu = time.monotonic(), sum(process.cpu_times()[:2])
        RayExecutor(crew, How({}, {}, {}), lambda session: None).run(
            plan, store, on_tokens=lambda tokens: None, on_batch=on_batch
        )
        passed, cpu = time.monotonic() - start, sum(process.cpu_times()[:2]) - cpu
    store.write_text("run.json", "{}")
    parts = store.parts()
    print(f"{trials} trials in {passed:.1f} s: {trials / passed:.0f} trials/s from {workers} workers on ", end="")
    print(f"{len(os.sched_getaffinity(0))} cores; the driver used {100 * cpu / passed:.0f}% of one")
    print(f"parts {len(parts)}, rows {sum(part.rows for part in parts)}, each batch once: ", end="")
    print(len({part.batch for part in parts}) == len(parts) == len(plan.batches))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["same", "cost", "kills", "driver"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--trials", type=int, default=1_000_000)
    given = parser.parse_args(words)
    if given.what == "same":
        same(given.model, given.n, given.workers or 2, given.repeats)
    elif given.what == "cost":
        cost(given.model, given.n, given.workers or 2, given.tokens, given.repeats)
    elif given.what == "kills":
        kills(given.kills, given.n)
    else:
        driver(given.trials, given.workers or 4)


if __name__ == "__main__":
    main()
