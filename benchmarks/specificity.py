"""How far does each cache move the mode readout of a bank, the source's and others that hold no mode or nothing at all?

    python benchmarks/specificity.py MODEL [--bank recursion] [--pairs 40] [--seed 0]

For every pair all items of its two domains are scored, in both modes and persons, after the natural target (A), the
natural source (B), both foreign partners (N1, N1y), another plain prompt that says "you" (PY), the empty prompt (N2)
and five caches that hold the source destroyed. Printed: mean and dz over pairs of each less A, over the first eight
tokens, and as a share of B - A. Needs a bank that states persons.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator

import numpy as np
import pandas as pd

import kvpatch as kv
from kvpatch.engine.model import Model
from kvpatch.engine.score import score
from kvpatch.errors import KvpatchError
from kvpatch.planning.pairing import Pair, form_pairs
from kvpatch.prompts.bank import Bank, load_bank
from kvpatch.protocols.load import load_protocol

DESTROYED = {
    "E1": "shuffle_values", "E2": "shuffle_rerotate", "E3": "shuffle_heads", "F1": "gaussian_isotropic",
    "F2": "gaussian_fitted",
}  # fmt: skip
TOKENS = 8


def caches(model: Model, pair: Pair, bank: Bank, seed: int) -> Iterator[tuple[str, kv.KVCache]]:
    """Condition -> its cache."""
    others = [p for p in bank.group("plain") if p.addressed and p.domain != pair.target.domain]
    texts = {"A": pair.target, "B": pair.source, "N1": pair.foreign, "N1y": pair.foreign_matched}
    texts["PY"] = random.Random(seed).choice(others)
    natural = {name: model.prefill([prompt.text]) for name, prompt in texts.items() if prompt is not None}
    yield from natural.items()
    try:
        yield "N2", model.prefill([model.encode("", may_be_empty=True)])
    except KvpatchError as error:
        print(f"N2 left out: {error}", file=sys.stderr)
    for name, donor in DESTROYED.items():
        if name != "E3" or model.geometry.kv_heads > 1:
            yield name, kv.Patch(align="replace", donor=donor).apply(natural["B"], natural["A"], seed=seed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bank", default="recursion")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, bank = kv.load(options.model, dtype="float32"), load_bank(options.bank)
    dec7 = load_protocol("dec7")
    lengths = {prompt.id: model.encode(prompt.text).body_length for prompt in bank.prompts}
    every = dec7.model_copy(update={"readouts": dec7.readouts.model_copy(update={"continuations_per_cell": 99})})
    rows = []
    for number, pair in enumerate(form_pairs(bank, every, lengths, options.seed).pairs[: options.pairs]):
        cells = [c for cell in pair.continuations for c in cell]
        ids = [model.continuation_ids(c.text)[:TOKENS] for c in cells]
        for name, cache in caches(model, pair, bank, number):
            logprobs = score(model.backbone, cache, [ids]).logprobs[0].float().cpu().numpy()
            for c, row in zip(cells, logprobs, strict=True):
                rows.append((number, name, c.topic_of, c.mode, c.person, float(np.nanmean(row))))
        print(f"{number + 1} of {options.pairs} pairs", file=sys.stderr, end="\r")
    table = pd.DataFrame(rows, columns=["pair", "condition", "topic", "mode", "person", "nats"])
    means = table.groupby(["pair", "condition", "topic", "mode", "person"])["nats"].mean().unstack("mode")
    mode = (means[dec7.mode] - means["plain"]).groupby(["pair", "condition"]).mean().unstack("condition")
    apart = mode.sub(mode["A"], axis=0).drop(columns="A")
    told = pd.DataFrame({"mean": apart.mean(), "dz": apart.mean() / apart.std()})
    told["share of B"] = told["mean"] / told["mean"]["B"]
    print(f"{options.model}, {options.bank}, {len(apart)} pairs, {model.backbone.device}")
    print(told.round(3).to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
