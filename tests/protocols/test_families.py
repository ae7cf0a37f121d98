"""The `families` of a protocol: one alpha for all of a family, and a graph that can be right or wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import kvpatch
from kvpatch.protocols.load import load_protocol
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.readouts import readouts
from kvpatch.verdicts.families import most_alpha
from kvpatch.verdicts.prerequisites import all_needed
from kvpatch.verdicts.texts import Texts

SHIPPED = Path(kvpatch.__file__).parent / "protocols"


def protocol(families: dict[str, Any], alphas: dict[str, float] | None = None, **more: Any) -> Protocol:
    asked = [
        {"id": f"h{i}", "claim": "?", "phase": "1", "contrast": "B - A", "readout": "mode_llr", "test": "greater",
         "needs": [], "family": family, **({"alpha": (alphas or {})[family]} if family in (alphas or {}) else {})}
        for i, family in enumerate("ffg")
    ]  # fmt: skip
    return Protocol.model_validate(
        {
            "protocol": "p", "title": "t", "question": "?", "families": families, "hypotheses": asked,
            "conditions": {"A": {"about": "a"}, "B": {"about": "b", "into": "source"}},
            "phases": {"1": {"question": "?", "n": 10, "conditions": ["A", "B"]}}, **more,
        }
    )  # fmt: skip


def test_hypotheses_have_the_alpha_of_their_family_and_others_their_own():
    made = protocol({"f": {"alpha": 0.001}}, {"g": 0.02})
    assert [h.alpha for h in made.hypotheses] == [0.001, 0.001, 0.02]
    again = Protocol.as_stored(made.model_dump(mode="json", by_alias=True))
    assert again == made and again.sha256 == made.sha256


def test_a_hypothesis_that_gives_an_alpha_keeps_it_and_its_family_errs_as_often():
    made = protocol({"f": {"alpha": 0.01, "passes_to": {"g": 1.0}}, "g": {"alpha": 0.02}}, {"g": 0.04})
    assert [h.alpha for h in made.hypotheses] == [0.01, 0.01, 0.04]
    assert most_alpha(made) == pytest.approx({"f": 0.01, "g": 0.06})


def test_a_protocol_without_families_has_the_hash_of_before():
    assert "families" not in protocol({}).model_dump(mode="json", by_alias=True)


@pytest.mark.parametrize(
    ("families", "alphas", "more", "told"),
    [
        ({"ff": {"alpha": 0.01}}, {}, {}, "no hypothesis has family 'ff'; did you mean 'f'?"),
        ({"f": {"passes_to": {"h": 1}}}, {}, {}, "no family 'h' under 'families'"),
        ({"f": {"passes_to": {"f": 1}}}, {}, {}, "family 'f' passes its alpha to itself"),
        ({"f": {"passes_to": {"g": 1.5}}, "g": {}}, {}, {}, "family 'f' passes on 1.5 of its alpha"),
        ({"f": {"passes_to": {"g": -0.5}}, "g": {}}, {}, {}, "a share of alpha lies above 0 and is at most 1"),
        (
            {"f": {"passes_to": {"g": 1}}, "g": {"correction": "benjamini_hochberg"}}, {}, {},
            "'f' can't pass alpha to 'g': Benjamini-Hochberg",
        ),
        ({"f": {}}, {}, {"corrections": {"f": "holm"}}, "family 'f' has its correction under 'families'"),
        ({"f": {"alpha": 0}}, {}, {}, "greater than 0"),
    ],
    ids=["unknown", "heir", "itself", "too much", "negative", "bh", "twice", "no alpha"],
)  # fmt: skip
def test_what_is_wrong_is_told(families: dict[str, Any], alphas: dict[str, float], more: dict[str, Any], told: str):
    with pytest.raises(ValidationError) as error:
        protocol(families, alphas, **more)
    assert told in str(error.value)


def test_the_largest_alpha_of_a_family_counts_what_may_be_passed_to_it():
    made = protocol({"f": {"alpha": 0.01, "passes_to": {"g": 0.5}}, "g": {"alpha": 0.05, "passes_to": {"f": 1}}})
    assert most_alpha(made) == pytest.approx({"f": 0.06, "g": 0.055})


def test_dec7_has_the_plans_alphas():
    dec7 = load_protocol("dec7")
    alphas = {
        h.family: h.alpha for h in dec7.hypotheses if h.family in ("manipulation", "text", "primary", "necessity")
    }
    assert alphas == {"manipulation": 0.001, "text": 0.001, "primary": 0.001, "necessity": 0.01}
    assert {h.alpha for h in dec7.hypotheses} == {0.001, 0.01, 0.05}
    named = {h.family: h.alpha for h in dec7.hypotheses if h.family in dec7.families}
    assert named == {name: family.alpha for name, family in dec7.families.items()}
    assert all(h.alpha == named[h.family] for h in dec7.hypotheses if h.family in named)
    assert max(most_alpha(dec7).values()) < 0.051


def test_the_primary_family_of_dec7_is_evidence_about_a_cache_and_text_contrasts_say_what_they_are():
    dec7 = load_protocol("dec7")
    texts = Texts(dec7, {})
    primary = [h for h in dec7.hypotheses if h.family == "primary"]
    assert {"M1 - M1n", "M1 - M1y"} <= {h.contrast for h in primary}
    assert all(texts.evidence(h) == "cache" for h in primary)
    checks = [h for h in dec7.hypotheses if h.family == "text"]
    assert checks and all(texts.evidence(h) == "text" and h.claim.startswith("Manipulation check") for h in checks)


def kind_of(readout: str) -> str:
    for kind, names in (
        ("likelihood", "llr"),
        ("score", "score"),
        ("R_V", "rv_"),
        ("R_V", "pr_"),
        ("attention", "attention"),
    ):
        if names in readout:
            return kind
    return readout


@pytest.mark.parametrize("name", ["dec7", "validate"])
def test_no_verdict_of_one_kind_of_readout_waits_for_another_kind(name: str):
    """A hypothesis that relates two readouts waits for those two."""
    asked = load_protocol(name).hypotheses
    kinds = {h.id: {kind_of(h.readout), *(kind_of(v.readout) for v, _ in h.others())} for h in asked}
    assert {"likelihood", "score", "R_V", "attention"} <= {kind for of in kinds.values() for kind in of}
    known = set(readouts())
    for h in asked:
        assert h.readout in known
        for needed in all_needed(asked, [h.id]):
            assert kinds[needed] <= kinds[h.id], f"{h.id} ({kinds[h.id]}) waits for {needed} ({kinds[needed]})"
