"""Tables and charts of attention and geometry: they hold what they are given, and bear having none of it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import vl_convert

from kvpatch.protocols.schema import Protocol
from kvpatch.report import head_charts as charts
from kvpatch.report import head_maps as tables
from kvpatch.report.charts import AnyChart, specification
from kvpatch.specs.attention import STATISTICS
from kvpatch.verdicts.head_contrasts import head_differences

LAYERS, HEADS, PAIRS = 3, 4, 12
NAMES = ("A", "B", "C", "N1")


def svg(chart: AnyChart) -> str:
    spec = specification(chart)
    assert "http" not in str(spec)
    return vl_convert.vegalite_to_svg(spec | ({"width": 500} if spec.get("width") == "container" else {}))


@pytest.fixture(scope="module")
def run() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trials of phases 5 and 6 and their heads. Under C head (1, 2) looks at marked words."""
    rng = np.random.default_rng(0)
    trials, heads = [], []
    for phase in ("5", "6"):
        for pair in range(PAIRS):
            for name in NAMES:
                share = {"sinks": 0.4, "template": 0.1, "body": 0.2, "trailer": 0.1, "generated": 0.2}
                put_in = 0.3 if name in ("C", "N1") else 0.0
                row: dict[str, Any] = {
                    "trial_id": f"{phase}-{pair}-{name}",
                    "phase": phase,
                    "split": "test",
                    "condition": name,
                    "pair_id": f"p{pair}",
                    "source_id": f"s{pair}",
                    "target_id": f"t{pair}",
                    "sample": 0,
                    "error": None,
                    "mode_llr": rng.normal(),
                    "rv_output": np.exp(rng.normal(0, 0.1)),
                    "rv_forced_trajectory": np.exp(rng.normal(0, 0.1, 9)) if phase == "5" else None,
                    "rv_trajectory": np.exp(rng.normal(0, 0.1, pair)) if phase == "5" else None,
                }
                if phase == "6":
                    row |= {f"attention_{part}": value for part, value in share.items()}
                    row |= {"attention_own": 0.4 - put_in, "attention_patched": put_in}
                    for layer in range(LAYERS):
                        for head in range(HEADS):
                            value = rng.normal(0.3, 0.02) + (0.4 if (name, layer, head) == ("C", 1, 2) else 0)
                            given = {"trial_id": row["trial_id"], "stage": "forced", "layer": layer, "head": head}
                            heads.append({**given, **dict.fromkeys(STATISTICS, value)})
                trials.append(row)
    return pd.DataFrame(trials), pd.DataFrame(heads)


def test_map_has_a_cell_a_head_and_a_ring_where_one_stands_out(run):
    heads = head_differences(*run, phase="6", contrast="C - N1", statistic="mass_marked")
    drawn = svg(charts.head_map_chart(heads, "marked"))
    assert drawn.count('aria-roledescription="rect mark"') == LAYERS * HEADS
    assert drawn.count('aria-roledescription="point"') == 1
    assert drawn.count('aria-roledescription="circle"') == int(heads["is_significant"].sum())


def test_maps_of_the_statistic_itself_stand_side_by_side(run):
    means = pd.DataFrame(
        [[c, x, y, 12, 0.5] for c in NAMES for x in range(LAYERS) for y in range(HEADS)],
        columns=["condition", "layer", "head", "n", "mean"],
    )
    assert (
        svg(charts.head_means_chart(means, "entropy")).count('aria-roledescription="rect mark"') == 4 * LAYERS * HEADS
    )


@pytest.mark.parametrize("by", ["origin", "segment"])
def test_shares_of_a_condition_add_to_1(run, by):
    shares = tables.attention_shares(run[0], "6", by)
    assert shares.groupby("condition")["share"].sum().tolist() == pytest.approx([1.0] * 4)
    drawn = svg(charts.attention_shares_chart(shares))
    assert drawn.count('aria-roledescription="bar"') == len(shares)
    assert tables.attention_shares(run[0], "5", by).empty


def test_trajectory_is_the_mean_of_the_log_over_the_pairs_that_reach_a_token(run):
    bands = tables.trajectories(run[0], "5", "rv_forced_trajectory", window=16)
    assert sorted(set(bands["token"])) == list(range(16, 25))
    assert set(bands["n"]) == {PAIRS}
    own = run[0][(run[0]["phase"] == "5") & (run[0]["condition"] == "A")]
    first = np.log([line[0] for line in own["rv_forced_trajectory"]])
    row = bands[(bands["condition"] == "A") & (bands["token"] == 16)].iloc[0]
    assert row["mean"] == pytest.approx(np.exp(first.mean()))
    assert row["low"] < row["mean"] < row["high"]
    ragged = tables.trajectories(run[0], "5", "rv_trajectory", window=16)
    assert ragged[ragged["condition"] == "A"]["n"].tolist() == list(range(PAIRS - 1, 1, -1))
    assert svg(charts.trajectory_chart(bands)).count('aria-roledescription="line mark"') == 4
    beside = svg(charts.trajectory_chart(bands, references=["A", "B"]))
    assert beside.count('aria-roledescription="line mark"') == 4 + 2 * 3  # both in every small chart but their own


def test_every_figure_that_a_run_can_fill_is_drawn(run, protocol: Protocol):
    trials, attention = run
    assert [f.title for f in tables.trajectory_figures(protocol, trials)] == [
        "R_V along the fixed continuation",
        "R_V along the output",
    ]
    drawn = tables.attention_figures(protocol, trials, attention)
    assert [f.id for f in drawn.maps] == [f"heads-6-{name}-C-N1" for name in tables.MAPPED]
    assert [f.id for f in drawn.ranked] == [f"ranked-6-{name}" for name in tables.MAPPED]
    found = {f.title: f for f in drawn.all}
    assert "Where attention goes: whose activations" in found
    told = found["Heads: attention on each marked word, C - N1"].about
    assert "layer 1 head 2." in told and "Exploratory" in told
    assert all(f.spec is not None for f in found.values())
    sets = found["Heads: attention on each marked word, C - N1"].spec["datasets"].values()
    assert [len(d["rows"]) for d in sets if d["name"] == "heads"] == [LAYERS * HEADS]


def test_heads_that_stand_out_are_ranked_first_and_then_the_largest(run):
    heads = head_differences(*run, phase="6", contrast="C - N1", statistic="mass_marked")
    ranked = tables.ranking(heads)
    assert len(ranked) == min(tables.RANKED, LAYERS * HEADS)
    assert (ranked.iloc[0]["layer"], ranked.iloc[0]["head"], bool(ranked.iloc[0]["stands_out"])) == (1, 2, True)
    rest = ranked.loc[~ranked["stands_out"], "estimate"].abs().tolist()
    assert rest == sorted(rest, reverse=True)
    drawn = svg(charts.ranked_heads_chart(ranked, "marked"))
    assert drawn.count('aria-roledescription="point"') == len(ranked)


def test_a_run_without_attention_or_geometry_has_no_figures(run, protocol: Protocol, trials: pd.DataFrame):
    for rows, heads in ((trials, run[1].iloc[:0]), (trials.iloc[:0], run[1])):
        assert tables.trajectory_figures(protocol, rows) == []
        assert tables.attention_figures(protocol, rows, heads).all == []


def test_charts_of_nothing_say_so():
    none = {"layer": [], "head": [], "estimate": [], "mean": [], "share": [], "x": [], "y": [], "condition": []}
    empty = pd.DataFrame(none)
    for chart in (
        charts.head_map_chart(empty, "x"),
        charts.head_means_chart(empty, "x"),
        charts.attention_shares_chart(empty),
        charts.trajectory_chart(empty),
    ):
        assert "no data" in svg(chart)


def test_neither_tables_nor_charts_need_torch():
    code = "import sys, kvpatch.report.head_maps, kvpatch.store.directory; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
