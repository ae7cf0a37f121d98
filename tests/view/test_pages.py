"""What the pages say of a run."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from kvpatch.report.text import number
from kvpatch.store.directory import Store
from kvpatch.view.server import STATUS, View
from synthetic import write_run


def test_estimates_come_with_their_charts_and_no_verdict(client: TestClient) -> None:
    found = client.get("/a-token/run/first/estimates").json()
    (item,) = [i for i in found if i["id"] == "transfer_llr"]
    assert item["n"] == 6 and item["chart"]["datasets"]
    assert not any("p" in i or "verdict" in i for i in found)


def test_a_trials_page_shows_every_column(client: TestClient, directory: Path) -> None:
    row = Store(directory).read().to_pylist()[-1]
    html = client.get(f"/a-token/run/first/trial/{row['trial_id']}").text
    for name in ("mode_llr", "rv_output", "cache_checksum_before", "source_token_ids"):
        assert f"<code>{name}</code>" in html
    assert html.count('<span class="token s') - 7 == len(row["output_token_ids"])
    assert "ids are shown" in html  # the tokenizer of a model that is not there
    assert json.loads(row["patch"])["joined" if "joined" in row["patch"] else "keep"]


def test_a_trial_stands_beside_another_of_its_pair_token_by_token(client: TestClient, directory: Path) -> None:
    rows = {row["trial_id"]: row for row in Store(directory).read().to_pylist()}
    own, other = rows["1-C-0-0"], rows["1-A-0-0"]
    html = client.get("/a-token/run/first/trial/1-C-0-0", params={"beside": "1-A-0-0"}).text
    section = html[html.index('id="beside"') : html.index("<h2>Its patch")]
    assert "Not even the first token is the same: C begins with" in section
    assert section.count('<span class="token') - 3 == len(own["output_token_ids"]) + len(other["output_token_ids"])
    assert '<option value="1-A-0-0" selected>' in section
    assert client.get("/a-token/run/first/trial/1-C-0-0", params={"beside": "1-A-1-0"}).status_code == 404
    assert client.get("/a-token/run/first/trial/1-C-0-0", params={"beside": "nobody"}).status_code == 404


def test_a_head_is_shown_over_the_tokens_of_a_trial_of_the_first_pair(tmp_path: Path) -> None:
    store = write_run(tmp_path / "first", n=4, phases=["6"])
    stored = {
        (row["trial_id"], row["layer"], row["head"]): row["by_slot"]
        for row in store.read_attention(["trial_id", "stage", "layer", "head", "by_slot"], stage="forced").to_pylist()
    }
    with TestClient(View([store.directory]).app("a-token"), base_url="http://127.0.0.1:8000") as client:
        where = "/a-token/run/first/trial/6-C-0-0"
        assert "Table of the slots" not in (html := client.get(where).text) and '<option value="1.2">' in html
        html = client.get(where, params={"head": "1.2"}).text
        table = html[html.index("Table of the slots") :]
        shares = re.findall(r"<bdi>(\d+)</bdi></td><td class=\"n\">([^<]*)</td>", table[: table.index("</table>")])
        row = next(row for row in store.read().to_pylist() if row["trial_id"] == "6-C-0-0")
        wanted = [
            (str(i), number(share)) for i, share in zip(row["cache_token_ids"], stored["6-C-0-0", 1, 2], strict=True)
        ]
        assert shares == wanted
        assert client.get(where, params={"head": "99.0"}).status_code == 404
        assert "One head over the tokens" not in client.get("/a-token/run/first/trial/6-C-1-0").text
        assert client.get("/a-token/run/first/trial/6-C-1-0", params={"head": "1.2"}).status_code == 404


def test_the_page_of_all_runs_says_not_final_only_while_one_of_them_goes_on(client: TestClient) -> None:
    html = client.get("/a-token/").text
    assert '<p class="note not-final" hidden>' in html  # its one run is finished


def test_the_live_report_says_that_it_is_not_final_until_it_is(client: TestClient) -> None:
    answer = client.get("/a-token/run/first/report")
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert 'data-events="/a-token/events?run=first"' in answer.text
    assert "Not final" not in answer.text  # this run is finished


@pytest.mark.parametrize("asked", ["?q=itself", "?page=2", "?sort=-mode_llr&min_mode_llr=0.2", "?q=%3Cscript%3E"])
def test_the_trials_page_keeps_what_was_asked(client: TestClient, asked: str) -> None:
    html = client.get(f"/a-token/run/first/trials{asked}").text
    assert "<script>" not in html.replace('<script src="', "")


def test_streams_share_what_is_said_of_a_run_until_it_changes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view, made = View([directory]), []
    view.runs.refresh()
    (run,) = view.runs.by_key.values()
    say = functools.partial(view._made_of, run, STATUS, lambda: made.append(run.progress().state) or made[-1])
    assert [say() for _ in range(50)] == ["finished"] * 50
    asked = len(made)
    assert asked <= 2
    monkeypatch.setattr("kvpatch.view.runs.is_held", lambda _: True)  # a process takes the run up
    assert [say(), say()] == ["running"] * 2 and len(made) == asked + 1
