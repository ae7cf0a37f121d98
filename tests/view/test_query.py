"""Filters find what a plain reading of the Parquet files finds; nothing a visitor writes becomes SQL."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvpatch.store.directory import Store
from kvpatch.view import query
from kvpatch.view.runs import LiveRun, dumps
from synthetic import write_run


@pytest.fixture(scope="module")
def frame(directory: Path) -> pd.DataFrame:
    return Store(directory).read().to_pandas()


def test_filters_agree_with_pandas(live: LiveRun, frame: pd.DataFrame) -> None:
    said = frame["text"].str.lower()
    failed = frame["error"].notna()
    wanted = {
        (): len(frame),
        (("phase", "1"),): (frame["phase"] == "1").sum(),
        (("condition", "C"), ("split", "test")): ((frame["condition"] == "C") & (frame["split"] == "test")).sum(),
        (("failed", "yes"),): failed.sum(),
        (("coherent", "no"),): (frame["coherent"] == False).sum(),  # noqa: E712
        (("min_mode_llr", "0.5"), ("max_mode_llr", "1")): frame["mode_llr"].between(0.5, 1).sum(),
        (("q", "AWARENESS"), ("condition", "B")): (
            (frame["condition"] == "B")
            & (said + frame["source_text"] + frame["target_text"]).str.lower().str.contains("awareness")
        ).sum(),
        (("q", "planted"),): failed.sum(),
        (("pair_id", "plain-003"),): frame["pair_id"].str.contains("plain-003", regex=False).sum(),
    }
    for asked, count in wanted.items():
        assert query.trials(live, dict(asked))["total"] == count, asked


def test_words_must_all_occur_and_quoted_ones_in_a_row(live: LiveRun, frame: pd.DataFrame) -> None:
    texts = (frame["text"] + " \n " + frame["source_text"] + " \n " + frame["target_text"]).str.lower()
    both = texts.str.contains("yeast") & texts.str.contains("reply")
    assert query.trials(live, {"q": "yeast reply"})["total"] == both.sum()
    assert query.trials(live, {"q": '"yeast reply"'})["total"] == texts.str.contains("yeast reply").sum()


def test_pages_hold_every_trial_once_in_order(live: LiveRun, frame: pd.DataFrame) -> None:
    asked = {"sort": "-mode_llr"}
    first = query.trials(live, asked)
    rows = [
        r for page in range(1, first["pages"] + 1) for r in query.trials(live, {**asked, "page": str(page)})["rows"]
    ]
    assert len({r["trial_id"] for r in rows}) == len(rows) == len(frame)
    assert [r["mode_llr"] for r in rows] == sorted(frame["mode_llr"], reverse=True)


@pytest.mark.parametrize(
    "asked",
    [
        {"phase": "1' or '1'='1"},
        {"q": "'); drop table trials; --"},
        {"sort": "mode_llr; drop table trials"},
        {"sort": "(select 1)"},
        {"min_mode_llr": "0) or (1=1"},
        {"min_mode_llr": "nan", "max_mode_llr": "inf"},
        {"page": "1e9"},
        {"page": "-1; drop table trials"},
        {"unknown": "x"},
    ],
)
def test_what_a_visitor_writes_never_becomes_sql(live: LiveRun, frame: pd.DataFrame, asked: dict[str, str]) -> None:
    found = query.trials(live, asked)
    assert found["total"] in (0, len(frame))
    assert live.ask("select count(*) as n from trials")[0]["n"] == len(frame)


def test_a_query_reads_no_files(live: LiveRun) -> None:
    with pytest.raises(Exception, match=r"[Pp]ermission|disabled"):
        live.ask("select * from read_text('/etc/passwd')")


def test_a_number_that_is_not_known_passes_no_range_comes_last_and_is_told_as_json(tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> dict[str, Any]:
        return {"mode_llr": math.nan, "rv_own": math.inf} if row["condition"] == "B" else {}

    store = write_run(tmp_path / "run", n=3, phases=["1"], change=change)
    frame = store.read().to_pandas()
    run = LiveRun("run", store.directory)
    run.refresh()
    known = (frame["condition"] != "B").sum()
    assert query.trials(run, {"min_mode_llr": "-1000"})["total"] == known < len(frame)
    assert query.trials(run, {"min_rv_own": "0"})["total"] == known
    rows = query.trials(run, {"sort": "-mode_llr"})["rows"]
    assert rows[0]["mode_llr"] == frame["mode_llr"].max()
    with_b = query.trials(run, {"condition": "B"})["rows"]
    assert {row["mode_llr"] for row in json.loads(dumps(with_b))} == {None}
