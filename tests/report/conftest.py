"""A small synthetic run: the shape of a real one, numbers from a fixed generator, no model."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from kvpatch.protocols.schema import Protocol
from kvpatch.report.build import write_report
from kvpatch.verdicts.outcome import outcome_of
from synthetic import write_run

WORDS = (
    "the process of writing shows itself while attention turns back on its own sentence and I notice that "
    "bread rises because yeast makes gas in warm dough so observe how awareness of the reply becomes a part"
).split()
LEXICON = re.compile(r"\b(itself|attention|notice|observe|awareness)\b")
SHIFT = {"B": 5.0, "C": 5.0, "S1": 5.0, "DN": 0.8, "N3": 1.5}


def load_protocol() -> Protocol:
    text = (resources.files("kvpatch.protocols") / "dec7.yaml").read_text("utf-8")
    return Protocol.model_validate(yaml.safe_load(text))


def make_trials(protocol: Protocol, n: int = 12, samples: int = 1, seed: int = 0) -> pd.DataFrame:
    """Trials of phase 1: n pairs and two for calibration; E3 fails on two pairs, F1 is not coherent."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n + 2):
        source = " ".join(rng.choice(WORDS, 14))
        target = " ".join(rng.choice(WORDS, 14))
        held_out = i >= n
        for name in ["A", "B"] if held_out else protocol.phases["1"].all_conditions:
            for sample in range(samples):
                score = max(0.0, rng.normal(1.0 + SHIFT.get(name, 0.0), 1.2))
                failed = name == "E3" and i in (1, 2) and not held_out
                tokens = rng.integers(0, 5000, int(rng.integers(30, 64))).tolist()
                rows.append(
                    {
                        "trial_id": f"{name}-{i}-{sample}",
                        "phase": "1",
                        "condition": name,
                        "condition_role": protocol.conditions[name].role,
                        "pair_id": f"pair-{i:03d}",
                        "split": "calibration" if held_out else "test",
                        "sample": sample,
                        "source_text": source,
                        "target_text": target,
                        "text": None if failed else " ".join(rng.choice(WORDS, 45)) + ".",
                        "output_token_ids": None if failed else tokens,
                        "stopped": "length",
                        "n_tokens": np.nan if failed else len(tokens),
                        "recursive_score": np.nan if failed else score,
                        "recursive_score_masked": np.nan if failed else score * 0.6,
                        "mode_llr": np.nan if failed else rng.normal(SHIFT.get(name, 0) / 10, 0.2),
                        "content_llr": np.nan if failed else rng.normal(0, 0.3),
                        "rv_output": np.nan if failed else rng.normal(0.9, 0.05),
                        "nll_own": np.nan if failed else rng.gamma(8, 0.2),
                        "nll_target": (off_topic := np.nan if failed else rng.gamma(12, 0.2)),
                        "nll_context": off_topic * 0.75,
                        "excess_context": off_topic * 0.75 - 1.5,
                        "repetition": np.nan if failed else rng.beta(1, 12),
                        "coherent": None if failed else bool(name != "F1" or i % 3 == 0),
                        "cache_checksum_before": "ab12",
                        "cache_checksum_after": "ab12",
                        "error": "RuntimeError: planted" if failed else None,
                    }
                )
    out = pd.DataFrame(rows)
    for name, twin in {"C": "B", "D": "A", "S0": "A", "S1": "C"}.items():
        to, taken = out["condition"] == name, (out["condition"] == twin) & (out["split"] == "test")
        for column in ("text", "output_token_ids"):
            out.loc[to, column] = pd.Series(out.loc[taken, column].tolist(), index=out.index[to], dtype=object)
    return out


def make_run(protocol: Protocol) -> dict:
    return {
        "kvpatch_version": "0.1.0",
        "protocol": protocol.model_dump(mode="json", by_alias=True),
        "protocol_sha256": protocol.sha256,
        "model": {
            "name": "smollm2-135m",
            "architecture": "LlamaForCausalLM",
            "layers": 30,
            "kv_heads": 3,
            "query_heads": 9,
            "head_dim": 64,
            "dtype": "float32",
            "device": "cpu",
            "weights_sha256": "9f" * 32,
            "tokenizer_sha256": "3c" * 32,
            "template_sha256": "77" * 32,
        },
        "versions": {"torch": "2.13.0", "transformers": "5.24.0"},
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": True},
        "seed": 7,
        "n": 12,
        "phases": ["1"],
        "hardware": {"cpu": "a processor", "cores": 4, "gpu": None},
        "created": "2026-01-05T10:00:00+00:00",
        "finished": "2026-01-05T10:03:20+00:00",
        "skipped": [{"phase": "1", "condition": "E9", "reason": "the model has one KV head"}],
        "dropped_pairs": 3,
        "check": [
            {"identity": "self-swap gives the same logits", "holds": True, "error": 0.0, "bound": 1e-5},
            {"identity": "full swap equals text", "holds": True, "error": 2.1e-6, "bound": 1e-5},
        ],
        "coherence_limits": {"nll_target": 3.71, "repetition": 0.21},
        "noise_floor": {"logits_max_difference": 2.4e-7},
    }


def make_verdicts(protocol: Protocol) -> list[dict]:
    """One verdict a hypothesis but the last, going round the six words."""
    words = [
        "supported",
        "supported",
        "inconclusive",
        "supported",
        "tautological",
        "tautological",
        "not supported",
    ]
    words += [
        "not_interpretable",
        "equivalent",
        "equivalent",
        "not interpretable",
        "not supported",
        "equivalent",
    ]
    out = []
    for i, h in enumerate(protocol.hypotheses[:-1]):
        out.append(
            {
                **{k: getattr(h, k) for k in ("id", "claim", "phase", "contrast", "test", "confirmatory")},
                "n": 12,
                "estimate": 1.2345678 + i,
                "ci_low": 0.5111 + i,
                "ci_high": 2.0222 + i,
                "effect_size": 0.87,
                "p": 10.0 ** -(i % 7 + 1),
                "p_adjusted": min(1.0, 3 * 10.0 ** -(i % 7 + 1)),
                "margin": 0.42 if h.margin else None,
                "verdict": words[i % len(words)],
                "because": f"The interval of {h.contrast} says so, and {i} of 12 pairs agree with it.",
            }
        )
    return out


def mark(text: str, source: str, _: object) -> list[tuple[int, int, str]]:
    copied = set(source.split())
    spans = [(m.start(), m.end(), "hit") for m in LEXICON.finditer(text)]
    spans += [(m.start(), m.end(), "copied") for m in re.finditer(r"\w+", text) if m[0] in copied and len(m[0]) > 5]
    return spans


@pytest.fixture(scope="session")
def protocol() -> Protocol:
    return load_protocol()


@pytest.fixture(scope="session")
def trials_of(protocol: Protocol) -> Callable[..., pd.DataFrame]:
    """Trials of a wanted size: `trials_of(n=8, samples=5)`."""
    return functools.partial(make_trials, protocol)


@pytest.fixture(scope="session")
def marker() -> Callable[..., list[tuple[int, int, str]]]:
    return mark


@pytest.fixture
def trials(protocol: Protocol) -> pd.DataFrame:
    return make_trials(protocol)


@pytest.fixture
def run(protocol: Protocol) -> dict:
    return make_run(protocol)


@pytest.fixture
def verdicts(protocol: Protocol) -> list[dict]:
    return make_verdicts(protocol)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small run with the maps of heads."""
    store = write_run(tmp_path_factory.mktemp("small"), n=4, phases=["1", "6"])
    return write_report(store, outcome_of(store))
