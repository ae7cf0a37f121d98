"""Estimates on the way are the report's own at the end, and say neither p nor verdict."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpatch.report import charts
from kvpatch.store.directory import Store
from kvpatch.verdicts.outcome import light_rows, outcome_of
from kvpatch.view import estimates


def test_the_last_look_is_what_the_verdicts_say(directory: Path) -> None:
    store = Store(directory)
    outcome = outcome_of(store)
    verdicts = {v.id: v for v in outcome.verdicts}
    found = estimates.estimates(outcome.protocol, light_rows(store))
    assert {item["id"] for item in found} == {v.id for v in outcome.verdicts if v.phase in ("1", "4")}
    for item in found:
        verdict = verdicts[item["id"]]
        assert item["n"] == verdict.n
        for mine, theirs in (("estimate", verdict.estimate), ("low", verdict.ci_low), ("high", verdict.ci_high)):
            assert item[mine] == (None if theirs is None else pytest.approx(theirs, rel=1e-9)), item["id"]
        assert not {"p", "verdict", "because"} & set(item)


def test_the_path_takes_pairs_in_the_order_they_came(directory: Path) -> None:
    store = Store(directory)
    outcome = outcome_of(store)
    rows = light_rows(store)
    (item,) = [i for i in estimates.estimates(outcome.protocol, rows) if i["id"] == "transfer_llr"]
    assert [look["n"] for look in item["path"]] == [3, 4, 5, 6]
    tested = rows[(rows["phase"] == "1") & (rows["split"] == "test")]
    first = list(tested["pair_id"].unique()[:3])
    means = tested[tested["pair_id"].isin(first)].groupby("condition")["mode_llr"].mean()
    assert item["path"][0]["estimate"] == pytest.approx(means["C"] - means["N1"])
    assert charts.specification(estimates.narrowing_chart(item["path"], "mode_llr"))["layer"]
