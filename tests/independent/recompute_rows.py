"""A run directory read without kvpatch: its protocol, its rows, and what they say of pairs.

numpy, pyarrow and json alone. The words are those of docs/statistics.md.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from recompute_numbers import on_grid

KEYS = (
    "trial_id", "phase", "split", "condition", "pair_id", "source_id", "target_id", "sample", "coherent", "equals_text",
    "error",
)  # fmt: skip
WAYS = ("patch", "in_prefill", "joined", "reshape", "steer_values", "steer_cache", "intervention")
"""Keys of a condition that say how a cache is made."""
NO_RECIPE = ("about", "from", "text_of", "role", "min_kv_heads", "needs_template")
"""Keys of a condition that say nothing of how much a cache is damaged."""
ORDERED = ("trend", "umbrella", "rank_correlates")
"""Tests of which the contrast orders conditions."""
LEVEL = "mode_llr_level"
"""How likely all given continuations are: the first of the covariates of damage."""
PAIRS_OWN = (None, "target", "source")


class Run:
    """A run directory. `rows`: every trial once, as a dictionary."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.record = json.loads((directory / "run.json").read_text("utf-8"))
        self.protocol = self.record["protocol"]
        self.hypotheses = {h["id"]: h for h in self.protocol["hypotheses"]}
        self.conditions = self.protocol["conditions"]
        others = [v for h in self.hypotheses.values() for v in (h["against"], *h["controlling"]) if v]
        self.readouts = {v["readout"] for v in [*self.hypotheses.values(), *others]}
        self.readouts |= {h["ranked_with"] for h in self.hypotheses.values() if h.get("ranked_with")}
        self.rows = self._each_once(self._stored(directory))
        self.of = defaultdict(list)
        for row in self.rows:
            self.of[row["split"], row["phase"]].append(row)
        self.units = {phase: self._units(phase) for phase in self.protocol["phases"]}

    def _stored(self, directory: Path):
        parts = [json.loads(line)["part"] for line in (directory / "parts.jsonl").read_text("utf-8").splitlines()]
        for part in dict.fromkeys(parts):
            stored = pq.ParquetFile(directory / "trials" / part)
            there = set(stored.schema_arrow.names)
            lists = ("source_token_ids", "mode_llr_damage")
            wanted = [name for name in (*KEYS, *sorted(self.readouts), *lists) if name in there]
            yield from stored.read(wanted).to_pylist()

    def _each_once(self, rows):
        """A trial that failed and was done again counts as done."""
        found = {}
        for row in rows:
            row["failed"] = bool((row.get("error") or "").strip())
            ids = row.get("source_token_ids")
            row["source_tokens"] = None if ids is None else len(ids)
            row[LEVEL] = next(iter(row.get("mode_llr_damage") or ()), None)
            key = tuple(row[name] for name in ("trial_id", "phase", "split", "condition", "pair_id"))
            if key not in found or (found[key]["failed"] and not row["failed"]):
                found[key] = row
        return list(found.values())

    def calibration(self, phase=None):
        """Calibration rows; of the model of a phase alone where it is given."""
        rows = [row for (split, _), part in self.of.items() if split == "calibration" for row in part]
        if phase is None:
            return rows
        model = self.protocol["phases"][phase].get("model")
        names = {None: "calibration"} | {key: f"calibration-{key}" for key in self.protocol.get("models", {})}
        others = set(names.values()) - {names[model]}
        return [row for row in rows if row["phase"] not in others]

    def _units(self, phase):
        """Pair -> the first pair of the group that it shares prompts with."""
        alone = {
            name for name, c in self.conditions.items()
            if c.get("from") in PAIRS_OWN and c.get("text_of") in PAIRS_OWN
        }  # fmt: skip
        rows = [row for row in self.of["test", phase] if row["condition"] in alone]
        group = {row["pair_id"]: {row["pair_id"]} for row in rows}
        for side in ("source_id", "target_id"):
            sharing = defaultdict(set)
            for row in rows:
                if row.get(side):
                    sharing[row[side]].add(row["pair_id"])
            for pairs in sharing.values():
                merged = set().union(*(group[pair] for pair in pairs))
                for pair in merged:
                    group[pair] = merged
        return {pair: min(pairs) for pair, pairs in group.items()}


def terms(contrast):
    """Condition -> +1 or -1."""
    found = re.findall(r"([+-]?)\s*([A-Za-z][A-Za-z0-9_]*)", contrast)
    return {name: -1 if sign == "-" else 1 for sign, name in found}


def order(h):
    """Conditions in rising order up to the peak, and the place of the peak."""
    names, signs = re.findall(r"[A-Za-z][A-Za-z0-9_]*", h["contrast"]), re.findall(r"[<>]", h["contrast"])
    if h["test"] != "umbrella":
        return (names if signs[0] == "<" else names[::-1]), len(names) - 1
    return names, signs.index(">")


def value_of(row, readout, transform):
    """A row's number, NaN where it has none that counts."""
    value = row.get(readout)
    if value is None or not math.isfinite(value):
        return math.nan
    if transform == "log":
        return math.log(value) if value > 0 else math.nan
    return float(value)


def means(rows, readout, transform="none"):
    """(pair, condition) -> mean over samples; one sample without a number leaves the pair without one."""
    samples = defaultdict(list)
    for row in rows:
        if not row["failed"]:
            samples[row["pair_id"], row["condition"]].append(value_of(row, readout, transform))
    return {key: math.fsum(values) / len(values) for key, values in samples.items()}


def table(columns, units):
    """[units, columns] of those pairs that have every column, in the order of the pairs, or of the units where pairs
    share one. columns: pair -> number, of each column."""
    pairs = sorted(set.intersection(*(set(c) for c in columns)))
    whole = [p for p in pairs if all(math.isfinite(c[p]) for c in columns)]
    grouped = defaultdict(list)
    for pair in whole:
        grouped[units.get(pair, pair)].append([c[pair] for c in columns])
    named = list(grouped) if len(grouped) == len(whole) else sorted(grouped)
    found = [[math.fsum(column) / len(column) for column in zip(*grouped[unit], strict=True)] for unit in named]
    return np.array(found).reshape(len(found), len(columns))


def of_condition(found, name):
    return {pair: value for (pair, condition), value in found.items() if condition == name}


def combined(found, weights):
    """Pair -> the weighted sum of its conditions' means, for pairs that have them all."""
    sides = {name: of_condition(found, name) for name in weights}
    pairs = set.intersection(*(set(side) for side in sides.values()))
    return {pair: sum(weights[name] * sides[name][pair] for name in sorted(weights)) for pair in pairs}


def differences(rows, h, units):
    """The pair differences of a contrast, one number a unit, on the grid."""
    found = means(rows, h["readout"], h["transform"])
    return on_grid(table([combined(found, terms(h["contrast"]))], units)[:, 0])


def is_full_swap(condition):
    patch = condition.get("patch")
    return bool(patch) and (patch["slots"], patch["align"], patch["donor"]) == ("all", "replace", "source")


def is_natural(condition):
    return all(condition.get(way) is None for way in WAYS)


def giver(condition):
    return condition.get("from") or condition.get("text_of") or condition["into"]


def recipe(condition):
    """How a condition makes its cache, whoever gives it."""
    if is_natural(condition) or is_full_swap(condition):
        return "a text"
    return json.dumps({key: value for key, value in condition.items() if key not in NO_RECIPE}, sort_keys=True)


def roles(run, h):
    """Condition -> role of the prompt whose natural run it equals, None where it equals none."""
    stored = any(row.get("equals_text") is not None for row in run.rows)
    out = {}
    for name in conditions_of(h):
        c = run.conditions[name]
        spelled = giver(c) if is_natural(c) or is_full_swap(c) else None
        ran = [r for r in run.of["test", h["phase"]] if r["condition"] == name and not r["failed"]] if stored else []
        counts = Counter(row["equals_text"] for row in ran if row.get("equals_text") is not None)
        if ran:
            top = min(counts, key=lambda role: (-counts[role], role), default=None)
            out[name] = top if top is not None and counts[top] >= 0.9 * len(ran) else None
        else:
            out[name] = spelled
    return out


def conditions_of(h):
    """Every condition that a hypothesis reads, each once."""
    own = order(h)[0] if h["test"] in ORDERED else list(terms(h["contrast"]))
    others = [name for v in (h["against"], *h["controlling"]) if v for name in terms(v["contrast"])]
    return list(dict.fromkeys([*own, *others]))
