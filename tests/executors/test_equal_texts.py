"""A trial says whether its cache is a natural run of one of the pair's texts, however the swap was spelled."""

from __future__ import annotations

from typing import Any

import pytest

from kvpatch.executors.batch import run_batch
from small import CONDITIONS

pytestmark = pytest.mark.model

S, F = {"from": "source"}, {"from": "foreign"}
TEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "C": (S | {"patch": {"align": "replace"}}, "source"),
    "C_by_end": (S | {"patch": {"align": "end"}}, "source"),
    "C_all_layers_named": (S | {"patch": {"align": "end", "layers": [0, 1, 2, 3]}}, "source"),
    "C_by_band": (S | {"patch": {"align": "end", "layers": {"band": [0, 1]}}}, "source"),
    "C_every_head": (S | {"patch": {"align": "end", "kv_heads": [0, 1]}}, "source"),
    "C_residual": (S | {"in_prefill": {"site": "residual"}}, "source"),
    "S0": ({"from": "target", "patch": {"align": "replace"}}, "target"),
    "N1": (F | {"patch": {"align": "replace"}}, "foreign"),
    "S1": ({"text_of": "source"}, "source"),
    "nothing_put_in": (S | {"patch": {"slots": "body", "strength": 0}}, "target"),
}
NO_TEXT: dict[str, dict[str, Any]] = {
    "values_alone": S | {"patch": {"align": "end", "parts": "v"}},
    "keys_alone": S | {"patch": {"align": "end", "parts": "k"}},
    "one_layer_less": S | {"patch": {"align": "end", "layers": [0, 1, 3]}},
    "one_head": S | {"patch": {"align": "end", "kv_heads": [0]}},
    "body": S | {"patch": {"slots": {"of": "body", "fraction": [0, 0.5]}}},
    "almost": S | {"patch": {"align": "end", "strength": 0.9}},
    "shuffled": S | {"patch": {"align": "replace", "donor": "shuffle_values"}},
    "random": S | {"patch": {"align": "replace", "donor": "gaussian_isotropic"}},
    "joined": S | {"joined": {"keep": "receiver"}},
    "residual_of_one_layer": S | {"in_prefill": {"site": "residual", "layers": [2]}},
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def rows(request: pytest.FixtureRequest, tiny_dirs: Any, tmp_path_factory: Any) -> list[dict[str, Any]]:
    import kvpatch as kv
    from kvpatch.planned import plan_for
    from kvpatch.prompts.bank import load_bank
    from kvpatch.protocols.load import load_protocol
    from small import write_protocol

    conditions = {name: CONDITIONS[name] for name in ("A", "B")}
    conditions |= {name: {"about": name, **way} for name, (way, _) in TEXTS.items()}
    conditions |= {name: {"about": name, **way} for name, way in NO_TEXT.items()}
    phases = {"1": {"question": "?", "n": 5, "conditions": list(conditions)}}
    folder = tmp_path_factory.mktemp("equal")
    protocol = load_protocol(str(write_protocol(folder, conditions=conditions, phases=phases, hypotheses=[])))
    model = kv.load(tiny_dirs("llama"), device="cpu", dtype=request.param)
    plan, _ = plan_for({None: model}, protocol, load_bank(protocol.bank), seed=0, n=None, phases=None)
    batch = next(batch for batch in plan.batches if batch.phase == "1")
    return run_batch(model, batch)


def test_natural_runs_and_full_swaps_equal_the_text_that_they_are(rows: list[dict[str, Any]]) -> None:
    wanted = {"A": "target", "B": "source"} | {name: role for name, (_, role) in TEXTS.items()}
    # A swap slot by slot is a whole one where both prompts have as many slots.
    length = {(r["pair_id"], r["condition"]): len(r["cache_token_ids"]) for r in rows}
    alike = [r for r in rows if length[r["pair_id"], "A"] == length[r["pair_id"], "B"] and r["condition"] in wanted]
    assert {(r["condition"], r["equals_text"]) for r in alike} == set(wanted.items())


def test_what_no_text_gives_equals_none(rows: list[dict[str, Any]]) -> None:
    found = {(r["condition"], r["equals_text"]) for r in rows if r["condition"] in NO_TEXT}
    assert found == {(name, None) for name in NO_TEXT}
