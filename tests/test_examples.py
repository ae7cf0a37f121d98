"""Every example of the gallery loads and plans, keeps to its lexicon, and says what it gave."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from kvpatch.planned import plan_for
from kvpatch.planning.pairing import form_pairs
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.load import load_protocol
from kvpatch.readouts.behavior import content_words
from kvpatch.readouts.scorer import read_scorer

pytestmark = pytest.mark.model
EXAMPLES = sorted(p.parent for p in (Path(__file__).parents[1] / "examples").glob("*/protocol.yaml"))
NEW = [example for example in EXAMPLES if example.name != "french"]  # test_other_modes.py holds that one
each = pytest.mark.parametrize("example", NEW, ids=[example.name for example in NEW])


def test_the_gallery_has_four_examples_beside_the_first_and_lists_them() -> None:
    assert len(NEW) >= 4
    listed = (EXAMPLES[0].parent / "README.md").read_text("utf-8")
    assert [example.name for example in EXAMPLES if f"({example.name}/README.md)" not in listed] == []


@each
def test_it_loads_and_plans_on_any_model(example: Path, tiny) -> None:
    protocol = load_protocol(str(example / "protocol.yaml"))
    bank = load_bank(protocol.bank, protocol.folder)
    plan = plan_for({None: tiny("llama")}, protocol, bank, seed=0, n=2, phases=None)[0]
    named = {condition for phase in protocol.phases.values() for condition in phase.conditions}
    assert named <= {trial.condition for batch in plan.batches for trial in batch.trials}


@each
def test_its_pairs_suffice_on_the_embedded_model(example: Path) -> None:
    from transformers import AutoTokenizer

    from kvpatch.models.load import pull

    tokenizer = AutoTokenizer.from_pretrained(pull("smollm2-135m"))
    protocol = load_protocol(str(example / "protocol.yaml"))
    bank = load_bank(protocol.bank, protocol.folder)
    lengths = {p.id: len(tokenizer(p.text).input_ids) for p in bank.prompts}
    wanted = protocol.calibration.pairs + max(phase.n for phase in protocol.phases.values())
    assert len(form_pairs(bank, protocol, lengths, seed=0).pairs) >= wanted


@each
def test_its_lexicon_finds_the_mode_in_its_continuations_alone(example: Path) -> None:
    protocol = load_protocol(str(example / "protocol.yaml"))
    bank, scorer = load_bank(protocol.bank, protocol.folder), read_scorer("lexicon.yaml", example)
    assert [p.id for p in bank.prompts if scorer.score(p.text, "").score] == []
    assert [c.id for c in bank.continuations if (scorer.score(c.text, "").score > 0) != (c.mode == protocol.mode)] == []


@each
def test_no_source_shares_a_word_with_two_texts_of_each_mode_that_it_is_scored_on(example: Path) -> None:
    protocol = load_protocol(str(example / "protocol.yaml"))
    bank = load_bank(protocol.bank, protocol.folder)
    for source in bank.group(protocol.pairing.sources):
        said = content_words(source.text)
        of_domain = [c for c in bank.continuations if c.domain == source.domain]
        modes = Counter(c.mode for c in of_domain if not content_words(c.text) & said)
        assert min(modes[str(protocol.mode)], modes["plain"]) >= 2, source.id


@each
def test_its_page_shows_a_figure_and_a_verdict(example: Path) -> None:
    text = (example / "README.md").read_text("utf-8")
    assert "](figure.svg)" in text and (example / "figure.svg").read_text("utf-8").startswith("<svg")
    verdicts = ("supported", "contradicted", "inconclusive", "equivalent", "not interpretable")
    assert any(f"| {verdict}" in text for verdict in verdicts)
