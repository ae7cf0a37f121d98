"""How work grows: seconds a trial and a token, and memory, as pairs and new tokens grow.

    python benchmarks/growth.py [--model smollm2-135m] [--rows 64] [--pairs 25 50 100 200] [--new-tokens 32 64 128]

Every line is Phase 1's own conditions, planned, decoded, read out and stored; past the bank's 100 pairs each is sampled
again. "of more" is what the trials cost that a line has over the line before: a run's fixed costs are not in it, and a
device's first batch, which is not full, is not either.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import kvpatch
from kvpatch.engine.model import Model
from kvpatch.executors.local import LocalExecutor
from kvpatch.planned import plan_for
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.load import load_protocol
from kvpatch.store.directory import Store

BANK_PAIRS = 100


@dataclass(frozen=True)
class Taken:
    """What a run took: trials and the tokens they wrote, seconds, and bytes held at most (by the process so far on a
    CPU, on a GPU by this run)."""

    trials: int
    tokens: int
    seconds: float
    held: int


def phase1(model: Model, pairs: int, new_tokens: int, rows: int | None = None) -> Taken:
    """Run Phase 1's own conditions on so many pairs."""
    protocol = load_protocol("dec7")
    phase = protocol.phases["1"].model_copy(update={"n": min(pairs, BANK_PAIRS), "controls": []})
    changed = {"max_new_tokens": new_tokens, "samples": max(1, pairs // BANK_PAIRS)}
    protocol = protocol.model_copy(
        update={
            "phases": {"1": phase},
            "hypotheses": [],
            "generation": protocol.generation.model_copy(update=changed),
        }
    )
    on_gpu = model.backbone.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    plan, _ = plan_for({None: model}, protocol, load_bank(protocol.bank), seed=0, n=None, phases=None)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "run")
        with store.locked():
            executor = LocalExecutor({None: model}, {None: rows})
            executor.run(plan, store, on_tokens=lambda rows: None, on_batch=lambda batch, written: None)
        seconds = time.perf_counter() - start
        table = store.read()
    held = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Taken(table.num_rows, sum(table["n_tokens"].to_pylist()), seconds, held)


def grow(model: Model, pairs: Sequence[int], new_tokens: Sequence[int], rows: int | None = None) -> None:
    """Print a table of growing pairs at the middle number of tokens, and one of growing tokens at that of pairs."""
    phase1(model, 4, 8, rows)  # warms up
    tokens, at = sorted(new_tokens)[len(new_tokens) // 2], sorted(pairs)[len(pairs) // 2]
    print(f"{tokens} new tokens")
    _table("pairs", "trials", 1e3, "ms", ((count, phase1(model, count, tokens, rows)) for count in pairs))
    print(f"{at} pairs")
    _table("new tokens", "tokens", 1e6, "us", ((count, phase1(model, at, count, rows)) for count in new_tokens))


def _table(grown: str, unit: Literal["trials", "tokens"], scale: float, short: str, runs: Iterable[tuple[int, Taken]]):
    """A line a run, as it comes: time for each unit, for each that it has more than the run before, and memory."""
    print(f"{grown:>10} {unit:>8} {'seconds':>8} {short + ' each':>9} {'of more, ' + short:>12} {'GiB held':>9}")
    before: Taken | None = None
    for count, now in runs:
        units, more = getattr(now, unit), ""
        if before is not None:
            more = f"{scale * (now.seconds - before.seconds) / (units - getattr(before, unit)):.1f}"
        print(
            f"{count:10} {units:8} {now.seconds:8.1f} {scale * now.seconds / units:9.1f} {more:>12} "
            f"{now.held / 2**30:9.2f}",
            flush=True,
        )
        before = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, help="rows at a time; on a CPU one stored batch if not given")
    parser.add_argument("--pairs", type=int, nargs="+", default=[25, 50, 100, 200])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[32, 64, 128])
    options = parser.parse_args()
    model = kvpatch.load(options.model, dtype=options.dtype)
    print(f"{options.model}, {options.dtype}, {model.backbone.device.type}, {options.rows or 'planned'} rows at a time")
    grow(model, options.pairs, options.new_tokens, options.rows)


if __name__ == "__main__":
    main()
