"""Time and memory of `kvpatch plan` for a protocol of millions of trials.

    python benchmarks/planning.py [--trials 5000000] [--conditions 2560] [--samples 2]

The protocol is a map: one condition for every layer, KV head, slot and strength of a patch, as many as asked for; its
bank has pairs enough for the trials. Both are written into a temporary directory, and another process plans them on a
model of random weights with the Llama architecture (4 layers, 2 KV heads), since what a plan costs does not depend on
the weights. Prints seconds and the peak of resident memory of the whole command, imports and loading included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
WORDS = ("soup", "stew", "rice", "cake", "tart", "toast", "curry", "salad", "bread", "pasta")
SHIPS = ("sloop", "ketch", "barge", "yacht", "dhow", "canoe", "junk", "punt", "cog", "brig")


def written(folder: Path, conditions: int, pairs: int, samples: int) -> Path:
    """Write bank and protocol; returns the protocol's file."""
    from small import CONDITIONS, CONTINUATIONS, protocol_content, write_bank

    names = [f"{a} number {b}" for b, a in itertools.product(range(pairs), WORDS)][: pairs + 3]
    ships = [f"{a} number {b}" for b, a in itertools.product(range(pairs), SHIPS)][: pairs + 3]
    entries = [
        {"id": f"t{i}", "group": "plain", "topic": w, "domain": "food", "text": f"How long should {w} cook?"}
        for i, w in enumerate(names)
    ]
    entries += [
        {"id": f"s{i}", "group": "recursive", "topic": w, "domain": "sea", "text": f"Describe how {w} notes arise."}
        for i, w in enumerate(ships)
    ]
    for (mode, side), texts in CONTINUATIONS.items():
        domain = "food" if side == "target" else "sea"
        entries += [
            {"id": f"{mode}-{side}-{i}", "mode": mode, "topic_of": side, "domain": domain, "text": text}
            for i, text in enumerate(texts)
        ]
    own = {name: CONDITIONS[name] for name in ("A", "B", "C")}
    grid = itertools.product(range(4), range(2), range(5), (k / 200 for k in range(1, 201)))
    for layer, head, slot, strength in itertools.islice(grid, conditions - len(own)):
        patch = {"layers": [layer], "kv_heads": [head], "slots": [slot], "align": "end", "strength": strength}
        own[f"l{layer}h{head}s{slot}x{round(200 * strength)}"] = {"about": "", "from": "source", "patch": patch}
    bank = write_bank(folder / "bank", entries)
    content = protocol_content(bank, conditions=own)
    content["generation"]["samples"] = samples
    content["phases"] = {"1": {"question": "?", "n": pairs, "conditions": list(own)}}
    content["hypotheses"] = [h for h in content["hypotheses"] if h["contrast"] != "C - N1"]
    path = folder / "map.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=5_000_000)
    parser.add_argument("--conditions", type=int, default=2_560)
    parser.add_argument("--samples", type=int, default=2)
    asked = parser.parse_args()
    from tiny import tiny_model_dir

    per_pair = asked.conditions * asked.samples
    with tempfile.TemporaryDirectory() as folder:
        protocol = written(Path(folder), asked.conditions, -(-asked.trials // per_pair), asked.samples)
        model = tiny_model_dir("llama", Path(folder), chat=True)
        words = ["plan", str(protocol), "--model", str(model), "--no-timing", "--json", "--device", "cpu"]
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "kvpatch", *words], capture_output=True, text=True, env={**os.environ}
        )
        seconds = time.monotonic() - start
        if done.returncode:
            sys.exit(done.stderr)
        summary = json.loads(done.stdout)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        print(f"{summary['trials']:,} trials planned in {seconds:.1f} s, peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
