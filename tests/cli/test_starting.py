"""`kvpatch new` writes what runs at once and is wrong nowhere; a file with mistakes is told all of them in one call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvpatch.cli import main as cli
from kvpatch.errors import ProtocolMistakes
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.load import load_protocol
from kvpatch.protocols.names import Planned
from kvpatch.readouts.scorer import read_scorer
from kvpatch.specs.readouts import readouts
from kvpatch.store.directory import Store

pytestmark = pytest.mark.model
OWN_MODE = Path(__file__).parents[2] / "docs" / "own-mode.md"


@pytest.fixture
def kvpatch(capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """`kvpatch(*arguments)`: exit code, standard output and errors of a command in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvpatch", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    monkeypatch.setenv("KVPATCH_DEBUG", "")
    return call


@pytest.fixture
def starter(kvpatch, tmp_path) -> Path:
    assert kvpatch("new", tmp_path / "mine")[0] == 0
    return tmp_path / "mine"


def test_the_starter_runs_as_it_is_to_verdicts_and_a_report(kvpatch, starter, tiny_dirs, monkeypatch):
    monkeypatch.chdir(starter.parent)
    code, out, err = kvpatch("run", "mine/protocol.yaml", "--model", tiny_dirs("llama"), "--n", 2)
    assert code == 0, err
    directory = Path("runs") / f"mine-{tiny_dirs('llama').name}"
    first = out.splitlines()[0]
    assert str(directory) in first and "kvpatch view" in first
    assert len(out.splitlines()) <= 40
    assert {row["error"] for row in Store(directory).read().to_pylist()} == {None}
    assert (directory / "report.html").exists()


def test_the_starter_s_primary_claim_is_evidence_about_a_cache_and_its_text_contrast_is_called_a_check(starter):
    protocol = load_protocol(str(starter / "protocol.yaml"), needs_files=True, planned=Planned())
    assert protocol.protocol == "mine"
    primary = [h for h in protocol.hypotheses if h.family == "primary"]
    assert primary and not any(protocol.is_tautological(h) for h in primary)
    for h in primary:
        assert not any(protocol.conditions[c].is_text_of_pair for c in h.conditions)
    assert all("check" in h.claim for h in protocol.hypotheses if h.contrast == "C - N1")


def test_the_starter_s_bank_has_spare_prompts_and_its_lexicon_tells_the_modes_apart(starter):
    protocol = load_protocol(str(starter / "protocol.yaml"))
    bank = load_bank(protocol.bank, protocol.folder)
    wanted = protocol.calibration.pairs + max(phase.n for phase in protocol.phases.values())
    assert min(len(bank.group(name)) for name in ("plain", "tale", "foreign")) >= max(24, wanted)
    assert set(bank.partners) == {p.id for p in bank.group("plain")}
    scorer = read_scorer("lexicon.yaml", protocol.folder)
    assert {c.id for c in bank.continuations if scorer.score(c.text, "").score > 0} == {
        c.id for c in bank.continuations if c.mode == protocol.mode
    }


def test_pairs_of_the_starter_suffice_on_a_real_tokenizer(starter):
    from transformers import AutoTokenizer

    from kvpatch.models.load import pull
    from kvpatch.planning.pairing import form_pairs

    tokenizer = AutoTokenizer.from_pretrained(pull("smollm2-135m"))
    protocol = load_protocol(str(starter / "protocol.yaml"))
    bank = load_bank(protocol.bank, protocol.folder)
    lengths = {p.id: len(tokenizer(p.text).input_ids) for p in bank.prompts}
    assert len(form_pairs(bank, protocol, lengths, seed=0).pairs) >= 28


@pytest.mark.parametrize("name", ["two words", ".hidden", "-n"])
def test_a_name_that_can_t_be_a_protocol_s_is_refused(kvpatch, tmp_path, name):
    code, _, err = kvpatch("new", tmp_path / name)
    assert code == 2 and "can't name a protocol" in err and not (tmp_path / name).exists()


def test_nothing_is_written_over(kvpatch, starter):
    before = (starter / "protocol.yaml").read_text()
    code, _, err = kvpatch("new", starter)
    assert code == 2 and "is there already" in err and (starter / "protocol.yaml").read_text() == before


def test_every_readout_is_listed_with_what_it_asks(kvpatch):
    code, out, _ = kvpatch("readouts")
    assert code == 0 and len(out.splitlines()) <= 40
    for name in readouts():
        assert name in out
    text = OWN_MODE.read_text("utf-8")
    assert [name for name in readouts() if f"`{name}`" not in text] == []


WRONG = {
    "protocol.yaml": [
        ("n: 20 #", "n: twenty #", "phases.transfer.n"),
        ("contrast: C - N1", "contrast: C - N7", "'N7' is not in phase"),
        ("M1n, readout: mode_llr", "M1n, readout: mode_lr", "did you mean 'mode_llr'"),
        ("sources: tale,", "sources: tales,", "did you mean 'tale'"),
        ("align: stretch, layers: {band: [0.5, 1]}}, role", "align: strech}, role", "did you mean 'stretch'"),
        ("manipulation: {alpha", "manipulation: {alfa", "expected alpha"),
    ],
    "bank/plain.yaml": [
        ("topic: rice, ", "", "topic: this key is missing"),
        ("domain: garden", "domian: garden", "did you mean 'domain'"),
    ],
    "bank/foreign.yaml": [("group: foreign, partner_of", "group: foreign, partner", "did you mean 'partner_of'")],
    "lexicon.yaml": [("rejects: [forest, place", "rejects: [forest, palace", "counter-example 'palace'")],
}  # fmt: skip


def test_plan_says_all_that_is_wrong_in_protocol_bank_and_lexicon_at_once_before_a_model_is_looked_for(
    kvpatch, starter
):
    told = []
    for file, changes in WRONG.items():
        text = (starter / file).read_text()
        for right, wrong, words in changes:
            assert right in text
            text = text.replace(right, wrong, 1)
            told.append(words)
        (starter / file).write_text(text)
    code, out, err = kvpatch("plan", starter / "protocol.yaml", "--model", "there-is-none")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert [words for words in told if sum(words in line for line in lines) != 1] == [], err
    assert len(lines) == len(told), err
    assert all(", line " in line for line in lines)


def test_what_was_put_aside_brings_no_mistakes_that_the_file_has_not(starter):
    """One wrong key in each kind of part, and nothing is told but that key."""
    text = (starter / "protocol.yaml").read_text()
    for right, wrong in (
        ("test: greater, family: manipulation", "test: greatr, family: manipulation"),
        ("id: late_carries", "id: 7 up"),
        ("\nmode: fairy_tale", "\nmode: two words"),
        ("bank: bank", "bank: 7"),
        ("calibration: {pairs: 8", "calibration: {pairs: many"),
        ("into: target, from: foreign, patch: {align: replace}", "into: targt, from: foreign, patch: {align: replace}"),
        ("    conditions: [A, B, C, M1, late]", "    conditions: A"),
        ("question: Can fairy", "qestion: Can fairy"),
        ("families:", "familis:"),
        ("pairing: {", "pairing: [] # {"),
        ("\nphases:", "\nphase:"),
    ):
        assert right in text
        (starter / "protocol.yaml").write_text(text.replace(right, wrong, 1))
        with pytest.raises(ProtocolMistakes) as raised:
            load_protocol(str(starter / "protocol.yaml"), needs_files=True)
        assert len(raised.value.lines) == 1, raised.value.lines


def test_too_few_prompts_for_n_are_told_before_a_model_is_looked_for(kvpatch, starter):
    code, _, err = kvpatch("plan", starter / "protocol.yaml", "--model", "there-is-none", "--n", 40)
    assert code == 2 and "wants n=40" in err and "it needs 48 of each" in err


def test_too_few_calibration_pairs_are_told_in_words_and_alone(kvpatch, starter) -> None:
    file = starter / "protocol.yaml"
    file.write_text(file.read_text("utf-8").replace("calibration: {pairs: 8", "calibration: {pairs: 1"), "utf-8")
    code, _, err = kvpatch("plan", file, "--model", "smollm2-135m")
    assert code == 2 and "calibration.pairs: must be at least 2, not 1" in err
    assert "held out" not in err


def test_fewer_pairs_than_a_claim_asks_for_are_told_before_the_run() -> None:
    from kvpatch.verdicts.smallest import warnings_before

    protocol = load_protocol("dec7")
    assert any("no answer says that the mode can be read" in line for line in warnings_before(protocol, 9))
    assert not any("no answer says" in line for line in warnings_before(protocol, 10))
