"""A run directory of dec7 without a model: every phase and condition, numbers and texts from a fixed generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from kvpatch.protocols.conditions import Condition
from kvpatch.protocols.schema import Protocol, calibration_of
from kvpatch.specs.attention import STATISTICS
from kvpatch.store.columns import ATTENTION_SCHEMA
from kvpatch.store.directory import Store
from kvpatch.store.record import ModelRecord, OtherModel, RunRecord

_WORDS = (
    "the process of writing shows itself while attention turns back on its own sentence and I notice that bread "
    "rises because yeast makes gas in warm dough so observe how awareness of the reply becomes a part"
).split()
HOLDS = [{"identity": "self-swap gives the same logits", "holds": True, "error": 0.0, "bound": 1e-5}]


def dec7() -> Protocol:
    """The shipped protocol."""
    text = (resources.files("kvpatch.protocols") / "dec7.yaml").read_text("utf-8")
    return Protocol.model_validate(yaml.safe_load(text))


def model_record(name: str, architecture: str, layers: int, kv_heads: int) -> ModelRecord:
    """A model that was never loaded."""
    return ModelRecord(
        name=name,
        architecture=architecture,
        layers=layers,
        kv_heads=kv_heads,
        query_heads=9,
        head_dim=64,
        dtype="float32",
        device="cpu",
        weights_sha256="9f" * 32,
        tokenizer_sha256="3c" * 32,
        template_sha256=None,
    )


def record_of(protocol: Protocol, planned: dict[str, int], **changes: Any) -> RunRecord:
    """What run.json of such a run says."""
    found: dict[str, Any] = {
        "kvpatch_version": "0.1.0",
        "protocol": protocol.model_dump(mode="json", by_alias=True),
        "protocol_sha256": protocol.sha256,
        "bank_sha256": "ba" * 32,
        "model": model_record("first-model", "LlamaForCausalLM", 30, 3),
        "seed": 7,
        "n": None,
        "phases": list(protocol.phases),
        "planned_by_phase": planned,
        "versions": {"torch": "2.13.0"},
        "git": {"commit": "0" * 40, "dirty": False},
        "hardware": {"processor": "a processor", "threads": 2},
        "command": ["kvpatch", "run", "dec7"],
        "created": "2026-01-05T10:00:00+00:00",
        "finished": "2026-01-05T11:00:00+00:00",
        "seconds": 3600.0,
        "tokens": 64 * sum(planned.values()),
        "check": HOLDS,
        "noise_floor": {"logits_relative": 2.4e-7},
        "coherence_limits": {"nll_target": 3.7, "repetition": 0.2},
        "other_models": {
            "second": OtherModel(model=model_record("second-model", "Gemma3ForCausalLM", 18, 1), check=HOLDS)
        },
    }
    return RunRecord(**{**found, **changes})


def write_run(
    directory: Path,
    *,
    n: int | None = 4,
    samples: int = 1,
    calibration: int = 6,
    phases: list[str] | None = None,
    heads: tuple[int, int] = (5, 4),
    protocol: Protocol | None = None,
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {},
) -> Store:
    """Write a whole run. n: pairs a phase, as planned if None. samples: of a pair and condition. heads: layers, and
    heads of each, of the phases whose attention is watched. protocol: dec7 if None. change: row -> what to change."""
    protocol = protocol or dec7()
    store = Store(directory)
    made = run_parts(protocol, n, samples, calibration, phases)
    parts = [(name, [{**row, **change(row)} for row in rows]) for name, rows in made]
    planned: dict[str, int] = {}
    for _, rows in parts:
        planned[rows[0]["phase"]] = planned.get(rows[0]["phase"], 0) + len(rows)
    with store.locked():
        store.write_record(record_of(protocol, planned))
        for name, rows in parts:
            phase = protocol.phases.get(rows[0]["phase"])
            is_watched = phase is not None and phase.watched is not None
            store.append(name, rows, attention_of(rows, *heads) if is_watched else None)
    return store


def attention_of(rows: list[dict[str, Any]], layers: int, heads: int) -> pa.Table:
    """What every head did in these trials, in the first pair by slot too. Head (1, 2) looks at marked words where the
    source's cache was put in."""
    rng = np.random.default_rng(len(rows))
    trials = [row["trial_id"] for row in rows for _ in range(layers * heads)]
    grid = [(layer, head) for _ in rows for layer in range(layers) for head in range(heads)]
    values = {name: rng.normal(0.3, 0.02, len(grid)) for name in STATISTICS}
    marked = [row["condition"] == "C" and at == (1, 2) for row in rows for at in grid[: layers * heads]]
    for name in ("mass_marked", "mass_marked_each"):
        values[name] = values[name] + 0.4 * np.array(marked)
    columns = {
        "trial_id": trials,
        "stage": ["forced"] * len(grid),
        "layer": [layer for layer, _ in grid],
        "head": [head for _, head in grid],
        "queries": [24] * len(grid),
        **values,
        "by_slot": [
            rng.dirichlet(np.full(len(row["cache_token_ids"]), 0.1)) * 0.8 if "-000+" in row["pair_id"] else None
            for row in rows
            for _ in range(layers * heads)
        ],
    }
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in ATTENTION_SCHEMA})


def run_parts(
    protocol: Protocol, n: int | None, samples: int, calibration: int, phases: list[str] | None = None, seed: int = 0
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(name of a part, its rows): a part a pair, as `make_plan` cuts them where a pair has many rows."""
    rng = np.random.default_rng(seed)
    keys = {None: "first-model", "second": "second-model"}
    for key in keys:
        for pair in range(calibration):
            names = protocol.calibration.conditions
            phase = calibration_of(key)
            yield f"{phase}-{pair:04d}", _pair(protocol, phase, names, 900 + pair, 1, keys[key], rng)
    for phase, what in protocol.phases.items():
        if phases is None or phase in phases:
            for pair in range(what.n if n is None else min(n, what.n)):
                model = keys[what.model]
                yield f"{phase}-{pair:04d}", _pair(protocol, phase, what.all_conditions, pair, samples, model, rng)


def _pair(
    protocol: Protocol, phase: str, names: list[str], pair: int, samples: int, model: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    own, source, target = rng.normal(0, 0.3), _text(rng, 14), _text(rng, 14)
    prompt = rng.integers(0, 49_000, 40).tolist()
    is_held_out = phase.startswith("calibration")
    rows = []
    for name in names:
        condition = protocol.conditions[name]
        shift = _shift(condition)
        for sample in range(samples):
            mode = own + shift + rng.normal(0, 0.3)
            score = max(0.0, rng.normal(1.0 + 4 * shift, 1.2))
            tokens = rng.integers(0, 49_000, int(rng.integers(40, 64)))
            rows.append(
                {
                    "trial_id": f"{phase}-{name}-{pair}-{sample}",
                    "phase": phase,
                    "split": "calibration" if is_held_out else "test",
                    "model": model,
                    "condition": name,
                    "condition_role": protocol.role(phase, name),
                    "pair_id": f"plain-{pair:03d}+rec-{pair:03d}",
                    "source_id": f"rec-{pair:03d}",
                    "target_id": f"plain-{pair:03d}",
                    "sample": sample,
                    "seed": pair * 1000 + sample,
                    "patch": condition.recipe,
                    "source_text": source,
                    "target_text": target,
                    "source_token_ids": prompt,
                    "target_token_ids": prompt,
                    "cache_token_ids": prompt,
                    "output_token_ids": tokens.tolist(),
                    "output_logprobs": (-rng.gamma(1.0, 1.5, len(tokens))).tolist(),
                    "text": _text(rng, 45) + ".",
                    "stopped": "length",
                    "n_tokens": len(tokens),
                    "recursive_score": score,
                    "recursive_score_masked": score * 0.6,
                    "overlap_4gram": 0.0,
                    "rv_prompt": float(np.exp(rng.normal(-0.05, 0.02))),
                    "rv_output": float(np.exp(rng.normal(-0.05 * shift, 0.02) - 0.02 * own)),
                    "rv_own": float(np.exp(rng.normal(-0.05, 0.05))),
                    "nll_own": rng.gamma(8, 0.2),
                    "nll_target": (off_topic := rng.gamma(12, 0.2)),
                    "nll_context": off_topic * 0.75,
                    "excess_context": off_topic * 0.75 - 1.5,
                    "mode_llr": mode,
                    "content_llr": rng.normal(0, 0.3),
                    "mode_llr_by_position": rng.normal(mode, 0.1, 8).tolist(),
                    "content_llr_by_position": rng.normal(0, 0.1, 8).tolist(),
                    "js_pull": rng.normal(0, 0.1),
                    **_watched(protocol, phase, shift, rng),
                    "repetition": rng.beta(1, 12),
                    **{f"repetition_{k}": rng.beta(1, 12) for k in (1, 2, 4, 8)},
                    "coherent": None if is_held_out else bool(rng.random() < (0.4 if name == "F1" else 0.96)),
                    "cache_checksum_before": "ab12",
                    "cache_checksum_after": "ab12",
                    "error": "RuntimeError: planted" if name == "E3" and pair == 1 and not is_held_out else None,
                }
            )
    return rows


def _watched(protocol: Protocol, phase: str, shift: float, rng: np.random.Generator) -> dict[str, Any]:
    """Columns of phases that read geometry or watch attention."""
    what = protocol.phases.get(phase)
    out: dict[str, Any] = {}
    if what is not None and what.geometry:
        for name in ("rv_trajectory", "rv_forced_trajectory"):
            out[name] = np.exp(rng.normal(-0.05 * shift, 0.03, 9)).tolist()
    if what is not None and what.watched is not None:
        shares = {
            "sinks": 0.4,
            "template": 0.1,
            "body": 0.2,
            "trailer": 0.1,
            "generated": 0.2,
            "own": 0.3,
            "patched": 0.1,
        }
        out |= {f"attention_{name}": share for name, share in shares.items()}
    return out


def _shift(condition: Condition) -> float:
    """How much of the mode a condition has: whole from a source, a share by layers, slots or strength."""
    if condition.is_natural:
        return float(condition.into == "source" or condition.text_of == "source")
    if condition.steer_cache is not None:
        return 0.2 * condition.steer_cache.strength * (condition.steer_cache.random_directions is None)
    levels = {"L1_hint": 0.2, "L2_simple": 0.4, "L3_deeper": 0.6, "L4_full": 0.9, "source": 1.0}
    whole = levels.get(condition.from_ or "", 0.05)
    if condition.joined is not None:
        return whole * 0.4
    part = condition.patch is None or condition.patch.layers is not None or condition.patch.slots != "all"
    return whole * (0.3 if part else 1.0)


def _text(rng: np.random.Generator, words: int) -> str:
    return " ".join(_WORDS[i] for i in rng.integers(0, len(_WORDS), words))
