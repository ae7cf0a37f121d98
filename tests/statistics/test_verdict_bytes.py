"""The same trials give the same bytes; numbers that are not there are null."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

import kvpatch.protocols.schema as schema
from kvpatch.verdicts.decide import Verdict, headline, verdicts, verdicts_json

Make = Callable[..., Any]
DEC7 = schema.Protocol.model_validate(
    yaml.safe_load(Path(schema.__file__).with_name("dec7.yaml").read_text(encoding="utf-8"))
)
RECURSIVE = {"B", "C", "S1", "M1"}


def dec7_trials(moves: float = 1.0, n: int = 24, samples: int = 2) -> pd.DataFrame:
    """Trials of dec7 with planted truth: a score of 5 where the cache is the source's, 0.5 elsewhere."""
    rng = np.random.default_rng(7)
    rows = []
    for split, phase, names in (("calibration", "calibration", "AB"), ("test", "1", list(DEC7.conditions))):
        for pair in range(n):
            for name in names:
                for sample in range(samples):
                    mean = 0.5 + (4.5 * moves if name in RECURSIVE else 0.0)
                    score = mean + rng.normal(0, 0.5)
                    rows.append(
                        {
                            "trial_id": f"{split}-{pair}-{name}-{sample}",
                            "split": split,
                            "phase": phase,
                            "condition": name,
                            "pair_id": f"{split}-{pair}",
                            "source_id": f"{split}-s{pair}",
                            "target_id": f"{split}-t{pair}",
                            "sample": sample,
                            "recursive_score": score,
                            "recursive_score_masked": score + rng.normal(0, 0.1),
                            "mode_llr": 0.2 * score + rng.normal(0, 0.05),
                            "rv_output": math.exp(-0.02 * score + rng.normal(0, 0.01)),
                            "coherent": name != "F1",
                            "output_token_ids": [1, 2, 3],
                            "error": None,
                        }
                    )
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def trials() -> pd.DataFrame:
    return dec7_trials()


@pytest.fixture(scope="module")
def text(trials: pd.DataFrame) -> str:
    return verdicts_json(verdicts(DEC7, trials))


def test_dec7_on_planted_transfer(trials: pd.DataFrame):
    found = {v.id: v for v in verdicts(DEC7, trials)}
    assert list(found) == [h.id for h in DEC7.hypotheses]
    assert {name for name, v in found.items() if v.verdict == "tautological"} == {
        "seed_memory", "seed_necessity", "seed_geometry", "second_necessity", "was_swap", "integrity_self",
        "integrity_text",
    }  # fmt: skip
    for name in ("mode_exists_score", "mode_exists_llr", "transfer_llr", "transfer_masked"):
        assert found[name].verdict == "supported"
    assert found["necessity"].verdict == "equivalent"
    assert found["null_F1"].blocked_by == "coherence"
    assert found["null_E1"].verdict == found["null_N2"].verdict == "equivalent"
    assert headline(DEC7, list(found.values())).startswith(
        "Information sufficient for recursive-style output can be read from these cache slots"
    )


def test_recomputing_gives_the_same_bytes(trials: pd.DataFrame, text: str):
    assert verdicts_json(verdicts(DEC7, trials)) == text


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_row_order_changes_no_byte(trials: pd.DataFrame, text: str, seed: int):
    shuffled = trials.sample(frac=1, random_state=seed)
    assert verdicts_json(verdicts(DEC7, shuffled)) == text


def test_parts_read_twice_and_in_another_order_change_no_byte(trials: pd.DataFrame, text: str):
    parts = [trials.iloc[i : i + 100] for i in range(0, len(trials), 100)]
    again = pd.concat([*reversed(parts), parts[2], parts[0]])
    assert len(again) > len(trials)
    assert verdicts_json(verdicts(DEC7, again)) == text


def test_error_rows_of_trials_done_again_change_no_byte(trials: pd.DataFrame, text: str):
    failed = trials.iloc[::7].assign(error="CUDA out of memory", recursive_score=np.nan, output_token_ids=None)
    for frames in ([failed, trials], [trials, failed]):
        assert verdicts_json(verdicts(DEC7, pd.concat(frames))) == text


def test_a_last_bit_of_noise_in_the_readouts_changes_no_verdict_and_no_sentence(trials: pd.DataFrame):
    noisy = trials.assign(recursive_score=np.nextafter(trials["recursive_score"].to_numpy(), np.inf))
    before, after = verdicts(DEC7, trials), verdicts(DEC7, noisy)
    assert [(v.verdict, v.because, v.p) for v in before] == [(v.verdict, v.because, v.p) for v in after]


def test_changed_data_change_the_bytes(trials: pd.DataFrame, text: str):
    changed = trials.copy()
    changed.loc[changed["trial_id"] == "test-0-B-0", "recursive_score"] += 1e-6
    assert verdicts_json(verdicts(DEC7, changed)) != text


def test_the_json_reads_back_as_verdicts(text: str):
    back = [Verdict.model_validate(entry) for entry in json.loads(text)]
    assert verdicts_json(back) == text
    assert all(list(entry) == sorted(entry) for entry in json.loads(text))


def test_floats_have_ten_digits_and_what_is_no_number_is_null(trials: pd.DataFrame):
    v = verdicts(DEC7, trials)[0].model_copy(
        update={"estimate": 1 / 3, "ci_low": math.nan, "ci_high": math.inf, "p": -0.0, "margin": 2e-300}
    )
    entry = json.loads(verdicts_json([v]))[0]
    assert (entry["estimate"], entry["ci_low"], entry["ci_high"]) == (0.3333333333, None, None)
    assert '"p": 0.0,' in verdicts_json([v])
    assert entry["margin"] == 2e-300
    assert verdicts_json([]) == "[]\n"


def test_the_input_is_not_changed(trials: pd.DataFrame):
    before = trials.copy(deep=True)
    verdicts(DEC7, trials)
    pd.testing.assert_frame_equal(trials, before)
