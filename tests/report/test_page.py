"""The page says what the trials say, holds all it needs, and lets no text become anything but text."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser

import pandas as pd
import pytest

from kvpatch.protocols.plan_rows import PlanRow
from kvpatch.protocols.schema import Protocol
from kvpatch.report.packing import opened, unpacked
from kvpatch.report.page import render
from kvpatch.report.questions import _is_against_a_foreign_cache
from kvpatch.specs.readouts import shown
from kvpatch.verdicts.plan_table import plan_table

HOSTILE = [
    "<script>window.ran = 1</script>",
    "</script><script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'>",
    '"><svg onload="window.ran = 1">',
    "<!--<script>",
    "{{ 7 * 7 }}{% raw %}",
    "\u202eright to left\u2069\u200f \u05d0\u05d1",
    "nul\x00bell\x07\u2028\u2029\ud800end",
    "w" * 10_000,
    "javascript:window.ran=1",
]
ALLOWED_TAGS = set(
    "html head meta title style body header p h1 nav a main section h2 h3 h4 h5 ul ol li span strong b bdi code "
    "table thead tbody tr th td data br details summary dl div dt dd figure figcaption script article mark "
    "pre svg path circle button label input".split()
)


class Page(HTMLParser):
    """What a parser makes of the page: tags, attributes, and the text by section."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text: list[str] = []
        self.values: list[float] = []
        self._script: dict[str, str | None] | None = None
        self.feed(opened(html))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = dict(attrs) if tag == "script" else None
        if tag == "data":
            self.values.append(float(dict(attrs)["value"] or "nan"))

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts.append((self._script, data))
        else:
            self.text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    @property
    def said(self) -> str:
        return "".join(self.text)

    def table(self, chart: str, name: str) -> list[dict]:
        """The rows of a chart's data set."""
        (spec,) = (json.loads(unpacked(s)) for attrs, s in self.scripts if attrs.get("data-for") == chart)
        (found,) = (d for d in spec["datasets"].values() if d["name"] == name)
        return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]

    @property
    def specs(self) -> list[dict]:
        return [json.loads(unpacked(s)) for attrs, s in self.scripts if attrs.get("data-for")]


def hostile(trials: pd.DataFrame) -> pd.DataFrame:
    texts = pd.Series([HOSTILE[i % len(HOSTILE)] for i in range(len(trials))], dtype=object)
    out = trials.assign(text=texts, source_text=texts, target_text=texts, stopped=texts)
    return out.assign(pair_id=[f"{p} {HOSTILE[int(p[-1]) % 4]}" for p in out["pair_id"]])


def test_sections_come_in_order(run: dict, protocol: Protocol, trials: pd.DataFrame, verdicts: list[dict]) -> None:
    html = render(run, protocol, trials, verdicts, "The answer.")
    ids = ["answer", "plan", "attacks", "questions", "texts", "verdicts", "instruments", "effects", "conditions", "how"]
    ids.append("not-shown")
    places = [html.index(f'<section id="{name}">') for name in ids]
    assert places == sorted(places)
    assert "The answer." in html and len(html.encode()) < 3_000_000


def test_every_mean_is_the_one_the_frame_gives(
    run: dict, protocol: Protocol, trials: pd.DataFrame, verdicts: list[dict]
) -> None:
    page = Page(render(run, protocol, trials, verdicts, ""))
    tested = trials[trials["split"] == "test"]
    for column in ("recursive_score", "recursive_score_masked", "mode_llr", "content_llr", "rv_output"):
        for _, mean in tested.groupby("condition")[column].mean().items():
            assert any(value == pytest.approx(mean, rel=1e-12) for value in page.values)
    for column in ("n_tokens", "nll_own", "nll_target", "repetition"):
        for _, mean in tested.groupby("condition")[column].mean().items():
            assert any(value == pytest.approx(mean, rel=1e-12) for value in page.values)


def test_every_verdict_shows_its_numbers_word_and_reason(
    run: dict, protocol: Protocol, trials: pd.DataFrame, verdicts: list[dict]
) -> None:
    page = Page(render(run, protocol, trials, verdicts, ""))
    for verdict in verdicts:
        for key in ("estimate", "ci_low", "ci_high", "p", "p_adjusted", "effect_size"):
            assert verdict[key] in page.values
        assert verdict["because"] in page.said
    for word in (
        "supported",
        "not supported",
        "equivalent",
        "inconclusive",
        "not interpretable",
        "tautological",
    ):
        assert f" {word}</span>" in render(run, protocol, trials, verdicts, "")
    assert "no verdict" in page.said  # the last hypothesis has none


def test_the_plans_table_comes_right_after_the_answer_with_its_verdicts_and_numbers(
    run: dict, protocol: Protocol, trials: pd.DataFrame, verdicts: list[dict]
) -> None:
    verdicts = [v for v in verdicts if v["id"] != "was_swap"]  # a row of the plan then has one without a verdict
    html = render(run, protocol, trials, verdicts, "The answer.")
    table = html[html.index('<section id="plan">') :].split("</section>")[0]
    between = html[html.index("</section>", html.index('<section id="answer">')) : html.index('<section id="plan">')]
    assert between.removeprefix("</section>").strip() == ""
    page, given = Page(table), {v["id"]: v for v in verdicts}
    rows = plan_table(protocol, verdicts, {None: "smollm2-135m"})
    assert [row.claim for row in rows] == [row.claim for row in protocol.plan_rows]
    for row in rows:
        for told in (row.claim, row.expected, row.answer, row.unknown):
            assert told is None or told in page.said
        for f in row.findings:
            if f.id in given:
                assert {given[f.id][key] for key in ("estimate", "ci_low", "ci_high", "n")} <= set(page.values)
    assert table.count("<tr>") == 1 + len(rows) + len({row.kind for row in rows})
    assert "smollm2-135m" in page.said and "no verdict" in page.said


def test_what_a_plan_says_stays_text(run: dict, protocol: Protocol, trials: pd.DataFrame, verdicts: list[dict]) -> None:
    said = iter([text.replace("\ud800", "") for text in HOSTILE] * 10)  # no protocol holds half a character
    plan = [
        PlanRow(kind=kind, claim=f"{place} {next(said)}", expected=next(said), unknown=next(said), hypotheses=[h.id])
        for place, kind in enumerate(("intervention", "question") * 5)
        for h in protocol.hypotheses[place : place + 1]
    ]
    named = protocol.model_copy(update={"plan": plan})
    calm = Page(render(run, protocol, trials, verdicts, ""))
    page = Page(render(run, named, trials, verdicts, ""))
    assert {tag for tag, _ in page.tags} <= ALLOWED_TAGS and len(page.scripts) == len(calm.scripts)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert all(h in page.said for h in HOSTILE[:6])


def test_a_protocol_without_a_plan_has_no_table_and_no_questions(
    run: dict, protocol: Protocol, trials: pd.DataFrame, verdicts: list[dict]
) -> None:
    hypotheses = [h.model_copy(update={"criterion": None}) for h in protocol.hypotheses]
    html = render(run, protocol.model_copy(update={"plan": [], "hypotheses": hypotheses}), trials, verdicts, "")
    assert 'id="plan"' not in html and 'id="questions"' not in html and "#questions" not in html


def test_charts_hold_how_the_pairs_of_every_condition_spread(
    run: dict, protocol: Protocol, trials: pd.DataFrame, verdicts: list[dict]
) -> None:
    page = Page(render(run, protocol, trials, verdicts, ""))
    tested = trials[(trials["split"] == "test") & trials["error"].isna()]
    for readout in shown("report", ()):
        means = page.table(f"readout-1-{readout.name}", "means")
        assert [row["condition"] for row in means] == protocol.phases["1"].all_conditions
        is_floored = tested.get(readout.name, pd.Series([1.0])).min() == 0
        for row in means:
            if row["mean"] is None:
                assert readout.name not in tested
                continue
            own = tested.loc[tested["condition"] == row["condition"], readout.name]
            shares = (0.1, 0.25, 0.5, 0.75, 0.9)
            wanted = [float(own.quantile(share)) for share in shares]
            assert [row[f"p{share:.0%}"[:-1]] for share in shares] == pytest.approx(wanted, rel=1e-3)
            assert row["above"] == (pytest.approx((own > 0).mean(), rel=1e-3) if is_floored else None)
    assert len(page.table("coherence-1", "bars")) == 19


def test_a_hypothesis_is_drawn_with_the_verdicts_own_numbers(
    run: dict, protocol: Protocol, trials: pd.DataFrame, verdicts: list[dict]
) -> None:
    page = Page(render(run, protocol, trials, verdicts, ""))
    drawn = {row["name"]: row for row in page.table("forest-recursive_score", "estimates")}
    asked = [h.id for h in protocol.hypotheses if h.readout == "recursive_score" and not h.is_ordering]
    assert list(drawn) == asked
    given = {v["id"]: v for v in verdicts}
    for name, row in drawn.items():
        assert (row["estimate"], row["low"], row["high"]) == pytest.approx(
            [given[name][key] for key in ("estimate", "ci_low", "ci_high")], rel=1e-5
        )
    assert (drawn["null_E1"]["margin_low"], drawn["null_E1"]["margin_high"]) == (-0.42, 0.42)
    assert (drawn["seed_memory"]["margin_low"], drawn["seed_memory"]["margin_high"]) == (None, 0.42)
    assert (drawn["seed_necessity"]["margin_low"], drawn["seed_necessity"]["margin_high"]) == (-0.42, None)


def test_every_link_inside_leads_somewhere(
    run: dict, protocol: Protocol, trials: pd.DataFrame, verdicts: list[dict]
) -> None:
    page = Page(render(run, protocol, trials, verdicts, ""))
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    wanted = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert wanted <= {f"#{name}" for name in ids}


def test_hostile_texts_stay_text(
    run: dict,
    protocol: Protocol,
    trials: pd.DataFrame,
    verdicts: list[dict],
    marker: Callable[..., list[tuple[int, int, str]]],
) -> None:
    calm = Page(render(run, protocol, trials, verdicts, "", marker))
    run["model"]["name"] = run["git"]["commit"] = run["hardware"]["cpu"] = HOSTILE[1]
    run["skipped"] = [{"phase": h, "condition": h, "reason": h} for h in HOSTILE]
    run["check"] = [{"identity": h, "holds": False, "error": h, "bound": None} for h in HOSTILE]
    for i, verdict in enumerate(verdicts):
        verdict["because"] = verdict["claim"] = HOSTILE[i % len(HOSTILE)]
    verdicts.append({"id": HOSTILE[3], "verdict": HOSTILE[2], "claim": HOSTILE[0], "margin": HOSTILE[0]})
    html = opened(render(run, protocol, hostile(trials), verdicts, HOSTILE[1], marker))
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= ALLOWED_TAGS
    assert len(page.scripts) == len(calm.scripts)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert html.encode("utf-8") and not set("\x00\x07\u202e\u2069\u2028\u2029") & set(html)
    assert all(h in page.said for h in HOSTILE[:6])
    assert "nul\u2400bell\u2407" in page.said and "\u27e8RLO\u27e9right to left\u27e8PDI\u27e9" in page.said


def test_nothing_outside_the_file_is_referred_to(
    run: dict, protocol: Protocol, trials: pd.DataFrame, verdicts: list[dict]
) -> None:
    page = Page(render(run, protocol, trials, verdicts, ""))
    for _, attrs in page.tags:
        assert not {"src", "srcset", "data", "action", "poster"} & set(attrs)
        assert (attrs.get("href") or "#").startswith("#")
        assert "url(" not in (attrs.get("style") or "")
    assert "@import" not in page.said and "url(" not in page.said  # the style sheet is part of it
    assert all("http" not in json.dumps(spec) for spec in page.specs)
    policy = next(a["content"] or "" for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("style-src")[0]


@pytest.mark.parametrize("kind", ["no rows", "no columns", "keys only", "all missing", "one pair"])
def test_a_page_is_made_of_any_table(
    kind: str, run: dict, protocol: Protocol, trials: pd.DataFrame, verdicts: list[dict]
) -> None:
    numbers = trials.select_dtypes("number").columns.drop("sample")
    tables = {
        "no rows": trials.iloc[:0],
        "no columns": pd.DataFrame(),
        "keys only": trials[["phase", "condition", "pair_id"]],
        "all missing": trials.assign(**dict.fromkeys([*numbers, "coherent", "text", "source_text"], None)),
        "one pair": trials[trials["pair_id"] == "pair-000"],
    }
    page = Page(render(run, protocol, tables[kind], verdicts, "The answer."))
    assert ("no data" in page.said) == (kind != "one pair")
    assert "nan" not in page.said.lower().replace("resonan", "").split()


def test_a_run_record_may_be_empty(protocol: Protocol, trials: pd.DataFrame) -> None:
    said = Page(render({}, protocol, trials, [], "")).said
    assert "not recorded" in said
    assert "No validation of this version is recorded: " in said
    assert "No check of this model is recorded" in said


def test_a_changed_protocol_and_a_failed_validation_raise_an_alarm(
    run: dict, protocol: Protocol, trials: pd.DataFrame
) -> None:
    html = render(run, protocol, trials, [], "")
    assert 'role="alert"' not in html
    html = render(run | {"protocol_sha256": "00", "validation": {"passed": False}}, protocol, trials, [], "")
    assert html.count('role="alert"') == 2


def test_what_was_not_shown_names_every_kind_of_gap(
    run: dict, protocol: Protocol, trials: pd.DataFrame, verdicts: list[dict]
) -> None:
    next(v for v in verdicts if v["id"] == "seed_memory")["verdict"] = "tautological"
    html = render(run, protocol, trials, verdicts, "")
    said = Page(html[html.index('<section id="not-shown">') :].split("</section>")[0]).said
    for part in ("E9", "the model has one KV head", "12 pairs have results", "plans 100", "Small n."):
        assert part in said
    for part in (
        "C >> A: the mode is in memory",
        "gave the very output of",
        "RuntimeError: planted",
        "2.4e-07",
    ):
        assert part in said
    assert "F1" in said and "33%" in said


def test_hits_and_copied_words_are_marked_apart(
    run: dict,
    protocol: Protocol,
    trials: pd.DataFrame,
    marker: Callable[..., list[tuple[int, int, str]]],
) -> None:
    html = render(run, protocol, trials, [], "", marker)
    assert '<mark class="hit" title="hit of the mode">' in html
    assert '<mark class="copied" title="copied from the source">' in html
    assert "<mark" not in render(run, protocol, trials, [], "")


def test_a_test_against_a_foreign_cache_is_known_by_its_givers(protocol: Protocol):
    contrasts = {h.contrast for h in protocol.hypotheses if _is_against_a_foreign_cache(protocol, h.id)}
    assert "C - N1" in contrasts and not contrasts & {"B - A", "C - A", "E1 - A"}
    assert not _is_against_a_foreign_cache(protocol, "unknown")
