"""What the live view says of a finished run is what its verdicts say, also where pairs share prompts."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from finished import RUNS, SHARED
from kvpatch.report import text
from kvpatch.verdicts.outcome import Outcome, outcome_of
from kvpatch.verdicts.wording import pairs_text
from kvpatch.view import estimates
from kvpatch.view.server import View


@pytest.fixture(scope="module", params=list(RUNS))
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, list[Any], str]:
    """(what a run says, the estimates that the view's page asks for, the report that it serves)."""
    store = RUNS[request.param](tmp_path_factory.mktemp("seen") / request.param)
    with TestClient(View([store.directory]).app(None), base_url="http://127.0.0.1") as asking:
        found, report = (asking.get(f"/run/{request.param}/{name}") for name in ("estimates", "report"))
    return outcome_of(store), found.json(), report.text


def test_every_estimate_interval_and_n_is_the_verdicts(seen: tuple[Outcome, list[Any], str]) -> None:
    outcome, found, _ = seen
    assert [item["id"] for item in found] == [v.id for v in outcome.verdicts]
    for item, verdict in zip(found, outcome.verdicts, strict=True):
        assert (item["n"], item["n_pairs"]) == (verdict.n, verdict.n_pairs), item["id"]
        for mine, theirs in (("estimate", verdict.estimate), ("low", verdict.ci_low), ("high", verdict.ci_high)):
            assert item[mine] == (None if theirs is None else pytest.approx(theirs, rel=1e-12)), item["id"]
            assert item["shown"][mine] == text.number(theirs)
        assert item["counted"] == pairs_text(verdict.n, verdict.n_pairs)


def test_the_sentence_of_a_verdict_tells_the_views_numbers(seen: tuple[Outcome, list[Any], str]) -> None:
    outcome, found, _ = seen
    told = 0
    for item, verdict in zip(found, outcome.verdicts, strict=True):
        # Of a readout that never moves the sentence tells its one value, and no estimate.
        never_moves = verdict.because.startswith("nothing scored")
        if verdict.blocked_by is None and verdict.n and not never_moves:
            told += 1
            assert f"over {item['counted']}" in verdict.because
            assert item["shown"]["estimate"].replace(text.MINUS, "-") in verdict.because
    assert told > 3


def test_pairs_that_share_prompts_count_once_along_the_whole_path(seen: tuple[Outcome, list[Any], str]) -> None:
    outcome, _, _ = seen
    verdicts = {v.id: v for v in outcome.verdicts}
    for item in estimates.estimates(outcome.protocol, outcome.rows):
        if outcome.protocol.protocol != "small" or item["phase"] != SHARED:
            continue
        assert 3 < item["n"] < item["n_pairs"]
        looks = [look["n"] for look in item["path"]]
        assert looks == ([] if item["is_correlation"] else sorted(set(looks)))
        if looks:
            assert (looks[0], looks[-1]) == (3, verdicts[item["id"]].n)
            assert item["path"][-1]["estimate"] == pytest.approx(verdicts[item["id"]].estimate, rel=1e-12)


def test_the_report_that_the_view_serves_is_that_of_the_verdicts(seen: tuple[Outcome, list[Any], str]) -> None:
    outcome, _, html = seen
    for verdict in outcome.verdicts:
        row = html[html.index(f'<tr id="h-{verdict.id}">') :].split("</tr>")[0]
        assert f"</span> {verdict.verdict}</span>" in row
