"""Conditions that intervene, in one batch on the tiny Llama; and what does not fit, refused at planning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpatch.engine import residual
from kvpatch.engine.attention import AttentionRequest
from kvpatch.engine.decode import decode
from kvpatch.engine.prefill import prefill, prefill_pass
from kvpatch.errors import CacheError, KvpatchError, ProtocolError
from kvpatch.executors.batch import measure, run_batch
from kvpatch.executors.conditions import build_all, prefill_all
from kvpatch.interventions import in_prefill as activations
from kvpatch.interventions.directions import mean_directions
from kvpatch.interventions.joined import join_prompts, without_giver
from kvpatch.interventions.steering import run_value_steering
from kvpatch.models.hf import LayerEdit
from kvpatch.planned import plan_for
from kvpatch.planning import plan as planner
from kvpatch.planning.plan import Batch
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.load import load_protocol
from kvpatch.protocols.schema import AttentionSettings
from kvpatch.readouts.geometry import participation_ratio
from small import CONDITIONS, bank_entries, write_bank, write_protocol
from tiny import CONTEXT, LAYERS, prompt_of

pytestmark = pytest.mark.model

SOURCE = {"from": "source"}
WAYS: dict[str, dict[str, Any]] = {
    "IV": SOURCE | {"in_prefill": {"site": "values", "layers": {"depth": 0.5}}},
    "IVN": {"from": "target", "into": "source", "in_prefill": {"site": "values", "layers": {"depth": 0.5}}},
    "IQ": SOURCE | {"in_prefill": {"site": "queries_keys_values", "layers": [1]}},
    "IR": SOURCE | {"in_prefill": {"site": "residual"}},
    "IRL": SOURCE | {"in_prefill": {"site": "residual", "layers": [2], "slots": "last"}},
    "ST0": {"steer_values": {"layers": [1], "alpha": 0}},
    "ST": {"steer_values": {"layers": [1], "alpha": 40}},
    "M1": SOURCE | {"joined": {"keep": "receiver"}},
    "M1n": {"from": "foreign", "joined": {"keep": "receiver"}},
    "T": SOURCE | {"joined": {"keep": "all"}},
    "M20": {"steer_cache": {"strength": 0}},
    "M2": {"steer_cache": {"strength": 4}},
    "M2n": {"steer_cache": {"strength": 4, "random_directions": 20}},
    "N4": {"from": "pseudo_recursive", "patch": {"align": "replace"}},
    "G1": SOURCE | {"reshape": {}},
    "G1s": SOURCE | {"reshape": {"window": 6, "ratio": "own"}},
    "G1t": SOURCE | {"reshape": {"window": 6, "by": "rotation"}},
    "G2": {"from": "target", "into": "source", "reshape": {"window": 6}},
}
DECODING = {"steer_values": {"layers": [1], "alpha": 40, "while_decoding": True}}
FIRED = {"IV": 1, "IVN": 1, "IQ": 3, "IR": LAYERS, "IRL": 1, "ST0": 1, "ST": 1}
PLAIN = ("A", "B", "C", "N1")
WITH_N4 = 2


def changes_for(ways: Mapping[str, Mapping[str, Any]], n: int = 4) -> dict[str, Any]:
    """The small protocol with these conditions beside natural and spliced ones."""
    conditions = {name: CONDITIONS[name] for name in PLAIN}
    conditions |= {name: {"about": name, **way} for name, way in ways.items()}
    return {
        "conditions": conditions,
        "phases": {"1": {"question": "?", "n": n, "conditions": list(conditions)}},
        "pairing": {"max_length_difference": 0.5, "also": ["pseudo_recursive"] if "N4" in ways else []},
        "hypotheses": [],
    }


def planned_batch(model, folder: Path, ways: Mapping[str, Mapping[str, Any]]) -> Batch:
    like = bank_entries()[1]
    others = [like | {"id": f"o{i}", "group": "pseudo_recursive"} for i in range(WITH_N4)]
    bank = write_bank(folder / "bank", bank_entries() + others)
    protocol = load_protocol(str(write_protocol(folder, bank=bank, **changes_for(ways))))
    plan, _ = plan_for({None: model}, protocol, load_bank(protocol.bank), seed=0, n=None, phases=None)
    assert not plan.skipped
    return next(b for b in plan.batches if b.split == "test")


@pytest.fixture(scope="module")
def batch(model, tmp_path_factory) -> Batch:
    return planned_batch(model, tmp_path_factory.mktemp("ways"), WAYS | {"STD": DECODING})


@pytest.fixture(scope="module")
def rows(model, batch) -> list[dict[str, Any]]:
    return run_batch(model, batch)


@pytest.fixture(scope="module")
def by_condition(rows) -> dict[str, dict[str, dict[str, Any]]]:
    return indexed(rows)


def indexed(rows) -> dict[str, dict[str, dict[str, Any]]]:
    """condition -> pair -> row"""
    out: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        out[row["condition"]][row["pair_id"]] = row
    return out


# --- counts ---------------------------------------------------------------------------------------------------------


def test_no_trial_fails(rows, batch):
    assert [row["error"] for row in rows] == [None] * len(batch.trials)


def test_every_planned_change_is_made(rows):
    steps = max(row["n_tokens"] for row in rows)
    for row in rows:
        expected = 1 + steps if row["condition"] == "STD" else FIRED.get(row["condition"], 0)
        assert (row["changes_planned"], row["changes_fired"]) == (expected, expected), row["condition"]


@pytest.mark.parametrize(
    ("lost", "hit"), [("value", {"IV", "IVN", "IQ", "ST0", "ST", "STD"}), ("query", {"IQ"}), ("key", {"IQ"})]
)
def test_change_that_was_not_made_is_an_error_of_its_condition_alone(model, batch, monkeypatch, lost, hit):
    apply = LayerEdit.apply
    monkeypatch.setattr(LayerEdit, "apply", lambda self, part, x: x if part == lost else apply(self, part, x))
    found = indexed(run_batch(model, batch))
    for name, own in found.items():
        for row in own.values():
            made, planned = row["changes_fired"], row["changes_planned"]
            if name not in hit:
                assert row["error"] is None, name
            elif lost == "query":
                assert row["error"] == "the source's activations at layer 1 were not seen"
            else:
                assert made == (2 if name == "IQ" else 0)
                assert row["error"] == f"{made} of {planned} planned changes were made"


@pytest.mark.parametrize(
    ("lost", "error"),
    [
        ("recorded_residual", "the source's activations at layer 0 were not seen"),
        ("replaced_residual", f"{LAYERS - 1} of {LAYERS} planned changes were made"),
    ],
)
def test_residual_hook_that_did_not_fire_is_an_error(model, batch, monkeypatch, lost, error):
    """The hook of the first layer is lost on its way."""
    hooked, own = residual._hooked, getattr(activations, lost)

    @contextmanager
    def losing(*args):
        with monkeypatch.context() as patched:
            patched.setattr(
                residual,
                "_hooked",
                lambda backbone, layers, *rest: hooked(backbone, [i for i in layers if i], *rest),
            )
            opened = own(*args)
            with opened as firings:
                yield firings

    monkeypatch.setattr(activations, lost, losing)
    found = indexed(run_batch(model, batch))
    assert {row["error"] for row in found["IR"].values()} == {error}
    assert {row["error"] for name in ("IRL", "IV", "C") for row in found[name].values()} == {None}


def test_condition_that_can_t_be_built_gives_error_rows_and_leaves_the_others_alone(
    model, batch, rows, by_condition, monkeypatch
):
    def refuse(*args):
        raise KvpatchError("it can't be done")

    monkeypatch.setattr(activations, "run_in_prefill", refuse)
    for row in run_batch(model, batch):
        if "in_prefill" in WAYS.get(row["condition"], {}):
            assert row["error"] == "it can't be done"
        else:
            assert row["error"] is None
            own = by_condition[row["condition"]][row["pair_id"]]
            assert row["output_token_ids"] == own["output_token_ids"]


# --- steering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ST0", "M20"])
def test_strength_0_writes_the_natural_run_s_text(by_condition, name):
    for pair, row in by_condition[name].items():
        own = by_condition["A"][pair]
        assert row["output_token_ids"] == own["output_token_ids"]
        for readout in ("mode_llr", "rv_output", "nll_target"):
            assert row[readout] == pytest.approx(own[readout], abs=1e-4)


def test_direction_of_strength_0_leaves_the_natural_cache_bit_for_bit(by_condition):
    for pair, row in by_condition["M20"].items():
        assert row["cache_checksum_before"] == by_condition["A"][pair]["cache_checksum_before"]


def test_steering_with_alpha_0_is_the_natural_run_bit_for_bit(model, batch):
    spec = batch.conditions["ST0"].steer_values
    prompts = [model.encode(pair.texts["target"]) for pair in batch.pairs]
    natural = prefill_pass(model.backbone, prompts)
    _, values = mean_directions(model, tuple(batch.reference_texts), tuple(batch.reference_targets))
    done = run_value_steering(model.backbone, spec, values, prompts, natural)
    assert done.cache.checksums() == natural.checksums()


def test_steering_while_decoding_starts_from_the_cache_steered_in_prefill(by_condition):
    for pair, row in by_condition["STD"].items():
        assert row["cache_checksum_before"] == by_condition["ST"][pair]["cache_checksum_before"]
        assert row["output_logprobs"] != by_condition["ST"][pair]["output_logprobs"]
        assert row["mode_llr"] != pytest.approx(by_condition["ST"][pair]["mode_llr"], abs=1e-4)
        assert row["rv_output"] != pytest.approx(by_condition["ST"][pair]["rv_output"], rel=1e-4)


def test_steering_while_decoding_steers_the_rows_of_its_condition_alone(model, rows, by_condition, tmp_path):
    without = indexed(run_batch(model, planned_batch(model, tmp_path, WAYS)))
    assert without.keys() == by_condition.keys() - {"STD"}
    for name, own in without.items():
        for pair, row in own.items():
            other = by_condition[name][pair]
            assert row["output_token_ids"] == other["output_token_ids"], name
            assert row["text"] == other["text"]
            for readout in ("mode_llr", "content_llr", "js_pull", "nll_own", "nll_target"):
                assert row[readout] == pytest.approx(other[readout], abs=1e-4)
            assert row["rv_output"] == pytest.approx(other["rv_output"], rel=1e-3)


def test_steered_text_and_readouts_equal_an_edit_at_every_step_by_hand(model, batch, by_condition):
    """One row at a time: the direction is added to the values of the pending token and of all that follow."""
    built = build_all(model, batch, prefill_all(model, batch))
    _, values = mean_directions(model, tuple(batch.reference_texts), tuple(batch.reference_targets))
    step = 40 * values[1][None, :, None]
    for index, trial in enumerate(batch.trials):
        if trial.condition != "STD":
            continue
        row = by_condition["STD"][batch.pairs[trial.pair].pair_id]
        out = decode(
            model.backbone,
            built.cache[index],
            max_new_tokens=10,
            temperature=0.7,
            seeds=[trial.seed],
            end_tokens=model.end_tokens,
            edits={1: LayerEdit(value=lambda v: v + step)},
        )
        assert out.token_ids[0, : out.lengths[0]].tolist() == row["output_token_ids"]
        assert row["nll_own"] == pytest.approx(-float(out.logprobs.nanmean()), abs=1e-4)


def test_a_steered_trial_is_watched_as_it_wrote(model, batch):
    """Its heads are read after it is written, steered as it was."""
    watched = batch.model_copy(update={"watched": AttentionSettings()})
    built = build_all(model, batch, prefill_all(model, batch))
    _, values = mean_directions(model, tuple(batch.reference_texts), tuple(batch.reference_targets))
    step = 40 * values[1][None, :, None]
    for index, found in enumerate(measure(model, watched)):
        trial = batch.trials[index]
        if trial.condition != "STD":
            continue
        by_hand = decode(
            model.backbone,
            built.cache[index],
            max_new_tokens=10,
            temperature=0.7,
            seeds=[trial.seed],
            end_tokens=model.end_tokens,
            edits={1: LayerEdit(value=lambda v: v + step)},
            to_capture=AttentionRequest(),
        ).attention
        assert by_hand is not None
        assert torch.allclose(found.attention["own"].values, by_hand.values, atol=1e-5, equal_nan=True)


def test_two_steered_conditions_do_not_mix(model, batch, by_condition, tmp_path):
    """Another condition steers another layer while decoding; each is as it is alone."""
    other = {"steer_values": {"layers": [3], "alpha": -20, "while_decoding": True}}
    both = indexed(run_batch(model, planned_batch(model, tmp_path, WAYS | {"STD": DECODING, "STE": other})))
    for pair, row in both["STD"].items():
        assert row["error"] is None
        assert row["output_token_ids"] == by_condition["STD"][pair]["output_token_ids"]
        assert row["mode_llr"] == pytest.approx(by_condition["STD"][pair]["mode_llr"], abs=1e-4)
        assert both["STE"][pair]["error"] is None
        assert both["STE"][pair]["mode_llr"] != pytest.approx(row["mode_llr"], abs=1e-4)


# --- directions -----------------------------------------------------------------------------------------------------


def steps_of(model, batch: Batch, name: str) -> dict[str, torch.Tensor]:
    """What a condition adds to the last layer's values at the last body slot, by pair."""
    built = build_all(model, batch, prefill_all(model, batch))
    at = {(t.condition, batch.pairs[t.pair].pair_id): i for i, t in enumerate(batch.trials)}
    out = {}
    for (condition, pair), index in at.items():
        if condition == name:
            slot = int((built.cache.segments[index] == 2).nonzero()[-1]) - built.cache.slots
            out[pair] = built.cache.values[-1][index, :, slot] - built.cache.values[-1][at["A", pair], :, slot]
    return out


def test_known_direction_is_the_same_for_every_pair_and_random_ones_are_the_pair_s_own(model, batch):
    known, random = steps_of(model, batch, "M2"), steps_of(model, batch, "M2n")
    first = next(iter(known.values()))
    for pair, step in known.items():
        torch.testing.assert_close(step, first, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(random[pair].norm(dim=-1), step.norm(dim=-1), atol=1e-4, rtol=1e-4)
    assert len({tuple(step.flatten().tolist()) for step in random.values()}) == len(random) == 4


def test_random_direction_of_a_pair_is_the_same_whatever_the_batches(model, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "ROWS_PER_BATCH", 1)
    small = write_protocol(tmp_path, **changes_for({name: WAYS[name] for name in ("M2", "M2n")}))
    protocol = load_protocol(str(small))
    plan, _ = plan_for({None: model}, protocol, load_bank(protocol.bank), seed=0, n=None, phases=None)
    batches = [b for b in plan.batches if b.split == "test"]
    assert [len(b.pairs) for b in batches] == [1, 1, 1, 1]
    apart = {pair: step for one in batches for pair, step in steps_of(model, one, "M2n").items()}
    together = steps_of(model, batch, "M2n")
    assert apart.keys() == together.keys()
    for pair, step in apart.items():
        torch.testing.assert_close(step, together[pair], atol=1e-4, rtol=1e-4)


# --- joined prompts, and swaps that lack a prompt -------------------------------------------------------------------


def test_m1_stands_for_the_target_s_tokens_and_t_for_both(model, batch, by_condition):
    pairs = {pair.pair_id: pair for pair in batch.pairs}
    for pair, own in by_condition["A"].items():
        for name in ("M1", "M1n"):
            assert by_condition[name][pair]["cache_token_ids"] == own["cache_token_ids"]
            assert by_condition[name][pair]["cache_checksum_before"] != own["cache_checksum_before"]
        assert by_condition["M1"][pair]["cache_checksum_before"] != by_condition["M1n"][pair]["cache_checksum_before"]
        giver, receiver = (model.encode(pairs[pair].texts[role]) for role in ("source", "target"))
        joined = join_prompts(giver, receiver, model.continuation_ids("\n\n"), "\n\n")
        assert by_condition["T"][pair]["cache_token_ids"] == list(joined.token_ids)


@pytest.mark.parametrize(("name", "role"), [("M1", "source"), ("M1n", "foreign")])
def test_m1_writes_what_the_cut_cache_by_hand_writes(model, batch, by_condition, name, role):
    pair = batch.pairs[0]
    giver, receiver = model.encode(pair.texts[role]), model.encode(pair.texts["target"])
    joined = join_prompts(giver, receiver, model.continuation_ids("\n\n"), "\n\n")
    cut = without_giver(prefill(model.backbone, [joined]), model.prefill([receiver]))
    row = by_condition[name][pair.pair_id]
    out = model.generate(cut, max_new_tokens=10, temperature=0.7, seeds=[row["seed"]])
    assert [t for t in out.token_ids[0].tolist() if t >= 0] == row["output_token_ids"]


def test_t_writes_what_the_joined_prompt_writes(model, by_condition):
    for row in by_condition["T"].values():
        cache = model.prefill([prompt_of(row["cache_token_ids"])])
        out = model.generate(cache, max_new_tokens=10, temperature=0.7, seeds=[row["seed"]])
        assert [t for t in out.token_ids[0].tolist() if t >= 0] == row["output_token_ids"]


def test_pairs_without_the_prompt_are_planned_and_run_without_the_condition(by_condition, batch):
    assert len(by_condition["N4"]) == WITH_N4 < len(batch.pairs) == len(by_condition["A"])


def test_values_are_swapped_both_ways(by_condition):
    """Down from the source, too: the receiver's tokens stay and its cache is another."""
    for pair, row in by_condition["IVN"].items():
        assert row["cache_token_ids"] == by_condition["B"][pair]["cache_token_ids"]
        assert row["cache_checksum_before"] != by_condition["B"][pair]["cache_checksum_before"]
        assert row["source_token_ids"] == by_condition["A"][pair]["target_token_ids"]
        assert row["target_token_ids"] == by_condition["B"][pair]["target_token_ids"]


# --- R_V set by hand ------------------------------------------------------------------------------------------------


def test_ratio_set_by_hand_moves_r_v_of_the_prompt_and_its_nulls_do_not(model, batch, by_condition):
    pairs = {pair.pair_id: pair for pair in batch.pairs}
    for pair, row in by_condition["G1"].items():
        own, texts = by_condition["A"][pair], pairs[pair].texts
        assert row["cache_token_ids"] == own["cache_token_ids"]
        assert row["cache_checksum_before"] != own["cache_checksum_before"]
        late = {
            role: participation_ratio(model.prefill([texts[role]]).values[3][:, :, -6:].transpose(1, 2).flatten(2))
            for role in ("target", "source")
        }
        wanted = own["rv_prompt"] * float(late["source"] / late["target"])
        assert row["rv_prompt"] == pytest.approx(wanted, abs=1e-4)
        assert abs(row["rv_prompt"] - own["rv_prompt"]) > 1e-3
        assert by_condition["G1t"][pair]["rv_prompt"] == pytest.approx(own["rv_prompt"], rel=1e-4)
        assert by_condition["G1t"][pair]["mode_llr"] != pytest.approx(own["mode_llr"], abs=1e-4)
        other = by_condition["G2"][pair]
        assert other["cache_token_ids"] == by_condition["B"][pair]["cache_token_ids"]
        wanted = by_condition["B"][pair]["rv_prompt"] * float(late["target"] / late["source"])
        assert other["rv_prompt"] == pytest.approx(wanted, abs=1e-4)


def test_own_ratio_set_by_hand_is_the_natural_run(by_condition):
    for pair, row in by_condition["G1s"].items():
        own = by_condition["A"][pair]
        assert row["output_token_ids"] == own["output_token_ids"]
        for readout in ("mode_llr", "rv_output", "nll_target", "rv_prompt"):
            assert row[readout] == pytest.approx(own[readout], abs=1e-4)


# --- planning -------------------------------------------------------------------------------------------------------

MISFITS = [
    (SOURCE | {"in_prefill": {"site": "values", "layers": [4]}}, "layer 4 does not exist: there are 4"),
    (SOURCE | {"in_prefill": {"site": "residual", "layers": [-5]}}, "layer -5 does not exist"),
    (
        SOURCE | {"in_prefill": {"site": "queries_keys_values", "layers": {"band": [0.5, 0.51]}}},
        r"band \[0.5, 0.51\] holds no layer",
    ),
    (SOURCE | {"in_prefill": {"site": "values", "slots": [0, 200]}}, "slot 200 does not exist"),
    ({"steer_values": {"layers": [9], "alpha": 1}}, "layer 9 does not exist"),
    ({"steer_values": {"layers": [1], "alpha": 1, "slots": [-200]}}, "slot -200 does not exist"),
    (SOURCE | {"reshape": {"layers": [6]}}, "layer 6 does not exist"),
    (SOURCE | {"reshape": {"window": 200}}, r"a prompt of \d+ cached slots is shorter than the window of 200"),
    ({"steer_cache": {"strength": 1, "layers": [7]}}, "layer 7 does not exist"),
    ({"steer_cache": {"strength": 1, "slots": [200]}}, "slot 200 does not exist"),
    (
        {"steer_cache": {"strength": 1, "slots": {"of": "sinks", "matched_to": {"of": "sinks"}}}},
        "matched_to wants 4 other slots",
    ),
]


@pytest.mark.parametrize(("way", "words"), MISFITS)
def test_intervention_that_does_not_fit_is_refused_at_planning(small_plan, way, words):
    with pytest.raises(ProtocolError, match=f"condition X of phase 1: {words}"):
        small_plan(**changes_for({"X": way}))


def test_slots_are_those_of_the_receiver(model, small_plan, tmp_path):
    """An index that every source has and no target: it may be used in sources alone."""
    entries = [e | {"text": e["text"] + " Go on."} if e.get("group") == "recursive" else e for e in bank_entries()]
    bank = write_bank(tmp_path / "longer", entries)
    lengths: dict[str, list[int]] = defaultdict(list)
    for entry in entries:
        lengths[entry.get("group", "")].append(len(model.encode(entry["text"]).token_ids) - 1)
    slot = max(lengths["plain"])
    assert slot < min(lengths["recursive"])
    values = {"in_prefill": {"site": "values", "slots": [slot]}}
    small_plan(bank=bank, **changes_for({"X": {"from": "target", "into": "source"} | values}))
    with pytest.raises(ProtocolError, match=f"slot {slot} does not exist"):
        small_plan(bank=bank, **changes_for({"X": SOURCE | values}))


@pytest.mark.parametrize("keep", ["all", "receiver"])
def test_joined_prompt_longer_than_the_context_is_refused_at_planning(small_plan, keep):
    way = SOURCE | {"joined": {"keep": keep, "separator": "#" * CONTEXT}}
    with pytest.raises(ProtocolError, match=r"condition X of phase 1: a joined prompt of \d+ tokens and the .* 256"):
        small_plan(**changes_for({"X": way}))


def test_slots_that_are_taken_out_need_no_room_behind_them(small_plan):
    """100 tokens to follow fit behind the receiver alone, and not behind the joined prompt."""
    way = {"separator": "#" * 100}
    generation = {"max_new_tokens": 120}
    small_plan(generation=generation, **changes_for({"X": SOURCE | {"joined": way | {"keep": "receiver"}}}))
    with pytest.raises(ProtocolError, match="condition X of phase 1: a joined prompt"):
        small_plan(generation=generation, **changes_for({"X": SOURCE | {"joined": way | {"keep": "all"}}}))


def test_steering_needs_no_rotary_embedding(tiny, tmp_path):
    """GPT-2's keys hold no rotation to take out: directions are of its keys and values as they are."""
    model = tiny("gpt2")
    ways = {name: WAYS[name] for name in ("IV", "IR", "ST", "T", "M20", "M2", "M2n", "N4")} | {"STD": DECODING}
    found = run_batch(model, planned_batch(model, tmp_path, ways))
    assert {row["error"] for row in found} == {None}
    assert {row["condition"] for row in found} == {*PLAIN, *ways}


# --- layers of R_V of a model's own; random directions at every step ------------------------------------------------


def test_a_model_s_own_late_layer_is_read_and_reshaped(model, tmp_path):
    """`r_v_late` is another layer for this model than for others, and R_V is read off it too."""
    ways = {"late": SOURCE | {"reshape": {"layers": "r_v_late"}}, "named": SOURCE | {"reshape": {"layers": [1]}}}
    settings = {"forced_tokens": 12, "likelihood_tokens": 6, "js_positions": 4}
    found = {}
    for key, r_v in (
        ("own", {"window": 6, "per_model": {model.loaded.name: {"late": 1}}}),
        ("same", {"window": 6, "late": 1}),
        ("other", {"window": 6, "per_model": {"another-model": {"late": 1}}}),
    ):
        folder = tmp_path / key
        folder.mkdir()
        changes = changes_for(ways) | {"readouts": settings | {"r_v": r_v}}
        protocol = load_protocol(str(write_protocol(folder, **changes)))
        plan, _ = plan_for({None: model}, protocol, load_bank(protocol.bank), seed=0, n=1, phases=None)
        rows = run_batch(model, next(b for b in plan.batches if b.split == "test"))
        found[key] = {row["condition"]: row for row in rows}
    for key, is_layer_1 in (("own", True), ("same", True), ("other", False)):
        late, named = (found[key][name]["cache_checksum_before"] for name in ("late", "named"))
        assert (late == named) is is_layer_1, key
    for name in ("A", "C"):
        assert found["own"][name]["rv_output"] == found["same"][name]["rv_output"]
        assert found["own"][name]["rv_output"] != found["other"][name]["rv_output"]


def test_a_late_layer_that_the_named_model_lacks_is_refused(model, tmp_path):
    r_v = {"window": 6, "per_model": {model.loaded.name: {"late": 77}}}
    protocol = load_protocol(str(write_protocol(tmp_path, readouts={"r_v": r_v})))
    with pytest.raises(CacheError, match="layer 77 does not exist"):
        plan_for({None: model}, protocol, load_bank(protocol.bank), seed=0, n=1, phases=None)


def test_random_value_steering_takes_another_direction_for_each_pair_and_goes_on_with_it_while_decoding(
    model, tmp_path
):
    null = {"layers": [1], "alpha": 40, "random_directions": 20}
    ways = {
        "N": {"steer_values": null},
        "ND": {"steer_values": null | {"while_decoding": True}},
        "S": {"steer_values": {"layers": [1], "alpha": 40}},
    }
    batch = planned_batch(model, tmp_path, ways)
    built = build_all(model, batch, prefill_all(model, batch))
    assert built.steering is not None
    steps = built.steering.steps[1]  # [trials, kv_heads, head_dim]
    rows = {name: [i for i, t in enumerate(batch.trials) if t.condition == name] for name in ("ND", "S", "A")}
    assert not steps[rows["S"]].any() and not steps[rows["A"]].any()
    own = steps[rows["ND"]]
    assert torch.allclose(own.norm(dim=-1), own[:1].norm(dim=-1).expand(len(own), -1), rtol=1e-4)
    assert len({tuple(row.flatten().tolist()) for row in own}) == len(own)
    found = indexed(run_batch(model, batch))
    for pair, row in found["ND"].items():
        assert row["error"] is None
        assert row["cache_checksum_before"] == found["N"][pair]["cache_checksum_before"]
        assert row["cache_checksum_before"] != found["S"][pair]["cache_checksum_before"]
        assert row["output_logprobs"] != found["N"][pair]["output_logprobs"]
