"""Heads are chosen on half of the pairs and tested on the other half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.load import parse_protocol
from kvpatch.protocols.schema import Protocol
from kvpatch.verdicts.chosen_heads import chosen_heads, heads_column
from kvpatch.verdicts.outcome import outcome_of
from synthetic import dec7, write_run

HEADS = [(layer, head) for layer in range(6) for head in range(5)]
PLANTED = (2, 1)
ASKED = Hypothesis(
    id="h", claim="c", phase="6", contrast="C - N1", readout="attention_body", test="chosen_heads", family="f", needs=[]
)


def rows_of(n: int, effect: float, seed: int = 0) -> pd.DataFrame:
    """Prepared rows of C and N1; under C the planted head moves by `effect`, in noise of standard deviation 1."""
    rng = np.random.default_rng(seed)
    rows = []
    for pair in range(n):
        for name in ("C", "N1"):
            values = dict(zip(HEADS, rng.normal(0, 1, len(HEADS)).tolist(), strict=True))
            values[PLANTED] += effect * (name == "C")
            rows.append(
                {"pair_id": f"p{pair}", "condition": name, "failed": False, heads_column("attention_body"): values}
            )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("effect", [4.0, -4.0])
def test_a_planted_head_is_chosen_and_its_effect_found_on_the_other_pairs(effect: float):
    found = chosen_heads(rows_of(40, effect), ASKED, {})
    assert found.told.startswith("; 2 of 30 heads, chosen on 20 others: layer 2 head 1, layer ")
    assert found.found.n == found.found.n_pairs == 20
    # Two heads are chosen, of which one moves: either way it moved counts as the same way again.
    assert float(found.found.values.mean()) == pytest.approx(2, abs=0.7)


def test_what_chose_the_heads_does_not_test_them():
    """Of pure noise the choosing half's best heads differ from 0 there, and not on the testing half."""
    means = [float(chosen_heads(rows_of(16, 0, seed), ASKED, {}).found.values.mean()) for seed in range(60)]
    assert abs(np.mean(means)) < 3 * np.std(means) / np.sqrt(60)
    own = rows_of(16, 0)
    found = chosen_heads(own, ASKED, {}).found
    column = heads_column("attention_body")
    tests = own["pair_id"].isin(found.unit_ids) & (own["condition"] == "C")
    moved = [{head: value + 50 * (head == PLANTED) for head, value in heads.items()} for heads in own[column]]
    changed = own.assign(**{column: own[column].where(~tests, pd.Series(moved))})
    assert chosen_heads(changed, ASKED, {}).told == chosen_heads(own, ASKED, {}).told


def test_the_split_depends_on_names_alone_and_keeps_units_whole():
    rows = rows_of(20, 1.0)
    one, other = (chosen_heads(t, ASKED, {}) for t in (rows, rows.sample(frac=1, random_state=3)))
    assert one.told == other.told and one.found.unit_ids == other.found.unit_ids
    np.testing.assert_array_equal(one.found.values, other.found.values)
    units = {f"p{pair}": f"u{pair // 2}" for pair in range(20)}
    shared = chosen_heads(rows, ASKED, units).found
    assert (shared.n, shared.n_pairs) == (5, 10)


def test_without_heads_or_with_too_few_pairs_nothing_is_measured():
    for rows in (rows_of(20, 1.0).drop(columns=heads_column("attention_body")), rows_of(3, 1.0)):
        assert chosen_heads(rows, ASKED, {}).found.n == 0
    lost = rows_of(20, 1.0)
    lost.loc[lost["pair_id"].isin(["p0", "p1"]) & (lost["condition"] == "C"), "failed"] = True
    found = chosen_heads(lost, ASKED, {}).found
    assert (found.n_dropped, found.n_error_rows, found.n) == (2, 2, 9)


def test_a_run_s_heads_are_read_from_what_was_stored(tmp_path: Path):
    """In the synthetic run head (1, 2) looks at marked words where the source's cache was put in."""
    store = write_run(tmp_path / "run", n=30, phases=["6"], change=lambda row: {"attention_marked_each": 0.3})
    found = {v.id: v for v in outcome_of(store).verdicts}
    planted = found["heads_marked"]
    assert (planted.n, planted.verdict) == (15, "supported")
    assert planted.estimate == pytest.approx(0.4, abs=0.06)
    assert "; 1 of 20 heads, chosen on 15 others: layer 1 head 2, above 0" in planted.because
    assert found["heads_marked_joined"].estimate < 0.06


def test_a_readout_that_single_heads_lack_is_told_before_a_run():
    def content(readout: str) -> dict[str, Any]:
        given = {"id": "h", "claim": "c", "phase": "6", "contrast": "C - N1", "test": "chosen_heads", "family": "f"}
        raw = dec7().model_dump(mode="json", by_alias=True, exclude_defaults=True)
        asked = [given | {"readout": readout, "needs": []}]
        return raw | {"hypotheses": asked, "corrections": {}, "families": {}, "plan": []}

    text = Protocol.model_validate(content("attention_body")).model_dump_json(by_alias=True, exclude_defaults=True)
    assert parse_protocol(text, "x.yaml").hypotheses[0].kind.measures == "heads"
    with pytest.raises(
        ValueError, match=r"single heads have no 'mode_llr'; test 'chosen_heads' reads attention_entropy"
    ):
        parse_protocol(text.replace('"attention_body"', '"mode_llr"'), "x.yaml")
