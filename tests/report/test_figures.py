"""Maps, dose curves, scatter plots and models side by side: what is on them, and what is left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import vl_convert

from kvpatch.report import across, charts, dose, forest, geometry, maps, samples, tables
from kvpatch.report.judgements import verdict_rows
from kvpatch.verdicts.outcome import Outcome, outcome_of
from synthetic import write_run


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return outcome_of(write_run(tmp_path_factory.mktemp("figures") / "run", n=6))


@pytest.fixture(scope="module")
def effects(outcome: Outcome) -> list[dict]:
    return [effect.model_dump() for effect in outcome.effects]


@pytest.fixture(scope="module")
def rows(outcome: Outcome) -> list[dict]:
    return verdict_rows([v.model_dump() for v in outcome.verdicts], outcome.protocol)


@pytest.fixture(scope="module")
def trials(outcome: Outcome) -> pd.DataFrame:
    return tables.normalised(outcome.rows)


def data(figure: Any, name: str) -> list[dict]:
    (found,) = (d for d in figure.spec["datasets"].values() if d["name"] == name)
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


def test_a_map_stands_over_the_layers_that_were_put_in(outcome: Outcome, effects: list[dict]) -> None:
    layers = dict.fromkeys(outcome.protocol.phases, 30)
    found = {f.id: f for f in maps.map_figures(effects, outcome.protocol, layers)}
    bands = {row["condition"]: row for row in data(found["map-2-bands-of-layers-mode_llr"], "means")}
    assert {"L_0_4", "W_0_8", "W_24_32n"} <= set(bands)
    assert (bands["L_8_16"]["start"], bands["L_8_16"]["end"]) == (7.5, 15.0)
    assert bands["W_0_8n"]["series"] == "from a foreign prompt"
    tokens = {row["condition"]: row for row in data(found["map-3-parts-of-the-body-mode_llr"], "means")}
    assert (tokens["T_middle"]["start"], tokens["T_middle"]["end"]) == (25, 75)
    assert "T_self" not in tokens
    single = data(found["map-2-single-layers-mode_llr"], "means")
    assert [row["end"] - row["start"] for row in single] == [1] * 16  # and a foreign prompt's
    given = {e["condition"]: e for e in effects if (e["phase"], e["readout"]) == ("2", "mode_llr")}
    for row in bands.values():
        assert row["mean"] == pytest.approx(given[row["condition"]]["estimate"], rel=1e-5)


def test_a_dose_curve_has_every_level_in_order(outcome: Outcome, trials: pd.DataFrame) -> None:
    found = {f.id: f for f in dose.dose_figures(trials, outcome.protocol)}
    means = pd.DataFrame(data(found["dose-4-levels-mode_llr"], "means"))
    put_in = means[means["series"] == "its cache put in"].sort_values("order")
    assert put_in["condition"].tolist() == ["D0", "D1", "D2", "D3", "D4", "D5"]
    assert put_in["dose"].tolist()[0] == "long_control" and put_in["dose"].tolist()[-1] == "L5_refined"
    four = trials[(trials["phase"] == "4") & (trials["condition"] == "D3")]
    assert put_in["mean"].tolist()[3] == pytest.approx(four["mode_llr"].mean(), rel=1e-5)
    strength = pd.DataFrame(data(found["dose-interventions-strength-mode_llr"], "means"))
    assert sorted(set(strength["order"])) == [0, 0.5, 1, 2, 4]


def test_a_scatter_plot_has_a_point_a_pair(outcome: Outcome, trials: pd.DataFrame, rows: list[dict]) -> None:
    found = {f.id: f for f in geometry.scatter_figures(trials, outcome.protocol, rows)}
    points = pd.DataFrame(data(found["scatter-rv_follows"], "points"))
    wide = trials[trials["phase"] == "5"].pivot(index="pair_id", columns="condition", values=["mode_llr", "rv_output"])
    wanted = wide["mode_llr"]["C"] - wide["mode_llr"]["N1"]
    assert points.set_index("pair")["y"].to_dict() == pytest.approx(wanted.to_dict(), rel=1e-4)
    change = np.log(wide["rv_output"]["C"]) - np.log(wide["rv_output"]["N1"])
    assert points.set_index("pair")["x"].to_dict() == pytest.approx(change.to_dict(), rel=1e-4)


def test_models_stand_side_by_side(outcome: Outcome, effects: list[dict], rows: list[dict]) -> None:
    models = {"1": "first-model", "7": "second-model"}
    (llr, *_) = across.across_figures(effects, models)
    drawn = data(llr, "estimates")
    assert {row["model"] for row in drawn if row["condition"] == "C"} == {"first-model", "second-model"}
    replications = across.replication_rows(rows, outcome.protocol, models)
    repeated = sum(h.of is not None for h in outcome.protocol.hypotheses)
    assert [[name for name, _ in r["pair"]] for r in replications] == [["first-model", "second-model"]] * repeated
    found = {(e["condition"], e["phase"]): e for e in effects if e["readout"] == "mode_llr"}
    for row in drawn:  # nats of one model are not those of another
        assert row["estimate"] == pytest.approx(found[row["condition"], row["phase"]]["dz"], rel=1e-3)
    assert across.across_figures(effects, {"1": "first-model"}) == []


def test_every_chart_holds_to_the_vega_lite_schema(
    outcome: Outcome, effects: list[dict], rows: list[dict], trials: pd.DataFrame
) -> None:
    drawn = [
        *forest.hypothesis_charts(rows, outcome.protocol).values(),
        *forest.effect_charts(effects, outcome.protocol, "1").values(),
    ]
    one = trials[trials["phase"] == "1"]
    _, means = tables.condition_means(one, "mode_llr", outcome.protocol)
    drawn.append(charts.conditions_chart(means, "mode_llr", "A"))
    for chart in drawn:
        assert "<svg" in vl_convert.vegalite_to_svg(charts.specification(chart) | {"width": 400})


def test_maps_dose_and_scatter_plots_hold_to_the_schema_too(
    outcome: Outcome, effects: list[dict], rows: list[dict], trials: pd.DataFrame
) -> None:
    figures = [
        *maps.map_figures(effects, outcome.protocol, {}),
        *dose.dose_figures(trials, outcome.protocol),
        *geometry.scatter_figures(trials, outcome.protocol, rows),
        *across.across_figures(effects, {"1": "a", "7": "b"}),
    ]
    for figure in figures:
        sets = {key: data(figure, found["name"]) for key, found in figure.spec["datasets"].items()}
        assert "<svg" in vl_convert.vegalite_to_svg({**figure.spec, "datasets": sets, "width": 400})


def test_the_first_columns_are_natural_runs_and_what_is_compared(outcome: Outcome) -> None:
    assert samples.side_by_side(outcome.protocol, "1") == ["A", "B", "C", "N1", "M1", "M1n"]
    assert samples.side_by_side(outcome.protocol, "3")[:2] == ["A", "B"]


def test_a_margin_is_drawn_on_the_side_the_test_asks_about(rows: list[dict]) -> None:
    known = {row["id"]: {**row, "margin_size": 0.3} for row in rows}
    assert forest.margin_ends(known["null_E1"]) == (-0.3, 0.3)
    assert forest.margin_ends(known["seed_memory"]) == (None, 0.3)
    assert forest.margin_ends(known["seed_necessity"]) == (-0.3, None)
    assert forest.margin_ends(known["rv_follows"]) == (-0.3, None)
    assert forest.margin_ends({**known["null_E1"], "margin_size": None}) == (None, None)
