"""Charts hold the data they are given, and bear having none."""

from __future__ import annotations

import json
import math
import re

import pandas as pd
import pytest
import vl_convert

from kvpatch.protocols.schema import Protocol
from kvpatch.report import charts, dose, forest, tables
from kvpatch.view import estimates


def svg(chart: charts.Drawn) -> str:
    spec = charts.specification(chart) | {"width": 500}
    return vl_convert.vegalite_to_svg(spec)


SPREAD = {"p10": 0.5, "p25": 0.8, "p50": 1.0, "p75": 1.5, "p90": 2.0, "above": math.nan}


def test_a_readout_chart_holds_a_mean_a_condition_over_the_spread_of_its_pairs(
    protocol: Protocol, trials: pd.DataFrame
) -> None:
    _, means = tables.condition_means(tables.normalised(trials), "recursive_score", protocol)
    drawn = svg(charts.conditions_chart(means, "hits", "A"))
    assert drawn.count('aria-roledescription="point"') == 19
    assert drawn.count('aria-roledescription="rule mark"') == 3 * 19 + 1
    assert drawn.count(" above 0</text>") == 19


@pytest.mark.parametrize("rows", [0, 1])
def test_charts_of_nothing_say_so(rows: int) -> None:
    means = pd.DataFrame(
        [["A", "natural target", "experiment", math.nan, math.nan, math.nan, 0]] * rows,
        columns=["condition", "about", "role", "mean", "low", "high", "n"],
    ).assign(**dict.fromkeys(SPREAD, math.nan))
    assert "no data" in svg(charts.conditions_chart(means, "hits"))
    coherence = means.assign(share=math.nan)
    assert "no data" in svg(charts.coherence_chart(coherence))


def test_one_pair_is_drawn_without_an_interval() -> None:
    means = pd.DataFrame(
        [["A", "natural target", "experiment", 1.5, math.nan, math.nan, 1]],
        columns=["condition", "about", "role", "mean", "low", "high", "n"],
    ).assign(**SPREAD)
    drawn = svg(charts.conditions_chart(means, "hits"))
    assert drawn.count('aria-roledescription="point"') == 1
    assert drawn.count('aria-roledescription="rule mark"') == 2  # how pairs spread, and no interval
    assert " above 0</text>" not in drawn


def test_the_coherence_chart_has_a_bar_a_known_share() -> None:
    shares = pd.DataFrame(
        {
            "condition": ["A", "B"],
            "about": "x",
            "role": "control",
            "share": [0.5, math.nan],
            "is_below": False,
        }
    )
    assert svg(charts.coherence_chart(shares)).count('aria-roledescription="bar"') == 1


def test_a_chart_names_no_address() -> None:
    shares = pd.DataFrame({"condition": ["A"], "about": "x", "role": "control", "share": [1.0]})
    assert "http" not in str(charts.specification(charts.coherence_chart(shares)))


@pytest.mark.parametrize("series", [["put in"], ["put in", "read after"]])
def test_the_points_of_a_dose_stand_around_the_middle_of_its_tick(series: list[str]) -> None:
    rows = [
        {
            "series": name,
            "dose": f"L{i}",
            "order": i,
            "condition": f"D{i}",
            "mean": i + 0.5 * k,
            "low": 0.0,
            "high": 4.0,
        }
        for k, name in enumerate(series)
        for i in range(4)
    ]
    drawn = svg(dose.dose_chart(pd.DataFrame(rows).assign(n=9, **SPREAD), "level", "nats"))
    points = [float(x) for x in re.findall(r'roledescription="point" transform="translate\(([-\d.]+),', drawn)]
    axis = next(part for part in drawn.split('role-axis-label"') if ">L0</text>" in part)
    ticks = [float(x) for x in re.findall(r'transform="translate\(([-\d.]+),[^>]*>L\d</text>', axis)]
    assert (len(points), len(ticks)) == (4 * len(series), 4)
    middles = [sum(points[i::4]) / len(series) for i in range(4)]
    assert middles == pytest.approx([tick - 0.5 for tick in ticks], abs=1.0)


def by_altair(chart: charts.Drawn) -> dict:
    """The packed chart, every part of it built anew by altair."""
    return charts.packed(charts.built(chart))


@pytest.mark.parametrize("kept", [[], ["A"], ["A", "B", "C"]])
@pytest.mark.parametrize("baseline", [None, "A"])
def test_a_chart_from_the_template_is_what_altair_builds(
    protocol: Protocol, trials: pd.DataFrame, kept: list[str], baseline: str | None
) -> None:
    _, means = tables.condition_means(tables.normalised(trials), "recursive_score", protocol)
    for some in (means, means.assign(above=math.nan)):
        chart = charts.conditions_chart(some[some["condition"].isin(kept)], "hits", baseline)
        assert json.dumps(charts.packed(chart)) == json.dumps(by_altair(chart))


@pytest.mark.parametrize("margins", [(None, None), (-1.0, None), (None, 1.0), (-1.0, 1.0)])
def test_a_forest_plot_from_the_template_is_what_altair_builds(margins: tuple[float | None, float | None]) -> None:
    for n in (1, 3):
        numbers = {"estimate": 0.5, "low": 0.1, "high": math.nan, "n": 4}
        numbers |= {"margin_low": margins[0], "margin_high": margins[1]}
        rows = [
            {"row": f"row {i}", "name": f"name {i}", "about": "x", "colour": "control", "hollow": i > 0, **numbers}
            for i in range(n)
        ]
        chart = forest.forest_chart(pd.DataFrame(rows), "a title", charts.ROLE_COLOURS)
        assert json.dumps(charts.packed(chart)) == json.dumps(by_altair(chart))


@pytest.mark.parametrize("low", [math.nan, 0.1])
def test_a_narrowing_chart_from_the_template_is_what_altair_builds(low: float) -> None:
    path = [{"n": n, "estimate": 0.5, "low": low, "high": low} for n in (3, 4)]
    chart = estimates.narrowing_chart(path, "a title", "pairs")
    assert json.dumps(charts.packed(chart)) == json.dumps(by_altair(chart))
