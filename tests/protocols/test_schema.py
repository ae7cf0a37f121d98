"""The protocol's hash follows what it says, and tautologies are seen from the conditions alone."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from kvpatch.protocols.conditions import Condition
from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.load import load_protocol, parse_protocol
from kvpatch.protocols.schema import Protocol
from small import CONDITIONS, protocol_content

CONTENT = protocol_content("recursion")
SHA = Protocol.model_validate(CONTENT).sha256


def test_hash_is_the_same_for_another_layout_and_comments():
    flow = yaml.safe_dump(CONTENT, default_flow_style=True, sort_keys=True, width=60)
    block = yaml.safe_dump(CONTENT, default_flow_style=False, sort_keys=False, indent=6)
    commented = "# a comment\n" + "\n".join(f"{line}  # why" for line in block.splitlines() if line) + "\n\n"
    assert flow != block
    assert {parse_protocol(text, "x").sha256 for text in (flow, block, commented)} == {SHA}


def test_hash_is_the_same_where_a_default_is_written_out():
    assert Protocol.model_validate(CONTENT | {"generation": CONTENT["generation"] | {"top_p": 1.0}}).sha256 == SHA


def changed(path: str, value: Any) -> dict[str, Any]:
    content = yaml.safe_load(yaml.safe_dump(CONTENT))
    *parents, last = path.split("/")
    place = content
    for part in parents:
        place = place[int(part) if isinstance(place, list) else part]
    place[int(last) if isinstance(place, list) else last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("title", "Another title"),
        ("bank", "another"),
        ("generation/temperature", 0.8),
        ("generation/samples", 2),
        ("readouts/r_v/window", 7),
        ("calibration/pairs", 4),
        ("pairing/max_length_difference", 0.4),
        ("conditions/C/patch/strength", 1.0000001),
        ("conditions/P/patch/layers", [1, 3]),
        ("conditions/N1/from", "neutral"),
        ("phases/1/n", 6),
        ("hypotheses/0/alpha", 0.01),
        ("hypotheses/0/contrast", "A - B"),
    ],
)
def test_hash_follows_the_content(path, value):
    content = changed(path, value)
    if path.endswith("strength"):
        content["conditions"]["C"]["patch"] = {"align": "end", "strength": value}
    assert Protocol.model_validate(content).sha256 != SHA


@pytest.mark.parametrize(
    ("contrast", "expected"),
    [
        ("C - A", True),
        ("D - B", True),
        ("C - B", True),
        ("C - S1", True),
        ("S0 - A", True),
        ("C - N1", False),
        ("N1 - A", False),
        ("N3 - A", False),
        ("E1 - A", False),
        ("EJ - A", False),
        ("P - A", False),
        ("C - P", False),
        ("B - A", False),  # two natural runs: a manipulation check, and it can fail
    ],
)
def test_contrast_of_natural_runs_of_the_pair_s_own_texts_is_tautological(contrast, expected):
    protocol = Protocol.model_validate(CONTENT)
    hypothesis = protocol.hypotheses[0].model_copy(update={"contrast": contrast})
    assert protocol.is_tautological(hypothesis) is expected


@pytest.mark.parametrize(
    "patch",
    [
        {"align": "replace", "slots": "body"},
        {"align": "end"},
        {"align": "end", "layers": [0, 1]},
        {"align": "stretch", "strength": 0.5},
        {"align": "append"},
        {"align": "replace", "donor": "mean"},
    ],
)
def test_partial_patch_is_not_tautological(patch):
    content = changed("conditions/C/patch", patch)
    protocol = Protocol.model_validate(content)
    assert not protocol.is_tautological(next(h for h in protocol.hypotheses if h.contrast == "C - A"))


def test_dec7_calls_the_seed_criteria_tautological_and_the_primary_ones_not():
    dec7 = load_protocol("dec7")
    tautological = {h.id for h in dec7.hypotheses if dec7.is_tautological(h)}
    seed = {"seed_memory", "seed_necessity", "seed_geometry", "second_necessity"}
    assert tautological == seed | {"was_swap", "integrity_self", "integrity_text"}


@pytest.mark.parametrize(
    ("contrast", "weights"),
    [
        ("C - N1", {"C": 1, "N1": -1}),
        ("C-N1", {"C": 1, "N1": -1}),
        ("-A + B - C + D", {"A": -1, "B": 1, "C": -1, "D": 1}),
    ],
)
def test_contrast_is_read_as_weights(contrast, weights):
    assert hypothesis(contrast).weights() == weights


@pytest.mark.parametrize("contrast", ["", "C", "C N1", "C * N1", "C - ", "- - C", "2 C - N1", "C - C"])
def test_contrast_that_is_none_is_refused(contrast):
    with pytest.raises(ValidationError, match="contrast"):
        hypothesis(contrast)


def hypothesis(contrast: str) -> Hypothesis:
    return Hypothesis(id="h", claim="c", phase="1", contrast=contrast, readout="r", test="greater", family="f", gate=1)


def test_condition_takes_from_and_a_way_that_uses_it_together_or_neither():
    with pytest.raises(ValidationError, match="'from' goes with 'patch', 'in_prefill', 'joined' or 'reshape'"):
        Condition.model_validate({"about": "x", "from": "source"})
    with pytest.raises(ValidationError, match="each of them needs it"):
        Condition.model_validate({"about": "x", "patch": {}})


WAYS: dict[str, dict[str, Any]] = {
    "patch": {"patch": {"align": "replace"}, "from": "source"},
    "text_of": {"text_of": "source"},
    "in_prefill": {"in_prefill": {"site": "values", "layers": {"depth": 0.75}}, "from": "source"},
    "joined": {"joined": {"keep": "receiver"}, "from": "source"},
    "reshape": {"reshape": {"ratio": "giver"}, "from": "source"},
    "steer_values": {"steer_values": {"layers": [1], "alpha": 2}},
    "steer_cache": {"steer_cache": {"strength": 2}},
}


def condition(*ways: str, **more: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"about": "x", **more}
    for way in ways:
        out |= WAYS[way]
    return out


@pytest.mark.parametrize("way", WAYS)
def test_condition_made_in_one_way_is_taken(way):
    made = Condition.model_validate(condition(way))
    assert made.is_natural is (way == "text_of")
    assert Condition.model_validate(made.model_dump(mode="json", by_alias=True)) == made


@pytest.mark.parametrize("ways", list(itertools.combinations(WAYS, 2)))
def test_condition_made_in_two_ways_is_refused(ways):
    with pytest.raises(ValidationError, match="made in one way; it has " + " and ".join(f"'{way}'" for way in ways)):
        Condition.model_validate(condition(*ways))


@pytest.mark.parametrize("way", ["text_of", "steer_values", "steer_cache"])
def test_from_with_a_way_that_takes_nothing_is_refused(way):
    with pytest.raises(ValidationError, match="'from' goes with"):
        Condition.model_validate(condition(way) | {"from": "source"})


@pytest.mark.parametrize("way", ["patch", "in_prefill", "joined", "reshape"])
def test_a_way_that_takes_from_a_prompt_is_refused_without_it(way):
    with pytest.raises(ValidationError, match="needs it"):
        Condition.model_validate({k: v for k, v in condition(way).items() if k != "from"})


@pytest.mark.parametrize(
    ("way", "value"),
    [
        ("in_prefill", {"site": "keys"}),
        ("in_prefill", {"site": "values", "layers": {"depth": 1.5}}),
        ("in_prefill", {"site": "values", "slots": "middle"}),
        ("in_prefill", {"layers": [1]}),
        ("joined", {"keep": "giver"}),
        ("joined", {"keep": "receiver", "separator": ""}),
        ("reshape", {"ratio": "none"}),
        ("reshape", {"window": 1}),
        ("steer_values", {"alpha": 2}),
        ("steer_values", {"layers": [1], "alpha": 2, "beta": 1}),
        ("steer_cache", {"strength": 1, "random_directions": 0}),
        ("steer_cache", {"strength": 1, "parts": "q"}),
    ],
)
def test_intervention_that_says_nothing_sensible_is_refused_with_its_field(way, value):
    with pytest.raises(ValidationError, match=way):
        Condition.model_validate(condition(way) | {way: value})


@pytest.mark.parametrize("way", WAYS)
def test_recipe_says_what_is_done(way):
    made = Condition.model_validate(condition(way))
    if way == "text_of":
        assert made.recipe is None
        return
    assert made.recipe is not None
    recipe = json.loads(made.recipe)
    kinds = {"in_prefill": "InPrefill", "joined": "Joined", "reshape": "Reshape", "steer_values": "ValueSteering"}
    assert recipe.get("kind") == (kinds | {"steer_cache": "CacheSteering"}).get(way)
    assert recipe.items() >= WAYS[way][way].items() or way == "in_prefill"


@pytest.mark.parametrize("way", ["in_prefill", "joined", "steer_values", "steer_cache"])
def test_intervention_against_a_natural_run_is_not_tautological(way):
    content = yaml.safe_load(yaml.safe_dump(CONTENT))
    content["conditions"]["C"] = condition(way)
    protocol = Protocol.model_validate(content)
    assert not protocol.is_tautological(next(h for h in protocol.hypotheses if h.contrast == "C - A"))


@pytest.mark.parametrize(
    ("way", "field", "value"),
    [
        ("in_prefill", "site", "residual"),
        ("in_prefill", "layers", {"depth": 0.5}),
        ("in_prefill", "slots", "last"),
        ("joined", "keep", "all"),
        ("joined", "separator", " "),
        ("steer_values", "alpha", 2.5),
        ("steer_values", "while_decoding", True),
        ("steer_cache", "random_directions", 20),
        ("steer_cache", "parts", "v"),
    ],
)
def test_hash_follows_the_interventions(way, field, value):
    content = yaml.safe_load(yaml.safe_dump(CONTENT))
    content["conditions"]["C"] = condition(way)
    before = Protocol.model_validate(content).sha256
    content["conditions"]["C"] = condition(way) | {way: WAYS[way][way] | {field: value}}
    assert Protocol.model_validate(content).sha256 != before


def test_replace_on_a_subset_of_layers_is_refused():
    with pytest.raises(ValidationError, match="needs all layers, all KV heads and both parts"):
        Condition.model_validate(CONDITIONS["C"] | {"patch": {"align": "replace", "layers": [1]}})


@pytest.mark.parametrize(
    ("changes", "mode"),
    [({}, "recursive"), ({"pairing": {"sources": "legal_english"}}, "legal_english"), ({"mode": "French"}, "French")],
)
def test_a_mode_that_is_not_named_is_called_after_the_sources(changes, mode):
    protocol = Protocol.model_validate(protocol_content("bank", **changes))
    assert protocol.mode == protocol.model_dump()["mode"] == mode


@pytest.mark.parametrize("mode", ["plain", "two words", "", 3])
def test_mode_is_a_word_other_than_plain(mode):
    with pytest.raises(ValidationError):
        Protocol.model_validate(protocol_content("bank", mode=mode))
