"""Every number the report prints is the one in verdicts.json, or the one DuckDB counts in the Parquet files."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import pytest
from markupsafe import escape

from kvpatch.report.build import write_report
from kvpatch.report.packing import opened
from kvpatch.specs.readouts import shown
from kvpatch.store.directory import Store
from kvpatch.verdicts.outcome import outcome_of, write_verdicts
from synthetic import write_run

# Mean over pairs of a pair's mean over samples, as the report's tables have it.
MEANS = """
    select condition, avg(value) as mean, count(*) as n from (
        select condition, pair_id, avg({readout}) as value from '{directory}/trials/*.parquet'
        where phase = '{phase}' and split = 'test' and coalesce(error, '') = '' group by all
    ) group by condition
"""


class Cells(HTMLParser):
    """The rows of every table: (id of the row, head of the row, numbers in full)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[tuple[str | None, str, list[float]]] = []
        self._is_head = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "tr":
            self.rows.append((given.get("id"), "", []))
        elif tag == "data" and self.rows:
            self.rows[-1][2].append(float(given["value"] or "nan"))
        self._is_head = (tag == "b" and "cond" in (given.get("class") or "")) or (self._is_head and tag == "bdi")

    def handle_data(self, data: str) -> None:
        if self._is_head and self.rows and not self.rows[-1][1]:
            row = self.rows[-1]
            self.rows[-1] = (row[0], data.strip(), row[2])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(the run directory, its report)."""
    store = write_run(tmp_path_factory.mktemp("numbers") / "run", n=6, samples=3)
    outcome = outcome_of(store)
    write_verdicts(store, outcome)
    return store.directory, opened(write_report(store, outcome).read_text("utf-8"))


def test_every_verdict_is_the_one_in_the_file(made: tuple[Path, str]) -> None:
    directory, html = made
    verdicts = json.loads((directory / "verdicts.json").read_text())
    section = html[html.index('<section id="verdicts">') : html.index('<section id="instruments">')]
    rows = {row[0]: row[2] for row in Cells(section).rows if row[0]}
    assert sorted(map(str, rows)) == sorted(f"h-{v['id']}" for v in verdicts)
    assert section.count('<tr id="h-') == len(verdicts)
    for verdict in verdicts:
        keys = ("p", "p_adjusted", "effect_size", "estimate", "ci_low", "ci_high", "n")
        ends = (verdict["ci_low"], verdict["ci_high"])
        wanted = [verdict[k] for k in keys if not (k.startswith("ci_") and None in ends)]
        assert rows[f"h-{verdict['id']}"] == [value for value in wanted if value is not None]
        assert f">{escape(verdict['because'][:29])}" in html.replace("&#x27;", "&#39;")


@pytest.mark.parametrize("place", range(3))
def test_every_mean_is_what_duckdb_counts(made: tuple[Path, str], place: int) -> None:
    directory, html = made
    phase = ["1", "2", "7"][place]
    parts = html.split('<details class="phase" id="phase-')
    part = next(p for p in parts[1:] if f"<bdi>{phase}</bdi>" in p[:200])
    found = {head: numbers for _, head, numbers in Cells(part).rows if head}
    for column, readout in enumerate(shown("report", ())):
        query = MEANS.format(readout=readout.name, directory=directory, phase=phase)
        for condition, mean, n in duckdb.sql(query).fetchall():
            assert n >= 5
            assert found[condition][3 * column] == pytest.approx(mean, rel=1e-9), (condition, readout.name)


def test_counts_are_what_duckdb_counts(made: tuple[Path, str]) -> None:
    directory, html = made
    where = f"'{directory}/trials/*.parquet' where split = 'test'"
    pairs, trials, tokens = duckdb.sql(
        f"select count(distinct pair_id), count(*), sum(n_tokens) from {where}"
    ).fetchall()[0]
    assert f"{pairs} pairs, {trials} trials" in html
    assert f"<bdi>{int(tokens):,}</bdi>" in html
    ((errors,),) = duckdb.sql(f"select count(*) from {where} and error is not null").fetchall()
    table = html[html.index("<h3>Errors</h3>") : html.index("<h3>What stays open</h3>")]
    assert sum(int(cell.split("<")[0]) for cell in table.split('<td class="n">')[1:]) == errors > 0


def test_coherence_is_what_duckdb_counts(made: tuple[Path, str]) -> None:
    directory, html = made
    section = html[html.index('<section id="instruments">') : html.index('<section id="effects">')]
    part = section.split('<details class="phase"')[1]
    found = {head: numbers for _, head, numbers in Cells(part.split("</details>")[0]).rows if head}
    counted = duckdb.sql(
        "select condition, avg(coalesce(coherent, false)::int) from "
        f"'{directory}/trials/*.parquet' where phase = '1' and split = 'test' and error is null group by 1"
    ).fetchall()
    assert {c: [pytest.approx(share)] for c, share in counted} == found
    assert not any(math.isnan(v) for row in found.values() for v in row)


def test_light_rows_give_the_verdicts_that_all_columns_give(made: tuple[Path, str]) -> None:
    from kvpatch.verdicts.chosen_heads import with_heads
    from kvpatch.verdicts.decide import verdicts, verdicts_json

    store = Store(made[0])
    outcome = outcome_of(store)
    trials = with_heads(store.read().to_pandas(), store, outcome.protocol)
    whole = verdicts(outcome.protocol, trials, instrument_ok=True)
    assert verdicts_json(whole) == verdicts_json(outcome.verdicts)
