"""Charts hold the data they are given, and bear having none."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import vl_convert

from kvpatch.protocols.schema import Protocol
from kvpatch.report import charts, tables


def svg(chart: charts.AnyChart) -> str:
    spec = charts.specification(chart) | {"width": 500}
    return vl_convert.vegalite_to_svg(spec)


def test_a_readout_chart_holds_a_dot_a_pair_and_a_mean_a_condition(protocol: Protocol, trials: pd.DataFrame) -> None:
    points, means = tables.condition_means(tables.normalised(trials), "recursive_score", protocol)
    drawn = svg(charts.conditions_chart(points, means, "hits", "A"))
    assert drawn.count('aria-roledescription="circle"') == len(points) == 202
    assert drawn.count('aria-roledescription="point"') == 17
    assert drawn.count('aria-roledescription="rule mark"') == 17 + 1


@pytest.mark.parametrize("rows", [0, 1])
def test_charts_of_nothing_say_so(rows: int) -> None:
    means = pd.DataFrame(
        [["A", "natural target", "experiment", math.nan, math.nan, math.nan, 0]] * rows,
        columns=["condition", "about", "role", "mean", "low", "high", "n"],
    )
    points = pd.DataFrame(columns=["condition", "pair", "value", "role"])
    assert "no data" in svg(charts.conditions_chart(points, means, "hits"))
    coherence = means.assign(share=math.nan)
    assert "no data" in svg(charts.coherence_chart(coherence))


def test_one_pair_is_drawn_without_an_interval() -> None:
    points = pd.DataFrame({"condition": ["A"], "pair": ["p"], "value": [1.5], "role": ["experiment"]})
    means = pd.DataFrame(
        [["A", "natural target", "experiment", 1.5, math.nan, math.nan, 1]],
        columns=["condition", "about", "role", "mean", "low", "high", "n"],
    )
    drawn = svg(charts.conditions_chart(points, means, "hits"))
    assert drawn.count('aria-roledescription="circle"') == 1
    assert drawn.count('aria-roledescription="rule mark"') == 0


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
