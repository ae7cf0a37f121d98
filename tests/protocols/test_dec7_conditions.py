"""dec7's conditions: each part of a swap has its partner, and nothing compares marks by their number."""

from __future__ import annotations

from collections import Counter

import pytest

from kvpatch.protocols.conditions import Condition
from kvpatch.protocols.load import load_protocol, shipped_protocols
from kvpatch.protocols.schema import Having, Protocol, RVLayers, RVSettings
from kvpatch.report.dose import levels, strengths
from kvpatch.report.maps import MAPS, NEEDED, NEEDED_TOKENS, RESIDUAL, place_of
from kvpatch.specs.selectors import LayerAt, LayerBand, SlotQuery

FOREIGN = ("foreign", "foreign_matched")


@pytest.fixture(scope="module")
def dec7() -> Protocol:
    return load_protocol("dec7", needs_files=True)


def conditions_of(protocol: Protocol, phase: str) -> dict[str, Condition]:
    return {name: protocol.conditions[name] for name in protocol.phases[phase].all_conditions}


def drawn(protocol: Protocol, phase: str) -> set[str]:
    """Conditions that a map (`report.maps.MAPS`) or a dose curve (`report.dose`) of a phase shows, and the natural runs
    that these are changes from."""
    made = conditions_of(protocol, phase)
    on_maps = {name for name in made if place_of(protocol.conditions[name]) is not None}
    curves = (levels(protocol.phases[phase], protocol), strengths(protocol.phases[phase], protocol))
    shown = on_maps.union(*(set(curve["condition"]) for curve in curves))
    return shown | {"A" if made[name].into == "target" else "B" for name in shown}


def read_by_hypotheses(protocol: Protocol, phase: str) -> set[str]:
    """Conditions of a phase's contrasts, and the natural source where a change from the natural target is told as a
    share of the natural gap."""
    own = [h for h in protocol.hypotheses if h.phase == phase]
    has_share = any(h.kind.measures == "difference" and h.contrast.endswith(" - A") for h in own)
    return {name for h in own for name in h.conditions} | ({"B"} if has_share else set())


@pytest.mark.parametrize("name", sorted(shipped_protocols()))
def test_no_condition_is_run_that_no_hypothesis_no_curve_and_no_map_reads(name: str):
    protocol = load_protocol(name, needs_files=True)
    for phase, what in protocol.phases.items():
        unread = set(what.all_conditions) - read_by_hypotheses(protocol, phase) - drawn(protocol, phase)
        assert not unread, phase


def test_the_experiment_s_own_runs_are_those_it_planned(dec7: Protocol):
    own = {
        phase: what.n * sum(dec7.role(phase, name) == "experiment" for name in what.all_conditions)
        for phase, what in dec7.phases.items()
    }
    assert own.pop("interventions") > 0
    assert own == {"1": 600, "2": 250, "3": 200, "4": 100, "5": 300, "6": 150, "7": 300}


def test_every_hypothesis_names_its_needs_and_no_family_mixes_what_confirms_and_what_explores(dec7: Protocol):
    assert all(h.needs is not None for h in dec7.hypotheses)
    families: dict[str, set[bool]] = {}
    for h in dec7.hypotheses:
        families.setdefault(h.family, set()).add(h.confirmatory)
    assert [family for family, kinds in families.items() if len(kinds) > 1] == []


def test_the_earlier_interventions_and_the_premises_are_asked(dec7: Protocol):
    asked = {h.id: h for h in dec7.hypotheses}
    for name, contrast, n in (
        ("was_v_sufficient", "I_V - I_V_n", 100),
        ("was_v_necessary", "I_VN - B", 100),
        ("was_steer_late", "I_S24 - I_S24n", 50),
        ("was_steer_early", "I_S4 - I_S4n", 50),
        ("was_qkv_late", "I_QKV - I_QKV_n", 50),
        ("was_residual_single", "I_R24_last - I_R24_last_n", 50),
        ("was_residual_all", "I_Rall_last - I_Rall_last_n", 50),
        ("was_swap", "C - A", 50),
        ("premise_rv_contracts", "B - A", 100),
        ("premise_v_moves_rv", "I_V - A", 100),
        ("premise_first_tenth", "T_tenth - T_tenth_n", 50),
    ):
        assert (asked[name].contrast, dec7.phases[asked[name].phase].n) == (contrast, n), name
    for name in ("was_residual_single", "was_residual_all"):
        assert asked[name].kind.certifies_absence
    assert "dose_peak_contrast_score" in (asked["dose_peak"].needs or [])


def test_the_direct_part_of_a_band_is_the_total_s_layers_and_slots(dec7: Protocol):
    """total - direct = indirect, of the source against the same of a foreign prompt."""
    for first, band in ((0, "0_4"), (4, "4_8"), (8, "8_16"), (16, "16_24")):
        total, alone = (dec7.conditions[f"{how}_{band}"] for how in ("through", "alone"))
        assert total.in_prefill.layers == alone.patch.layers and total.in_prefill.slots == alone.patch.slots == "all"
        assert alone.patch.align == "end" and alone.patch.rotate
        contrasts = {h.id: h.weights() for h in dec7.hypotheses if h.family == "mediation_map"}
        parts = Counter(contrasts[f"direct_{first}"])
        parts.update(contrasts[f"indirect_{first}"])
        assert {name: weight for name, weight in parts.items() if weight} == contrasts[f"total_{first}"]


def test_dec7_reads_the_second_edition_with_what_it_needs(dec7: Protocol):
    assert dec7.bank == "recursion"
    assert dec7.pairing.max_partner_difference == 0.1
    assert dec7.readouts.continuations_per_cell == 8


@pytest.mark.parametrize("phase", ["2", "3"])
def test_every_part_of_a_source_s_swap_has_a_foreign_partner_in_its_phase(dec7: Protocol, phase: str):
    """Bands, all but a band, windows, single layers, strata, and self-referential tokens."""
    there = conditions_of(dec7, phase).values()
    parts = [c for c in there if c.from_ == "source" and c.into == "target" and c.patch and c.role != "integrity"]
    assert len(parts) > 5
    of_foreign = [c.patch for c in there if c.from_ in FOREIGN and c.into == "target"]
    assert [c.about for c in parts if c.patch not in of_foreign] == []


def test_no_condition_is_run_twice_in_a_phase(dec7: Protocol):
    for phase in dec7.phases:
        made = [c.model_dump_json(exclude={"about", "role"}) for c in conditions_of(dec7, phase).values()]
        assert len(set(made)) == len(made), phase


def test_the_source_lacks_each_band_and_each_stratum_in_turn(dec7: Protocol):
    lacking = {
        phase: [
            c.patch.layers.band if isinstance(c.patch.layers, LayerBand) else getattr(c.patch.slots, "fraction", None)
            for c in conditions_of(dec7, phase).values()
            if c.into == "source" and c.from_ == "foreign_matched" and c.patch
        ]
        for phase in ("2", "3")
    }
    assert lacking["2"] == [None, (0, 0.125), (0.125, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]
    assert lacking["3"] == [None, (0, 0.1), (0, 0.25), (0.25, 0.75), (0.75, 1)]


def test_the_first_tenth_is_swapped_from_the_source_and_from_a_foreign_prompt(dec7: Protocol):
    there = conditions_of(dec7, "3")
    for name, role in (("T_tenth", "source"), ("T_tenth_n", "foreign")):
        query = there[name].patch.slots
        assert (there[name].from_, query.of, query.fraction) == (role, "body", (0, 0.1))


def test_the_residual_stream_is_replaced_at_each_eighth_of_depth(dec7: Protocol):
    for suffix, role in (("", "source"), ("_n", "foreign")):
        for eighth in range(8):
            condition = conditions_of(dec7, "interventions")[f"I_R{4 * eighth}{suffix}"]
            assert condition.from_ == role and condition.in_prefill.layers == LayerAt(depth=eighth / 8)


@pytest.mark.parametrize("name", ["I_S24", "I_S4"])
def test_value_steering_has_its_null_of_twenty_random_directions(dec7: Protocol, name: str):
    there = conditions_of(dec7, "interventions")
    own, null = there[name].steer_values, there[f"{name}n"].steer_values
    assert null.random_directions >= 20
    assert null.model_copy(update={"random_directions": None}) == own
    assert null.uses_pair_number and not own.uses_pair_number
    assert any(h.contrast == f"{name} - {name}n" for h in dec7.hypotheses)


def test_foreign_prompts_like_the_source_stand_beside_the_main_comparators(dec7: Protocol):
    one, other = dec7.conditions["N1y"], dec7.conditions["N1"]
    assert one.from_ == "foreign_matched" and one.patch == other.patch
    assert dec7.conditions["M1y"].from_ == "foreign_matched"
    assert dec7.conditions["M1y"].joined == dec7.conditions["M1n"].joined
    for phase in ("1", "7", "interventions"):
        assert {"N1y", "M1y"} <= set(dec7.phases[phase].all_conditions)
    read = {(h.phase, h.contrast) for h in dec7.hypotheses}
    assert {("1", "C - N1y"), ("1", "M1 - M1y"), ("7", "C - N1y"), ("7", "M1 - M1y")} <= read


def test_attention_is_read_under_m1_and_a_partial_swap_with_their_partners(dec7: Protocol):
    there = conditions_of(dec7, "6")
    assert {"M1", "M1n", "N1", "N1y"} <= there.keys()
    parts = [c for c in there.values() if c.patch and c.patch.layers is not None]
    assert {c.from_ for c in parts} == {"source", "foreign"} and len({c.patch.to_json() for c in parts}) == 1


def test_marks_are_compared_one_by_one_and_on_pairs_that_have_them(dec7: Protocol):
    """A sum over marked words is larger where there are more of them."""
    read = {h.readout for h in dec7.hypotheses} | {h.against.readout for h in dec7.hypotheses if h.against}
    assert "attention_marked" not in read
    assert {"attention_marked_each", "attention_marked_beside"} <= read
    for phase in ("3", "6"):
        having = dec7.phases[phase].having
        assert having is not None and {"source", "foreign_matched"} <= set(having.roles)
    others = dec7.conditions["T_random"].patch.slots
    assert others.equally_frequent and others.matched_to == dec7.conditions["T_self"].patch.slots
    marked = [h for h in dec7.hypotheses if h.phase == "3" and "T_one" in h.contrast]
    assert [h.contrast for h in marked] == ["T_one - T_one_n"]
    assert all(dec7.conditions[name].patch.slots.at_most == 1 for name in ("T_one", "T_one_n"))


def test_what_the_source_lacks_and_the_residual_stream_have_maps_of_their_own(dec7: Protocol):
    places = {name: place_of(condition) for name, condition in dec7.conditions.items()}
    assert places["need_4_8"].map == NEEDED and places["need_tenth"].map == NEEDED_TOKENS
    assert places["I_R12"].map == places["I_R12_n"].map == RESIDUAL
    assert places["I_R12"].series != places["I_R12_n"].series
    assert places["I_Rall"] is None and places["I_R24_last"] is None
    assert {place.map for place in places.values() if place} == set(MAPS)
    assert all(place.map in (NEEDED, NEEDED_TOKENS) for n, place in places.items() if n.startswith("need_") and place)


def test_a_model_may_have_layers_of_r_v_of_its_own(dec7: Protocol):
    named = ("mistral-7b-instruct-v0.2", "mistralai/Mistral-7B-Instruct-v0.3", "/models/Mistral-7B-Instruct-v0.1/")
    for name in named:
        own = dec7.readouts.r_v.of_model(name)
        assert (own.early, own.late, own.window) == (0.125, 22, 16), name
    for name in ("smollm2-135m", "my-mistral-7b-instruct-v0.2", "mistral-7b-instruct/other"):
        assert dec7.readouts.r_v.of_model(name).late == 0.75, name
    for name in ("G1", "G2", "G1_own", "G1_turn", "G2_turn"):
        assert dec7.conditions[name].reshape.layers == "r_v_late"


def test_layers_of_r_v_that_no_model_has_of_its_own_are_no_part_of_the_hash():
    assert "per_model" not in RVSettings().model_dump()
    with pytest.raises(ValueError, match="give the model a layer of its own"):
        RVLayers()


def test_a_phase_without_having_keeps_its_hash(dec7: Protocol):
    assert "having" not in dec7.phases["1"].model_dump()
    assert Having(slots=SlotQuery(of="body"), roles=["source"]).beyond_sinks is False
