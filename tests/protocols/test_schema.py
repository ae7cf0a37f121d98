"""The protocol's hash follows what it says, and tautologies are seen from the conditions alone."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from kvpatch.protocols.load import load_protocol, parse_protocol
from kvpatch.protocols.schema import Condition, Hypothesis, Protocol
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
    assert tautological == {"seed_memory", "seed_necessity", "seed_geometry"}


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


def test_condition_takes_from_and_patch_together_or_neither():
    with pytest.raises(ValidationError, match="both 'from' and 'patch', or neither"):
        Condition.model_validate({"about": "x", "from": "source"})
    with pytest.raises(ValidationError, match="takes no 'patch'"):
        Condition.model_validate(CONDITIONS["C"] | {"text_of": "source"})


def test_replace_on_a_subset_of_layers_is_refused():
    with pytest.raises(ValidationError, match="needs all layers, all KV heads and both parts"):
        Condition.model_validate(CONDITIONS["C"] | {"patch": {"align": "replace", "layers": [1]}})
