"""One batch on the tiny Llama: what must hold between its rows, whatever the weights."""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from typing import Any

import pytest
import torch

from kvpatch.executors import batch as batch_room
from kvpatch.executors import conditions as condition_room
from kvpatch.executors.batch import run_batch
from kvpatch.executors.optional_columns import OPTIONAL_COLUMNS
from kvpatch.interventions import directions
from kvpatch.planning.plan import Batch
from kvpatch.protocols.schema import AttentionSettings
from kvpatch.readouts.behavior import Lexicon, recursive_score, recursive_score_masked
from kvpatch.readouts.fluency import CoherenceLimits, is_coherent, repetition
from kvpatch.store.columns import TRIAL_COLUMNS, TRIAL_SCHEMA
from small import with_patch

pytestmark = pytest.mark.model


@pytest.fixture
def by_condition(rows) -> dict[str, dict[str, dict[str, Any]]]:
    """condition -> pair -> row"""
    out: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        out[row["condition"]][row["pair_id"]] = row
    return out


def comparable(row: dict[str, Any]) -> str:
    """A row in a form that compares equal also where a value is NaN."""
    return repr(row)


def test_every_column_is_filled(rows, batch):
    assert [row["trial_id"] for row in rows] == [trial.trial_id for trial in batch.trials]
    # The bank states no persons; a cache need not equal a text; nothing was fitted; the others a phase has to ask for.
    may_be_null = {"error", "patch", "register_llr", "equals_text", "mode_llr_damage", *OPTIONAL_COLUMNS}
    for row in rows:
        assert row.keys() == TRIAL_COLUMNS.keys()
        assert {k for k, v in row.items() if v is None} <= may_be_null
        assert row["error"] is None
        assert (row["patch"] is None) is (row["condition"] in ("A", "B", "S1"))


@pytest.mark.parametrize("asks", [{}, {"geometry": True, "watched": AttentionSettings()}])
def test_a_batch_leaves_no_tensor_to_the_garbage_collector(model, batch, asks):
    """It counts objects, not bytes, and a GPU is full before it looks."""
    asked = batch.model_copy(update=asks)
    run_batch(model, asked)  # what is kept with the model is made now

    def alive() -> set[int]:
        return {id(x) for x in gc.get_objects() if type(x) is torch.Tensor}

    gc.collect()
    gc.disable()
    try:
        before = alive()
        run_batch(model, asked)
        left = alive() - before
    finally:
        gc.enable()
    assert len(left) == 0


def test_every_value_fits_the_schema(rows):
    import pyarrow as pa

    table = pa.Table.from_pylist(rows, schema=TRIAL_SCHEMA)
    assert table.num_rows == len(rows)


def test_every_readout_is_a_finite_number(rows):
    numbers = [k for k, (kind, _) in TRIAL_COLUMNS.items() if str(kind) == "double"]
    too_short = {"rv_own", "overlap_4gram"}  # NaN where the output has too few tokens or words
    no_number = {*too_short, "register_llr", *OPTIONAL_COLUMNS}  # the bank states no persons
    for row in rows:
        bad = {k: row[k] for k in numbers if k not in no_number and not math.isfinite(row[k])}
        if row["condition"] == "N2":
            bad.pop("rv_prompt", None)  # the empty scaffold may be shorter than the window
        assert bad == {}, row["condition"]


def test_output_columns_agree_with_each_other(rows):
    for row in rows:
        assert row["n_tokens"] == len(row["output_token_ids"]) == len(row["output_logprobs"])
        assert max(row["output_logprobs"]) <= 0
        assert row["stopped"] == "eos" or row["n_tokens"] == 10
        assert row["repetition"] == row["repetition_4"] == repetition(row["output_token_ids"], 4)
        assert row["nll_own"] == pytest.approx(-sum(row["output_logprobs"]) / row["n_tokens"])


def test_self_swap_gives_the_target_s_own_tokens(by_condition):
    for pair, row in by_condition["S0"].items():
        assert row["output_token_ids"] == by_condition["A"][pair]["output_token_ids"]
        assert row["cache_token_ids"] == by_condition["A"][pair]["cache_token_ids"]


def test_full_swap_gives_the_tokens_of_the_text_it_equals(by_condition):
    for pair, row in by_condition["S1"].items():
        assert row["output_token_ids"] == by_condition["C"][pair]["output_token_ids"]
        assert row["cache_token_ids"] == by_condition["C"][pair]["cache_token_ids"]
        for readout in ("mode_llr", "rv_output", "nll_target", "js_pull"):
            assert row[readout] == pytest.approx(by_condition["C"][pair][readout], abs=1e-4)


def test_jointly_shuffled_source_gives_the_source_s_tokens(by_condition):
    for pair, row in by_condition["EJ"].items():
        assert row["output_token_ids"] == by_condition["C"][pair]["output_token_ids"]


def test_controls_give_other_tokens(by_condition):
    for control in ("E1", "F2", "N1", "N2", "N3", "D"):
        differ = [
            row["output_token_ids"] != by_condition["C"][pair]["output_token_ids"]
            for pair, row in by_condition[control].items()
        ]
        assert sum(differ) >= len(differ) - 1, control


def test_swap_names_what_its_cache_stands_for(by_condition):
    for pair, row in by_condition["C"].items():
        source, target = by_condition["B"][pair], by_condition["A"][pair]
        assert row["source_token_ids"] == source["source_token_ids"]
        assert row["target_token_ids"] == target["target_token_ids"]
        assert row["cache_token_ids"] == [*source["source_token_ids"][:-1], target["target_token_ids"][-1]]


def test_batch_gives_the_same_rows_after_a_trip_through_json(model, batch, rows):
    sent = Batch.model_validate_json(batch.model_dump_json(by_alias=True))
    again = run_batch(model, sent, limits=CoherenceLimits(excess_context=9.0, repetition_4=0.5))
    assert [comparable(row) for row in again] == [comparable(row) for row in rows]


def test_conditions_of_a_pair_share_their_seed_and_their_noise(model, small_plan, rows):
    seeds = defaultdict(set)
    for row in rows:
        seeds[row["pair_id"]].add(row["seed"])
    assert all(len(shared) == 1 for shared in seeds.values())
    # A second copy of a condition under another name draws the same noise, so it writes the same text.
    changes = with_patch({"align": "replace"})
    changes["conditions"]["Y"] = changes["conditions"]["X"]
    changes["phases"]["1"]["conditions"].append("Y")
    twins = run_batch(model, small_plan(**changes).batches[-1])
    texts = {(row["condition"], row["pair_id"]): row["output_token_ids"] for row in twins}
    assert all(texts["X", pair] == texts["Y", pair] for condition, pair in texts if condition == "X")


def test_checksums_are_unchanged_and_tell_caches_apart(rows, by_condition):
    for row in rows:
        assert row["cache_checksum_before"] == row["cache_checksum_after"]
    for pair, row in by_condition["A"].items():
        assert row["cache_checksum_before"] == by_condition["S0"][pair]["cache_checksum_before"]
        assert row["cache_checksum_before"] != by_condition["C"][pair]["cache_checksum_before"]


def test_cache_that_changes_while_the_trial_runs_is_an_error(model, small_plan, monkeypatch):
    def spoiling(backbone, cache, **kwargs):
        cache.keys[0].add_(1)
        return decode(backbone, cache, **kwargs)

    decode = batch_room.decode
    monkeypatch.setattr(batch_room, "decode", spoiling)
    spoilt = run_batch(model, small_plan(**with_patch({"align": "replace"})).batches[-1])
    assert {row["error"] for row in spoilt} == {"the cache changed while the trial ran"}


def test_nll_target_of_the_natural_target_is_its_own(by_condition):
    for row in by_condition["A"].values():
        assert row["nll_target"] == pytest.approx(row["nll_own"], abs=1e-4)


def test_nll_target_of_patched_runs_is_another_number(by_condition):
    assert any(abs(row["nll_target"] - row["nll_own"]) > 0.1 for row in by_condition["C"].values())


def test_js_pull_is_negative_at_the_target_and_positive_at_the_source(by_condition):
    for pair, row in by_condition["A"].items():
        assert row["js_pull"] <= 0
        assert by_condition["B"][pair]["js_pull"] >= 0
        assert row["js_pull"] == pytest.approx(-by_condition["B"][pair]["js_pull"], abs=1e-5)


def test_rv_of_the_prompt_after_a_full_swap_is_the_source_s_by_construction(by_condition):
    for pair, row in by_condition["C"].items():
        assert row["rv_prompt"] == pytest.approx(by_condition["B"][pair]["rv_prompt"], rel=1e-6)
        assert row["rv_prompt"] != pytest.approx(by_condition["A"][pair]["rv_prompt"], rel=1e-6)


def test_rv_of_forced_output_differs_between_target_and_source_of_one_pair(by_condition):
    """It is read off the same words, so only the caches can tell them apart."""
    for pair, row in by_condition["A"].items():
        assert row["rv_output"] != by_condition["B"][pair]["rv_output"]
        assert row["rv_output"] == pytest.approx(by_condition["S0"][pair]["rv_output"], rel=1e-5)


def test_scores_depend_on_the_output_alone(model, batch, monkeypatch):
    """With one text for all, every condition of every pair has one score; masking sees the pair's prompts alone."""
    text = "I notice my own attention: I observe how the arising notes are aware of themselves."
    monkeypatch.setattr(type(model), "texts", lambda self, token_ids: [text] * len(token_ids))
    lexicon = Lexicon.load("recursion")
    spoken = run_batch(model, batch)
    assert {row["recursive_score"] for row in spoken} == {recursive_score(text, lexicon)}
    assert recursive_score(text, lexicon) > 0
    masked = defaultdict(set)
    for row in spoken:
        masked[row["pair_id"]].add(row["recursive_score_masked"])
    pairs = {pair.pair_id: pair for pair in batch.pairs}
    for pair_id, scores in masked.items():
        texts = pairs[pair_id].texts
        assert scores == {recursive_score_masked(text, f"{texts['source']}\n{texts['foreign']}", lexicon)}


def test_coherence_is_left_open_without_limits_and_decided_with_them(model, batch, rows):
    assert {row["coherent"] for row in run_batch(model, batch)} == {None}
    limits = CoherenceLimits(excess_context=9.0, repetition_4=0.5)
    for row in rows:
        assert row["coherent"] is is_coherent(row["excess_context"], row["repetition_4"], limits)


@pytest.mark.parametrize("patch", [{"slots": [9999], "align": "end"}, {"layers": [99]}, {"kv_heads": [7]}])
def test_splice_that_fails_gives_error_rows_and_leaves_the_others_alone(model, small_plan, patch):
    good = small_plan(**with_patch({"align": "start"})).batches[-1]
    bad_patch = good.conditions["X"].patch.__class__.model_validate(patch)
    conditions = good.conditions | {"X": good.conditions["X"].model_copy(update={"patch": bad_patch})}
    expected = {row["trial_id"]: row for row in run_batch(model, good)}
    for row in run_batch(model, good.model_copy(update={"conditions": conditions})):
        if row["condition"] == "X":
            assert "does not exist" in row["error"]
        else:
            # Rows of X have another length now, so sums run in another order.
            other = expected[row["trial_id"]]
            assert row["error"] is None
            assert row["output_token_ids"] == other["output_token_ids"]
            assert row["mode_llr"] == pytest.approx(other["mode_llr"], abs=1e-4)


def test_patched_cache_is_what_splicing_by_hand_gives(model, batch, by_condition):
    from kvpatch import Patch

    pair = batch.pairs[0]
    source, target = model.prefill([pair.texts["source"]]), model.prefill([pair.texts["target"]])
    mixed = Patch(layers=[1, 2], slots="body", parts="v").apply(source, target)
    row = by_condition["P"][pair.pair_id]
    own = by_condition["A"][pair.pair_id]
    out = model.generate(mixed, max_new_tokens=10, temperature=0.7, seeds=[row["seed"]])
    assert [t for t in out.token_ids[0].tolist() if t >= 0] == row["output_token_ids"]
    assert row["cache_token_ids"] == own["cache_token_ids"]
    assert row["cache_checksum_before"] != own["cache_checksum_before"]


def test_each_distinct_prompt_is_prefilled_once(model, batch, monkeypatch):
    seen: list[int] = []

    def counting(backbone, prompts):
        seen.append(len(prompts))
        assert len(set(prompts)) == len(prompts)
        return prefill(backbone, prompts)

    prefill = condition_room.prefill
    for room in (condition_room, directions):
        monkeypatch.setattr(room, "prefill", counting)
    directions.reference_caches.cache_clear()
    run_batch(model, batch)
    distinct = {text for pair in batch.pairs for role, text in pair.texts.items()}
    with_swapped = len(distinct) + sum("S1" in batch.conditions for _ in batch.pairs)
    assert sorted(seen)[:-1] == [len(batch.reference_texts)]
    assert max(seen) <= with_swapped


def test_randomness_outside_the_trial_changes_nothing(model, batch, rows):
    torch.manual_seed(1234)
    again = run_batch(model, batch, limits=CoherenceLimits(excess_context=9.0, repetition_4=0.5))
    assert [row["output_token_ids"] for row in again] == [row["output_token_ids"] for row in rows]
