"""Heads over the tokens of one pair: the stored numbers, of the heads that are ranked; of old runs nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from kvpatch.report.build import report_page
from kvpatch.report.head_tokens import over_tokens, stored_by_slot
from kvpatch.report.packing import unpacked
from kvpatch.specs.attention import STAGES
from kvpatch.store import directory
from kvpatch.store.directory import Store
from kvpatch.verdicts.outcome import outcome_of
from synthetic import write_run

DATA = re.compile(r'<script type="application/gzip" class="heads-data">([^<]*)</script>')


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_run(tmp_path_factory.mktemp("heads"), n=4, phases=["6"])


def shown(store: Store) -> list[dict]:
    page = report_page(store, outcome_of(store))
    return [json.loads(unpacked(found)) for found in DATA.findall(page)]


def test_page_holds_the_ranked_heads_of_the_first_pair_with_the_numbers_that_are_stored(store: Store) -> None:
    stored = stored_by_slot(store, [])
    assert set(stored["pair_id"]) == {"plain-000+rec-000"}
    rankings = shown(store)
    assert len(rankings) == 5
    for found in rankings:
        assert found["pair"] == "plain-000+rec-000"
        assert len(found["heads"]) == 10
        assert [side["condition"] for side in found["sides"]] == ["C", "N1"]
        for head in found["heads"]:
            layer, number = map(int, re.findall(r"\d+", head["name"]))
            for side, numbers in zip(found["sides"], head["sides"], strict=True):
                rows = stored[(stored["condition"] == side["condition"]) & (stored["layer"] == layer)]
                of = rows[rows["head"] == number].iloc[0]
                assert side["tokens"] == [str(i) for i in of["cache_token_ids"]]
                by_stage = dict(zip(STAGES, numbers, strict=True))
                assert by_stage["own"] is None  # the synthetic run has no such stage
                assert by_stage["forced"] == pytest.approx(of["by_slot"], rel=6e-3, abs=1e-9)


def test_no_other_pair_and_no_other_contrast_than_was_stored_is_shown(store: Store) -> None:
    stored = stored_by_slot(store, [])
    heads = pd.DataFrame({"layer": [0], "head": [1]})
    assert over_tokens(stored, "6", "C - N1", heads) is not None
    assert over_tokens(stored, "1", "C - N1", heads) is None
    assert over_tokens(stored, "6", "C - Z9", heads) is None
    assert over_tokens(stored[stored["condition"] == "C"], "6", "C - N1", heads) is None


def test_run_made_before_it_was_stored_is_reported_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "append", _without_by_slot(Store.append))
    old = write_run(tmp_path / "old", n=4, phases=["6"])
    assert "by_slot" not in _columns_of(old)
    assert stored_by_slot(old, []).empty
    page = report_page(old, outcome_of(old))
    assert "Largest:" in page and not DATA.search(page)


def _columns_of(store: Store) -> list[str]:
    assert isinstance(store.attention, Path)
    return pq.read_schema(min(store.attention.glob("*.parquet"))).names


def _without_by_slot(append):
    """How an older version wrote a part: its file lacks the column."""
    whole = directory.ATTENTION_SCHEMA

    def old(self, name, rows, attention=None):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(directory, "ATTENTION_SCHEMA", whole.remove(whole.get_field_index("by_slot")))
            append(self, name, rows, None if attention is None else attention.drop(["by_slot"]))

    return old
