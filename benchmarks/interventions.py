"""What an intervention costs: a whole batch, every readout included, against the same batch of natural runs.

    python benchmarks/interventions.py [--model smollm2-135m] [--pairs 32]

Every figure is a ratio to condition A on the same pairs, measured in this process in this call: the median over
rounds of an intervention between two natural runs, since a busy machine slows down either.
"""

from __future__ import annotations

import argparse
import statistics
import time

import kvpatch
from kvpatch.engine.model import Model
from kvpatch.executors.batch import run_batch
from kvpatch.planned import plan_for
from kvpatch.planning.plan import Batch
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.load import load_protocol

CONDITIONS = ("I_V", "I_QKV", "I_R24", "I_Rall", "I_S24", "I_S24d", "M1", "M2_1", "M3_body")


def batches(model: Model, names: tuple[str, ...], pairs: int) -> dict[str, Batch]:
    """For every condition one batch of that condition alone, all on the same pairs."""
    protocol = load_protocol("dec7")
    out = {}
    for name in names:
        phase = protocol.phases["interventions"].model_copy(update={"conditions": [name], "controls": []})
        single = protocol.model_copy(update={"phases": {"interventions": phase}, "hypotheses": []})
        plan, _ = plan_for({None: model}, single, load_bank(protocol.bank), seed=0, n=pairs, phases=["interventions"])
        out[name] = plan.batches[-1]
    return out


def seconds(model: Model, batch: Batch) -> float:
    start = time.perf_counter()
    run_batch(model, batch)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = kvpatch.load(options.model)
    planned = batches(model, ("A", *CONDITIONS), options.pairs)
    for name in ("I_S24", "A"):  # warm up: directions of the calibration pairs are made once a run
        seconds(model, planned[name])
    before = seconds(model, planned["A"])
    print(f"{options.model}, {len(planned['A'].trials)} trials a batch; A takes {before:.1f} s")
    for name in CONDITIONS:
        ratios = []
        for _ in range(options.rounds):
            taken = seconds(model, planned[name])
            after = seconds(model, planned["A"])
            ratios.append(2 * taken / (before + after))
            before = after
        told = ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
        print(f"{name:8} {statistics.median(ratios):5.2f} times A   (of {told})", flush=True)


if __name__ == "__main__":
    main()
