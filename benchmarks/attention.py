"""What capturing attention costs: time as a ratio to the same pass without it, memory as what it adds to the peak.

    python benchmarks/attention.py [--tokens 4096] [--rounds 3] [--threads N]

One prompt of SmolLM2, every layer and head. Rounds of both ways are interleaved, each figure is the median, and times
are of the processor, so that neighbours on the machine count for less. Linux only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import kvpatch as kv
from kvpatch.caches.kvcache import Segment
from kvpatch.engine.attention import AttentionRequest
from kvpatch.engine.prefill import prefill_pass, prefill_with_attention
from kvpatch.models.template import EncodedPrompt

TEXT = "The model reads each word of this sentence, and what it has read changes how the next one is read. "


def measured(work: Callable[[], object]) -> tuple[float, float, int]:
    """Processor and wall seconds of a piece of work, and the highest memory of the process while it ran, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # the mark of the peak starts anew
    wall, start = time.perf_counter(), time.process_time()
    work()
    seconds = time.process_time() - start, time.perf_counter() - wall
    status = Path("/proc/self/status").read_text().splitlines()
    return *seconds, next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    """Print a row a way."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--tokens", type=int, default=4096)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--threads", type=int)
    asked = options.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    model = kv.load(asked.model, device="cpu")
    ids = model.continuation_ids(TEXT * (asked.tokens // 10))[: asked.tokens]
    prompt = EncodedPrompt(tuple(ids), (int(Segment.body),) * len(ids), ("",) * len(ids))
    ways = {
        "without": lambda: prefill_pass(model.backbone, [prompt]),
        "captured": lambda: prefill_with_attention(model.backbone, [prompt], AttentionRequest()),
    }
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in ways}
    ways["without"]()  # what is made once, is made
    for _ in range(asked.rounds):
        for name, way in ways.items():
            found[name].append(measured(way))
    middle = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    g = model.geometry
    for name, (processor, wall, peak) in middle.items():
        print(f"{name:10s} processor {processor:7.2f} s   wall {wall:7.2f} s   peak {peak / 1e6:7.0f} MB")
    ratio = middle["captured"][0] / middle["without"][0]
    added = (middle["captured"][2] - middle["without"][2]) / 1e6
    maps = 4 * g.layers * g.query_heads * len(ids) ** 2 / 1e9
    print(f"{len(ids)} tokens, {torch.get_num_threads()} threads: {ratio:.2f} times the time, {added:.0f} MB added")
    print(f"whole maps would be {maps:.1f} GB")


if __name__ == "__main__":
    main()
