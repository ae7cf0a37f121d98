"""A sweep of layers by slots against the loop that one writes by hand on transformers: time as a ratio, and equality.

    python benchmarks/sweep.py [--model smollm2-135m] [--tokens 24] [--threads 2] [--parts kv]

The loop puts one slot of one layer into a copy of the target's `DynamicCache`, feeds the pending token, and takes the
difference of two logits. Both ways run in this call on the same prompts, after one short run of each that is not timed.
"""

from __future__ import annotations

import argparse
import inspect
import time

import torch
from transformers import DynamicCache

import kvpatch as kv
from kvpatch.caches.kvcache import KVCache

SOURCE = (
    "The Colosseum stands in the middle of a city whose river is the Tiber and whose oldest name we know to be that of"
)
TARGET = (
    "The Prado stands in the middle of a city whose river is the Manzanares and whose oldest name we think may be of"
)
ANSWERS = (" Rome", " Madrid")


def by_hand(model: kv.Model, source: KVCache, target: KVCache, parts: str, layers: range) -> torch.Tensor:
    """[layers, slots]: the loop."""
    one, two = (model.continuation_ids(answer)[0] for answer in ANSWERS)
    name = next(n for n in inspect.signature(model.hf.model.forward).parameters if n in ("cache", "past_key_values"))
    found = torch.zeros(len(layers), target.slots)
    pairs = list(zip(target.keys, target.values, strict=True))
    with torch.no_grad():
        for layer in layers:
            for slot in range(target.slots):
                cache = DynamicCache()
                for i, (k, v) in enumerate(pairs):
                    k, v = k.clone(), v.clone()
                    if i == layer and "k" in parts:
                        k[:, :, slot] = source.keys[i][:, :, slot]
                    if i == layer and "v" in parts:
                        v[:, :, slot] = source.values[i][:, :, slot]
                    cache.update(k, v, i)
                position = target.pending_position[:, None]
                logits = model.hf(target.pending[:, None], position_ids=position, **{name: cache}).logits[0, -1].float()
                found[layer - layers[0], slot] = logits[one] - logits[two]
    return found


def pair_of(model: kv.Model, tokens: int) -> tuple[KVCache, KVCache]:
    """Source and target of so many cached slots."""
    ids = [model.continuation_ids(text)[: tokens + 1] for text in (SOURCE, TARGET)]
    if min(map(len, ids)) < tokens + 1:
        raise SystemExit(f"the texts have {min(map(len, ids))} tokens; ask for fewer")
    source, target = (model.prefill(model.tokenizer.decode(row), chat=False) for row in ids)
    if {source.slots, target.slots} != {tokens}:
        raise SystemExit("a text is cut into other tokens once it is shortened; ask for another number")
    return source, target


def main() -> None:
    """Print seconds, the ratio and the largest difference."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--tokens", type=int, default=24)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--parts", default="kv", choices=["k", "v", "kv"])
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    model = kv.load(asked.model, device="cpu")
    source, target = pair_of(model, asked.tokens)
    metric, over = kv.logit_difference(*ANSWERS), {"layers": "each", "slots": "each", "parts": asked.parts}
    model.sweep(source, target, over | {"layers": [0, 1]}, metric)
    by_hand(model, source, target, asked.parts, range(1))
    start = time.perf_counter()
    grid = model.sweep(source, target, over, metric, progress=False)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    expected = by_hand(model, source, target, asked.parts, range(target.layers))
    loop = time.perf_counter() - start
    off = float((torch.tensor(grid.data.values) - expected).abs().max())
    print(f"{target.layers} layers x {target.slots} slots, parts {asked.parts}, {torch.get_num_threads()} threads")
    print(f"sweep {ours:.2f} s, loop {loop:.2f} s: {loop / ours:.1f} times as fast; largest difference {off:.1e}")


if __name__ == "__main__":
    main()
