"""Heads that one half of the units chooses and the other half tests, from attention/*.parquet of a run directory.

numpy, pyarrow and the standard library alone. The words are those of docs/statistics.md.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from hashlib import sha256

import numpy as np
import pyarrow.parquet as pq
from recompute_numbers import SEED, on_grid, step_of
from recompute_rows import terms


def heads_of(directory, readout):
    """Trial -> (layer, head) -> its number while the trial read the pair's fixed continuation."""
    name = readout.removeprefix("attention_")
    lines = [json.loads(line) for line in (directory / "parts.jsonl").read_text("utf-8").splitlines()]
    out = defaultdict(dict)
    for part in dict.fromkeys(line["part"] for line in lines if line.get("attention_sha256")):
        stored = pq.ParquetFile(directory / "attention" / part)
        statistic = name if name in stored.schema_arrow.names else f"mass_{name}"
        for row in stored.read(["trial_id", "layer", "head", "stage", statistic]).to_pylist():
            if row["stage"] == "forced":
                out[row["trial_id"]][row["layer"], row["head"]] = row[statistic]
    return out


def contrasts(rows, heads, weights):
    """Pair -> (layer, head) -> its contrast, of pairs that have every head under every condition; and all heads."""
    samples = defaultdict(lambda: defaultdict(list))
    known = set()
    for row in rows:
        if row["condition"] not in weights or row["failed"]:
            continue
        for head, value in heads.get(row["trial_id"], {}).items():
            known.add(head)
            if value is not None and not math.isnan(value):
                samples[row["pair_id"]][row["condition"], head].append(value)
    out = {}
    for pair, found in samples.items():
        if all((name, head) in found for name in weights for head in known):
            means = {key: math.fsum(values) / len(values) for key, values in found.items()}
            out[pair] = {head: sum(weights[name] * means[name, head] for name in sorted(weights)) for head in known}
    return out, sorted(known)


def of_chosen_heads(directory, rows, h, units):
    """One number a testing unit, on the grid and sorted: the mean contrast of the chosen heads, as they are turned."""
    by_pair, heads = contrasts(rows, heads_of(directory, h["readout"]), terms(h["contrast"]))
    grouped = defaultdict(list)
    for pair in sorted(by_pair):
        grouped[units.get(pair, pair)].append([by_pair[pair][head] for head in heads])
    means = {unit: [math.fsum(column) / len(of) for column in zip(*of, strict=True)] for unit, of in grouped.items()}
    drawn = sorted(means, key=lambda unit: sha256(f"{SEED} {unit}".encode()).hexdigest())
    half = len(drawn) // 2
    if half < 2:
        return np.zeros(0)
    chosen = best(np.array([means[unit] for unit in sorted(drawn[:half])]))
    values = [sum(turn * means[unit][i] for i, turn in chosen) / len(chosen) for unit in sorted(drawn[half:])]
    return on_grid(values)


def best(table):
    """(Place of a head, the way it went), those furthest from 0 first. table: [choosing units, heads]."""
    ranked = []
    for place, column in enumerate(table.T):
        step = step_of(column)
        x = np.rint(column / step) * step if step else column * 0
        mean, sd = float(x.mean()), float(x.std(ddof=1))
        size = abs(mean) / sd if sd > 0 else (math.inf if mean else 0.0)
        ranked.append((-size, -abs(mean), place, 1 if mean >= 0 else -1))
    count = max(1, round(0.05 * len(ranked)))
    return [(place, turn) for _, _, place, turn in sorted(ranked)[:count]]
