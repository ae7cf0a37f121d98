"""What a protocol may say of prerequisites, and what it is told where it says it wrong."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from kvpatch.errors import ProtocolError
from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.load import load_protocol, parse_protocol
from small import protocol_content

COMMON = {"claim": "c", "phase": "1", "contrast": "B - A", "readout": "mode_llr", "test": "greater", "family": "f"}


def told(*needs: list[str] | None, **more: Any) -> str:
    """What is said of a protocol whose hypotheses h0, h1 .. need these."""
    hypotheses = [COMMON | {"id": f"h{i}", "family": f"f{i}", "needs": n} | more for i, n in enumerate(needs)]
    content = yaml.safe_dump(protocol_content("bank", hypotheses=hypotheses), sort_keys=False)
    with pytest.raises(ProtocolError) as error:
        parse_protocol(content, "mine.yaml")
    return str(error.value)


def test_a_hypothesis_that_there_is_not_is_told_with_the_nearest():
    assert "hypotheses.1.needs.0: no hypothesis 'h_0'; did you mean 'h0'?" in told([], ["h_0"])


def test_a_hypothesis_that_needs_itself_is_refused():
    message = told([], ["h1"])
    assert "hypotheses.1.needs.0: hypothesis 'h1' needs itself, so it could never be read" in message
    assert "circle" not in message


def test_a_name_given_twice_is_refused():
    assert "hypotheses.1.needs.1: 'h1' names hypothesis 'h0' twice" in told([], ["h0", "h0"])


@pytest.mark.parametrize(
    ("needs", "circle"),
    [
        ([["h1"], ["h0"]], {"'h0' needs 'h1' needs 'h0'", "'h1' needs 'h0' needs 'h1'"}),
        (
            [[], ["h0", "h3"], ["h1"], ["h2"]],
            {
                "'h1' needs 'h3' needs 'h2' needs 'h1'",
                "'h3' needs 'h2' needs 'h1' needs 'h3'",
                "'h2' needs 'h1' needs 'h3' needs 'h2'",
            },
        ),
    ],
)
def test_a_circle_is_told_with_all_that_are_in_it(needs: list[list[str]], circle: set[str]):
    message = told(*needs)
    assert any(f"{way}, a circle, so none of them could be read" in message for way in circle), message
    assert ".needs: " in message


def test_one_without_needs_asks_for_a_gate():
    assert "hypotheses.0.needs: give 'needs'" in told(None)


def test_what_has_needs_keeps_no_gate():
    message = told([], is_gatekeeper=True)
    assert "'is_gatekeeper' goes with 'gate'; a hypothesis with 'needs' keeps no gate" in message


def test_a_gate_needs_no_needs_and_needs_no_gate():
    with_gate = Hypothesis.model_validate({**COMMON, "id": "h", "gate": 3})
    assert (with_gate.gate, with_gate.needs) == (3, None)
    with_needs = Hypothesis.model_validate({**COMMON, "id": "h", "needs": []})
    assert (with_needs.gate, with_needs.needs) == (1, [])
    with pytest.raises(ValidationError, match="give 'needs'"):
        Hypothesis.model_validate({**COMMON, "id": "h"})


def test_a_protocol_of_gates_keeps_its_hash_and_one_with_needs_reads_back():
    with_gate = Hypothesis.model_validate({**COMMON, "id": "h", "gate": 3})
    assert "needs" not in with_gate.model_dump(mode="json")
    dec7 = load_protocol("dec7")
    again = type(dec7).as_stored(dec7.model_dump(mode="json", by_alias=True))
    assert (again.hypotheses, again.sha256) == (dec7.hypotheses, dec7.sha256)
