"""What the report shows of a finished run is what the statistics decided: marks, gates, roles, words and numbers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from markupsafe import escape

from finished import RUNS, STORED, needing_run, stored_run
from kvpatch.report.build import report_page
from kvpatch.report.forest import scale_of
from kvpatch.report.packing import opened, unpacked
from kvpatch.report.text import MINUS
from kvpatch.verdicts import prerequisites as gates
from kvpatch.verdicts.answer import WHY, answering, floor_checks
from kvpatch.verdicts.margins import claimed_side
from kvpatch.verdicts.outcome import Outcome, outcome_of
from kvpatch.verdicts.pairs import prepare, shown_of
from kvpatch.verdicts.wording import number, p_value, percent

Cell = tuple[str, str]
"""(phase, condition)."""
BADGE = re.compile(r'<span class="badge [^"]*"[^>]*><span aria-hidden="true">.</span> ([^<]+)</span>')
DATA = re.compile(r'<data value="([^"]+)">([^<]+)</data>')
CONDITION = re.compile(r'<b class="cond ?(\w*)"><bdi>([^<]+)</bdi></b>')
PHASE = re.compile(r"Phase <bdi>([^<]+)</bdi>")


@pytest.fixture(scope="module", params=[*RUNS, *STORED])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, str]:
    """(what a run says, its report)."""
    folder, name = tmp_path_factory.mktemp("equal"), request.param
    store = RUNS[name](folder / name) if name in RUNS else stored_run(name, folder)
    outcome = outcome_of(store)
    return outcome, opened(report_page(store, outcome))


def section(html: str, name: str) -> str:
    return html[html.index(f'<section id="{name}">') :].split("</section>")[0]


def by_phase(html: str, name: str) -> Iterator[tuple[str, str]]:
    """(phase, its part of a section that has one for each)."""
    for part in section(html, name).split('<details class="phase"')[1:]:
        found = PHASE.search(part)
        assert found is not None
        yield found[1], part


def rows_by_condition(html: str, name: str) -> Iterator[tuple[str, str, str, str]]:
    """(phase, condition, the role it is shown with, its row of a table) of a section."""
    for phase, part in by_phase(html, name):
        for row in part.split("<tr>"):
            found = CONDITION.search(row)
            if found is not None:
                yield phase, found[2], found[1], row.split("</tr>")[0]


def datasets(html: str) -> dict[str, dict[str, list[dict]]]:
    """Chart -> name of a data set -> its rows."""
    out = {}
    for chart, content in re.findall(r'class="spec" data-for="([^"]+)">(.*?)</script>', html):
        sets = json.loads(unpacked(content))["datasets"].values()
        out[chart] = {s["name"]: [dict(zip(s["columns"], row, strict=True)) for row in s["rows"]] for s in sets}
    return out


def shares_of(outcome: Outcome) -> dict[Cell, gates.Coherence]:
    return gates.coherence_shares(prepare(outcome.rows))


def incoherent(outcome: Outcome) -> set[Cell]:
    """The cells that the gate calls incoherent."""
    return {cell for cell, outputs in shares_of(outcome).items() if outputs.is_too_low}


def test_every_mark_of_incoherence_is_the_gates(made: tuple[Outcome, str]) -> None:
    outcome, html = made
    wanted = incoherent(outcome)  # of four pairs, hardly any share is below 90% beyond chance
    for name in ("instruments", "effects"):
        rows = list(rows_by_condition(html, name))
        shown = {(phase, condition) for phase, condition, _, row in rows if "below 90%" in row}
        assert shown == wanted & {(phase, condition) for phase, condition, *_ in rows}
    listed = re.findall(
        r"<b><bdi>([^<]+)</bdi></b> \(phase <bdi>([^<]+)</bdi>\) is coherent", section(html, "not-shown")
    )
    assert sorted((phase, condition) for condition, phase in listed) == sorted(wanted)
    assert {(e.phase, e.condition) for e in outcome.effects if e.is_incoherent} <= wanted
    judged = shares_of(outcome)
    found = f"{len(wanted)} of {len(judged)} fall below 90%" if wanted else "none is below 90%"
    assert found in section(html, "answer")
    for phase, part in by_phase(html, "instruments"):
        count = sum(cell[0] == phase for cell in wanted)
        told = f"{count} condition{'s' * (count != 1)} below the 90% needed"
        assert (told if count else "no condition below the 90% needed") in part


def test_a_mark_of_incoherence_is_what_blocks_a_verdict(made: tuple[Outcome, str]) -> None:
    outcome, html = made
    marked = {(phase, c) for phase, c, _, row in rows_by_condition(html, "instruments") if "below 90%" in row}
    for h, verdict in zip(outcome.protocol.hypotheses, outcome.verdicts, strict=True):
        reads_text = any(gates.reads_sampled_text(x) for x in (h.readout, *(v.readout for v, _ in h.others())))
        weak = {(h.phase, name) for name in h.conditions} & marked if reads_text else set()
        if verdict.blocked_by in (None, "coherence") and verdict.verdict != "tautological":
            assert bool(weak) == (verdict.blocked_by == "coherence"), h.id


def test_every_share_of_coherence_is_the_gates(made: tuple[Outcome, str]) -> None:
    outcome, html = made
    shares = shares_of(outcome)
    found = {
        (phase, condition): DATA.findall(row) for phase, condition, _, row in rows_by_condition(html, "instruments")
    }
    assert {cell: [(float(value), text) for value, text in data] for cell, data in found.items()} == {
        cell: [(outputs.share, percent(outputs.share))] for cell, outputs in shares.items()
    }
    for verdict in outcome.verdicts:
        if verdict.blocked_by == "coherence":
            weak = [c for c in verdict.coherence if (verdict.phase, c) in incoherent(outcome)]
            assert all(
                f"{percent(shares[verdict.phase, c].share)} of the outputs of {c}" in verdict.because for c in weak
            )


def test_every_gate_is_in_the_state_that_decided(made: tuple[Outcome, str]) -> None:
    outcome, html = made
    items = section(html, "instruments").split('<span class="gate-number">')[1:]
    shown = {int(item[0]): BADGE.findall(item)[0] for item in items}
    words = {v.id: v.verdict for v in outcome.verdicts}
    assert {gate: state for gate, state in shown.items() if gate} == gates.gate_states(outcome.protocol, words)
    closed = {gate for gate, state in shown.items() if state == "closed"}
    for h, verdict in zip(outcome.protocol.hypotheses, outcome.verdicts, strict=True):
        if verdict.verdict != "tautological":
            assert (verdict.blocked_by == "gate") == any(gate < h.gate for gate in closed), h.id
    keepers = re.findall(r"<bdi>(\w+)</bdi> <span class=\"quiet\">\(gatekeeper\)", section(html, "instruments"))
    assert sorted(keepers) == sorted(h.id for h in gates.gatekeepers(outcome.protocol) if words[h.id] != "tautological")


def test_every_prerequisite_is_in_the_state_that_decided(made: tuple[Outcome, str]) -> None:
    assert_prerequisites_are_shown(*made)


def test_prerequisites_that_passed_and_others_are_in_the_state_that_decided(tmp_path: Path) -> None:
    store = needing_run(tmp_path)
    outcome = outcome_of(store)
    html = report_page(store, outcome)
    assert set(assert_prerequisites_are_shown(outcome, html).values()) == {"holds", "fails"}
    assert not re.search(r"gate [1-5]<", html) and "(gatekeeper)" not in html
    assert {v.id: v.missing for v in outcome.verdicts if v.missing} == {"behind": "shut", "body": "behind"}


def assert_prerequisites_are_shown(outcome: Outcome, html: str) -> dict[str, str]:
    """Hold each prerequisite that the report shows against the verdicts. Prerequisite -> the state it is shown in."""
    by_id = {v.id: v for v in outcome.verdicts}
    shown: dict[str, tuple[str, list[str]]] = {}
    for item in section(html, "instruments").split('<a class="id needed"')[1:]:
        name, *needed_by = re.findall(r"<bdi>(\w+)</bdi>", item.split("</li>")[0])
        shown[name] = BADGE.findall(item)[0], needed_by
    needed = {name for v in outcome.verdicts for name in v.needs}
    assert {name: needed_by for name, (_, needed_by) in shown.items()} == {
        name: [v.id for v in outcome.verdicts if name in v.needs] for name in needed
    }
    for name, (state, needed_by) in shown.items():
        assert state == ("holds" if gates.has_passed(by_id[name].verdict) else "fails")
        assert all(by_id[i].missing != name or state == "fails" for i in needed_by)
        if state == "fails":
            assert all(by_id[i].missing is not None for i in needed_by)
    for v in outcome.verdicts:
        if v.needs and v.verdict != "tautological" and v.blocked_by != "instrument":
            assert (v.blocked_by == "prerequisite") == any(shown[name][0] == "fails" for name in v.needs), v.id
    return {name: state for name, (state, _) in shown.items()}


def test_every_role_is_the_one_the_condition_has_in_its_phase(made: tuple[Outcome, str]) -> None:
    outcome, html = made
    roles: dict[Cell, str] = {
        (str(phase), str(c)): role
        for (phase, c), role in outcome.rows[outcome.rows["split"] == "test"]
        .groupby(["phase", "condition"])["condition_role"]
        .first()
        .items()  # pyright: ignore[reportGeneralTypeIssues]
    }
    assert len(set(roles.values())) == 3
    assert {cell: outcome.protocol.role(*cell) for cell in roles} == roles
    for name in ("instruments", "effects", "conditions"):
        shown = {(phase, condition): role for phase, condition, role, _ in rows_by_condition(html, name)}
        assert shown == {cell: roles[cell] for cell in shown} != {}
    drawn = 0
    for chart, sets in datasets(html).items():
        kind, phase = [*chart.split("-"), ""][:2]
        for row in [row for rows in sets.values() for row in rows if kind in ("coherence", "readout", "effect")]:
            key = "colour" if kind == "effect" else "role"
            if key in row:
                drawn += 1
                assert row[key] == roles[phase, row.get("condition", row.get("name"))], (chart, row)
    assert drawn > 100
    for part in section(html, "texts").split('<div class="sample-phase" data-phase="Phase ')[1:]:
        for role, name in CONDITION.findall(part):
            assert role == roles[part.split(":")[0], name]


def test_every_verdict_is_shown_with_its_word_and_numbers(made: tuple[Outcome, str]) -> None:
    outcome, html = made
    found = re.findall(r'<tr id="h-(\w+)">(.*?)</tr>', section(html, "verdicts"), re.S)
    rows = dict(found)
    assert sorted(name for name, _ in found) == sorted(v.id for v in outcome.verdicts)
    for verdict in outcome.verdicts:
        row = rows[verdict.id]
        assert BADGE.findall(row)[0] == verdict.verdict
        ends = [] if None in (verdict.ci_low, verdict.ci_high) else [verdict.ci_low, verdict.ci_high]
        numbers = [verdict.estimate, *ends]
        wanted = [(p, p_value(p)) for p in (verdict.p, verdict.p_adjusted) if p is not None]
        wanted += [
            (value, number(value)) for value in (verdict.effect_size, *numbers, float(verdict.n)) if value is not None
        ]
        shown = [(float(value), text.replace(MINUS, "-").replace("&lt;", "<")) for value, text in DATA.findall(row)]
        assert shown == [(pytest.approx(value, rel=1e-9), text) for value, text in wanted]
        if verdict.blocked_by is None and verdict.n:
            assert all(number(value) in verdict.because for value in numbers if value is not None), verdict.because
        assert str(escape(verdict.because)) in row and str(escape(verdict.claim)) in row


def test_verdicts_are_grouped_by_word_and_by_what_blocked_them(made: tuple[Outcome, str]) -> None:
    outcome, html = made
    verdicts = {v.id: v for v in outcome.verdicts}
    parts = section(html, "verdicts").split('<details class="group"')[1:]
    seen: set[tuple[str, str | None, bool]] = set()
    for part in parts:
        head, body = part.split("</summary>", 1)
        members = [verdicts[name] for name in re.findall(r'<tr id="h-(\w+)">', body)]
        assert BADGE.findall(head) == list({v.verdict for v in members})
        assert int(re.findall(r"<strong>(\d+)</strong>", head)[0]) == len(members)
        measured = {v.n > 0 for v in members if v.verdict != "tautological"}
        assert len(measured) <= 1
        if measured == {True}:
            (blocked,) = {v.blocked_by for v in members}
            assert (blocked is None) == ('class="quiet"' not in head)
            assert blocked is None or WHY[blocked] in head
        key = (members[0].verdict, members[0].blocked_by, measured == {True})
        assert key not in seen
        seen.add(key)
    words = Counter(v.verdict for v in outcome.verdicts)
    chips = dict(re.findall(r'data-word="([^"]+)"><span aria-hidden="true">.</span> [a-z ]+ (\d+)</button>', html))
    assert {word: int(count) for word, count in chips.items()} == words
    item = html[html.index('<a href="#verdicts">') :].split("</li>")[0]
    signs = re.findall(r'title="(\d+) ([^"]+)">([^<]+)</span>', item)
    assert {word: (int(count), len(icons)) for count, word, icons in signs} == {w: (n, n) for w, n in words.items()}


def test_every_verdict_is_drawn_in_its_line_on_the_scale_of_its_readout(made: tuple[Outcome, str]) -> None:
    outcome, html = made
    known = {h.id: h for h in outcome.protocol.hypotheses}
    rows = dict(re.findall(r'<tr id="h-(\w+)">(.*?)</tr>', section(html, "verdicts"), re.S))
    scales: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for verdict in outcome.verdicts:
        pictures = re.findall(r'<svg class="ci (\w+)".*?</svg>', rows[verdict.id])
        assert len(pictures) == (verdict.estimate is not None)
        if not pictures:
            continue
        row = rows[verdict.id]
        drawn = [(verdict.estimate, float(re.findall(r'cx="([^"]+)"', row)[0]))]
        if verdict.ci_low is not None:
            ((low, high),) = re.findall(r'class="span" d="M([\d.]+) 7H([\d.]+)"', row)
            drawn += [(verdict.ci_low, float(low)), (verdict.ci_high, float(high))]
        sides = (-1, 1) if verdict.test == "equivalent" else (claimed_side(outcome.protocol, known[verdict.id]),)
        limits = [float(at) for at in re.findall(r'class="limit" d="M([\d.]+) ', row)]
        ends = [] if verdict.margin is None else [side * verdict.margin for side in sides if side is not None]
        if verdict.margin is not None and verdict.test not in ("attention_differs",):
            assert len(limits) == len(ends), verdict.id
            drawn += zip(sorted(ends), sorted(limits), strict=True)
        scales.setdefault(scale_of(known[verdict.id]), {})[verdict.id] = drawn
    assert scales
    for scale, members in scales.items():
        ends = [abs(value) for drawn in members.values() for value, _ in drawn]
        reach = max(ends) or 1.0
        for name, drawn in members.items():
            for value, at in drawn:
                assert at == pytest.approx(60 + 56 * value / reach, abs=0.06), (scale, name)


def test_the_answer_tells_the_numbers_and_floors_of_the_verdicts(made: tuple[Outcome, str]) -> None:
    outcome, html = made
    shown = section(html, "answer")
    told = outcome.told
    assert told.full == outcome.answer and f"<bdi>{escape(told.short)}</bdi></h2>" in shown
    assert re.findall(r'<p class="in-numbers"><bdi>(.*?)</bdi></p>', shown) == [str(escape(s)) for s in told.numbers]
    rows = prepare(outcome.rows)
    floors = floor_checks(outcome.protocol, rows)
    assert [str(escape(floor.told)) in shown for floor in floors] == [True] * len(floors)
    for floor in floors:
        part = rows[(rows["split"] == "test") & (rows["phase"] == floor.phase) & ~rows["failed"]]
        wide = part.pivot_table(index="pair_id", columns="condition", values=floor.readout)[["A", "B"]].dropna()
        least = 0 if floor.than == "0" else wide["A"]
        assert (floor.above, floor.n) == (int((wide["B"] > least).sum()), len(wide))
    for v in answering(outcome.protocol, outcome.verdicts):
        if v.estimate is not None and v.n:
            sentence = next(s for s in told.numbers if f"{v.contrast} is {number(v.estimate)}" in s)
            assert v.verdict in sentence and f"n = {v.n}" in sentence
    named = dict(re.findall(r"<b><bdi>(.*?)</bdi></b>: <bdi>(.*?)</bdi>", shown))
    wanted = {
        c for v in answering(outcome.protocol, outcome.verdicts) for c in outcome.protocol.hypothesis(v.id).conditions
    }
    assert named == {name: str(escape(outcome.protocol.conditions[name].about)) for name in wanted}


def test_the_first_figure_draws_the_verdicts_and_effects_of_what_answers(made: tuple[Outcome, str]) -> None:
    outcome, html = made
    sets = {chart: found for chart, found in datasets(html).items() if chart.startswith("primary-")}
    main = [v for v in answering(outcome.protocol, outcome.verdicts) if v.estimate is not None]
    by_id, seen = {v.id: v for v in outcome.verdicts}, set[str]()
    read = {(v.phase, v.readout) for v in main}
    for found in sets.values():
        for row in found["estimates"]:
            drawn = (row["estimate"], row["low"], row["high"], row["n"])
            if row["name"] in by_id:
                verdict = by_id[row["name"]]
                asked = [(verdict.estimate, verdict.ci_low, verdict.ci_high, verdict.n)]
                seen.add(verdict.id)
            else:  # of the readouts that the answer rests on; the effects of two may have the same estimate
                asked = [
                    (e.estimate, e.ci_low, e.ci_high, e.n)
                    for e in outcome.effects
                    if (e.condition, e.natural, e.is_incoherent) == (row["name"], "A", row["hollow"])
                    and (e.phase, e.readout) in read
                ]
            assert any(drawn == tuple(v if v is None else pytest.approx(v, rel=1e-5) for v in of) for of in asked)
    assert {v.id for v in main} <= seen


def test_every_row_of_the_plan_is_shown_with_its_word_sentence_and_numbers(made: tuple[Outcome, str]) -> None:
    outcome, html = made
    rows = outcome.plan_table
    if not rows:
        assert 'id="plan"' not in html
        return
    table = section(html, "plan").split("</table>")[0]
    shown = [row for row in table.split("<tr>")[2:] if "rowgroup" not in row]
    assert len(shown) == len(rows)
    for row, part in zip(rows, shown, strict=True):
        assert BADGE.findall(part) == [row.verdict, *(f.verdict for f in row.findings)]
        assert str(escape(row.answer)) in part and str(escape(row.claim)) in part
        numbers = [
            value
            for f in row.findings
            if f.estimate is not None
            for value in (f.estimate, *((f.ci_low, f.ci_high) if f.ci_low is not None else ()), f.n, f.p_adjusted)
        ]
        best = row.telling
        assert best is None or best in row.findings
        assert (best is None) == all(f.estimate is None for f in row.findings)
        if best is not None:
            numbers += [best.estimate, *((best.ci_low, best.ci_high) if best.ci_low is not None else ()), best.n]
        wanted = [value for value in numbers if value is not None]
        assert [float(value) for value, _ in DATA.findall(part)] == [pytest.approx(v, rel=1e-9) for v in wanted]


def test_every_hypothesis_is_drawn_with_its_numbers_and_the_margin_on_its_side(made: tuple[Outcome, str]) -> None:
    outcome, html = made
    sets = datasets(html)
    drawn = {row["name"]: row for chart in sets if chart.startswith("forest-") for row in sets[chart]["estimates"]}
    assert set(drawn) == {v.id for v in outcome.verdicts if v.estimate is not None}
    for h, verdict in zip(outcome.protocol.hypotheses, outcome.verdicts, strict=True):
        if verdict.estimate is None:
            continue
        row = drawn[h.id]
        for key, value in (("estimate", verdict.estimate), ("low", verdict.ci_low), ("high", verdict.ci_high)):
            assert row[key] == (None if value is None else pytest.approx(value, rel=1e-5)), h.id
        assert (row["n"], row["colour"]) == (verdict.n, verdict.verdict)
        size = verdict.margin
        sides = (-1, 1) if h.test == "equivalent" else (claimed_side(outcome.protocol, h),)
        for side, key in ((-1, "margin_low"), (1, "margin_high")):
            assert row[key] == (pytest.approx(side * size, rel=1e-5) if size is not None and side in sides else None)


def test_every_effect_is_the_verdict_on_the_same_contrast(made: tuple[Outcome, str]) -> None:
    """A condition less its natural run is what a hypothesis on that contrast measures: same units, same mean."""
    outcome, html = made
    verdicts = {(v.phase, v.contrast, v.readout): v for v in outcome.verdicts if v.test == "greater"}
    verdicts |= {(v.phase, v.contrast, v.readout): v for v in outcome.verdicts if v.test == "equivalent"}
    shown = {(phase, c): DATA.findall(row) for phase, c, _, row in rows_by_condition(html, "effects")}
    compared = 0
    for effect in outcome.effects:
        verdict = verdicts.get((effect.phase, f"{effect.condition} - {effect.natural}", effect.readout))
        if verdict is not None:
            compared += 1
            assert (effect.n, effect.estimate) == (verdict.n, pytest.approx(verdict.estimate, rel=1e-9)), effect
            assert any(
                float(value) == pytest.approx(effect.estimate) for value, _ in shown[effect.phase, effect.condition]
            )
    assert compared >= 3


def test_means_of_conditions_differ_by_what_the_verdicts_say(made: tuple[Outcome, str]) -> None:
    """Where every pair has both conditions, the difference of their means is the estimate, over as many units."""
    outcome, html = made
    found = {(phase, c): DATA.findall(row) for phase, c, _, row in rows_by_condition(html, "conditions")}
    tested = outcome.rows[outcome.rows["split"] == "test"]
    places = {
        str(phase): {readout.name: 3 * place for place, readout in enumerate(shown_of("report", rows))}
        for phase, rows in tested.groupby("phase")
    }
    sets, compared = datasets(html), 0
    for h, verdict in zip(outcome.protocol.hypotheses, outcome.verdicts, strict=True):
        is_simple = h.test != "correlates" and not h.is_ordering and h.transform == "none" and not verdict.n_error_rows
        if not is_simple or verdict.n_dropped or not verdict.n or h.readout not in places[h.phase]:
            continue
        values = {c: float(found[h.phase, c][places[h.phase][h.readout]][0]) for c in h.conditions}
        assert sum(w * values[c] for c, w in h.weights().items()) == pytest.approx(verdict.estimate, abs=1e-9), h.id
        means = {row["condition"]: row for row in sets[f"readout-{h.phase}-{h.readout}"]["means"]}
        assert {means[c]["n"] for c in h.conditions} == {verdict.n}
        compared += 1
    assert compared > 8
