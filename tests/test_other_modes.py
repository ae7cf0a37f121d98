"""Another mode needs files and no change in the package: the example runs from its own directory, wherever it lies."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from kvpatch.cli import main as cli
from kvpatch.errors import ProtocolError
from kvpatch.planned import plan_for
from kvpatch.planning.pairing import form_pairs
from kvpatch.planning.plan import Batch
from kvpatch.prompts.bank import Bank, load_bank
from kvpatch.protocols.load import load_protocol
from kvpatch.readouts.behavior import Lexicon, content_words, normalise
from kvpatch.readouts.scorer import read_scorer
from kvpatch.store.directory import Store
from small import protocol_content, write_bank

pytestmark = pytest.mark.model
EXAMPLE = Path(__file__).parents[1] / "examples" / "french"


class Outcome(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def kvpatch() -> Iterator[Callable[..., Outcome]]:
    """`kvpatch(*arguments)`: run a command in this process."""

    def call(*arguments: object) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        patched.setattr(sys, "argv", ["kvpatch", *map(str, arguments)])
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stopped:
            cli.main()
        return Outcome(int(stopped.value.code or 0), out.getvalue(), err.getvalue())

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("KVPATCH_DEBUG", "")
        yield call


@pytest.fixture(scope="module")
def run(kvpatch, tiny_dirs) -> Callable[..., Outcome]:
    """`run(protocol, out, *options)`: two pairs of a protocol's transfer phase on a tiny model, or what is left."""

    def call(protocol: Path, out: Path, *options: str) -> Outcome:
        where = ("--model", tiny_dirs("llama"), "--out", out, "--n", 2, "--phases", "transfer")
        return kvpatch("run", protocol, *where, *options)

    return call


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory) -> Path:
    """A folder with a copy of the example, `mine`, and the run of its protocol, `out`. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    done = run(Path(shutil.copytree(EXAMPLE, folder / "mine")) / "protocol.yaml", folder / "out")
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def finished_with_function(run, tmp_path_factory) -> Path:
    """The same for the protocol with a function, here one for which every word that holds an e is French."""
    folder = tmp_path_factory.mktemp("finished")
    protocol = Path(shutil.copytree(EXAMPLE, folder / "mine")) / "with_function.yaml"
    code = "import re\ndef french(text):\n    return [m.span() for m in re.finditer(r'\\w*e\\w*', text)]\n"
    (folder / "mine" / "scorer.py").write_text(code)
    done = run(protocol, folder / "out", "--allow-code")
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def example(tmp_path) -> Path:
    """A copy of the example that may be changed."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "mine"))


@pytest.fixture(scope="module")
def bank() -> Bank:
    return load_bank("bank", EXAMPLE)


def told(outcome: Outcome, *words: str) -> bool:
    """Whether a command refused in one line, after warnings, that holds these words."""
    said = [line for line in outcome.err.splitlines() if not line.startswith("warning: ")]
    is_line = outcome.code == 2 and len(said) == 1 and said[0].startswith("kvpatch: ")
    return is_line and all(word in said[0] for word in words)


# The example's own files


def test_lexicon_keeps_to_its_examples():
    lexicon = Lexicon.load(EXAMPLE / "lexicon.yaml")
    for entry in lexicon.entries:
        assert {text: [hit.entry for hit in lexicon.hits(text)] for text in entry.matches} == {
            text: [entry.id] for text in entry.matches
        }
        assert {text: lexicon.hits(text) for text in entry.rejects} == {text: [] for text in entry.rejects}


@pytest.mark.parametrize("name", ["lexicon.yaml", "scorer.py:french"])
def test_scorers_find_french_in_french_alone(bank, name):
    scorer = read_scorer(name, EXAMPLE)
    assert [p.id for p in bank.prompts if scorer.score(p.text, "").score] == []
    assert [c.id for c in bank.continuations if (scorer.score(c.text, "").score > 10) != (c.mode == "French")] == []


def test_function_counts_a_french_word_beside_another_and_no_other():
    lexicon, function = (read_scorer(name, EXAMPLE) for name in ("lexicon.yaml", "scorer.py:french"))
    assert lexicon.score("John le Carré wrote it.", "").score > 0
    assert function.score("I saw le chat and sang.", "").score == 0
    assert function.score("I saw the cat dans le jardin.", "").hits == ((14, 18), (19, 21))


def test_bank_is_large_enough_and_no_source_shares_a_word_with_what_it_is_scored_on(bank):
    assert min(len(bank.group(name)) for name in ("plain", "french", "foreign")) >= 40
    assert {p.id for p in bank.group("plain")} == set(bank.partners)
    for source in bank.group("french"):
        said = content_words(source.text)
        own = [c for c in bank.continuations if c.domain == source.domain and not content_words(c.text) & said]
        assert {c.mode: sum(d.mode == c.mode for d in own) >= 3 for c in own} == {"French": True, "plain": True}


@pytest.mark.parametrize("file", ["protocol.yaml", "with_function.yaml"])
def test_pairs_suffice_on_a_real_tokenizer(file):
    from transformers import AutoTokenizer

    from kvpatch.models.load import pull

    tokenizer = AutoTokenizer.from_pretrained(pull("smollm2-135m"))
    protocol = load_protocol(str(EXAMPLE / file))
    bank = load_bank(protocol.bank, protocol.folder)
    lengths = {p.id: len(tokenizer(p.text).input_ids) for p in bank.prompts}
    wanted = protocol.calibration.pairs + max(phase.n for phase in protocol.phases.values())
    assert len(form_pairs(bank, protocol, lengths, seed=0).pairs) >= wanted
    for target in bank.group("plain"):
        short, long = sorted((lengths[target.id], lengths[bank.partners[target.id].id]))
        assert long - short <= 0.1 * long, target.id


# A run of it


def test_run_from_yaml_alone_is_about_french_and_outlives_its_files(kvpatch, finished, tmp_path):
    out = Path(shutil.copytree(finished / "out", tmp_path / "out"))
    record = Store(out).read_record()
    assert record.protocol["mode"] == "French"
    assert record.scorer_sha256 == read_scorer("lexicon.yaml", EXAMPLE).sha256
    assert record.bank_sha256 == load_bank("bank", EXAMPLE).sha256
    assert {row["error"] for row in Store(out).read().to_pylist()} == {None}
    report, verdicts = (out / "report.html").read_bytes(), (out / "verdicts.json").read_bytes()
    (finished / "mine").rename(finished / "away")
    try:
        again, redrawn = kvpatch("verdicts", out, "--json"), kvpatch("report", out)
    finally:
        (finished / "away").rename(finished / "mine")
    assert (again.code, redrawn.code) == (0, 0), again.err + redrawn.err
    assert again.out.encode() == verdicts
    assert (out / "report.html").read_bytes() == report
    said = re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", "", report.decode(), flags=re.DOTALL).lower()
    assert "french-style output" in said
    assert not re.search(r"recursive(?!_score)", said)


def test_function_runs_only_if_it_is_allowed_to(run, kvpatch, example, tmp_path, tiny_dirs):
    words = ("scorer.py:french", "--allow-code")
    assert told(run(example / "with_function.yaml", tmp_path / "out"), *words)
    plan = ("plan", example / "with_function.yaml", "--model", tiny_dirs("llama"), "--no-timing")
    assert told(kvpatch(*plan), *words)
    assert not (tmp_path / "out").exists()
    assert kvpatch(*plan, "--allow-code").code == 0


def test_function_scores_a_run_and_its_hits_stay_with_it(kvpatch, finished_with_function, tmp_path):
    out = Path(shutil.copytree(finished_with_function / "out", tmp_path / "out"))
    rows = Store(out).read().to_pylist()
    assert sum(row["recursive_score"] > 0 for row in rows) > len(rows) / 2
    for row in rows:
        assert row["recursive_score_masked"] <= row["recursive_score"]
        assert bool(row["mode_hits"]) == (row["recursive_score"] > 0)
        assert all("e" in normalise(row["text"])[hit["start"] : hit["end"]] for hit in row["mode_hits"])
    (out / "report.html").unlink()
    assert kvpatch("report", out).code == 0
    assert '<mark class="hit' in (out / "report.html").read_text()


def test_run_is_resumed_from_wherever_its_files_now_lie(run, finished_with_function, tmp_path):
    folder = Path(shutil.copytree(finished_with_function, tmp_path / "copy"))
    again = run(folder / "mine" / "with_function.yaml", folder / "out", "--allow-code")
    assert again.code == 0, again.err
    assert Store(folder / "out").read() == Store(finished_with_function / "out").read()


@pytest.mark.parametrize(
    ("protocol", "file", "words"),
    [
        ("protocol.yaml", "lexicon.yaml", "another lexicon or scorer"),
        ("protocol.yaml", "bank/plain.yaml", "another prompt bank"),
        ("with_function.yaml", "scorer.py", "another lexicon or scorer"),
    ],
)
def test_run_is_not_resumed_with_a_changed_file(run, request, tmp_path, protocol, file, words):
    has_function = protocol == "with_function.yaml"
    done = request.getfixturevalue("finished_with_function" if has_function else "finished")
    folder = Path(shutil.copytree(done, tmp_path / "copy"))
    resume = (folder / "mine" / protocol, folder / "out", *(["--allow-code"] if has_function else []))
    with (folder / "mine" / file).open("a") as changed:
        changed.write("# changed\n")
    assert told(run(*resume), words, "--out")


def test_broken_function_is_told_before_anything_is_written(run, example, tmp_path):
    (example / "scorer.py").write_text("def french(text):\n    return text[0]\n")
    broken = run(example / "with_function.yaml", tmp_path / "out", "--allow-code")
    assert told(broken, "scorer.py:french: IndexError")
    assert not (tmp_path / "out").exists()


def test_missing_files_are_told_before_anything_is_written(run, example, tmp_path):
    (example / "lexicon.yaml").unlink()
    assert told(run(example / "protocol.yaml", tmp_path / "out"), "no lexicon 'lexicon.yaml'")
    shutil.rmtree(example / "bank")
    assert told(run(example / "protocol.yaml", tmp_path / "out"), "no prompt bank 'bank'")
    assert not (tmp_path / "out").exists()


# What the plan holds


def planned(path: Path, model) -> list[Batch]:
    protocol = load_protocol(str(path))
    bank = load_bank(protocol.bank, protocol.folder)
    return plan_for({None: model}, protocol, bank, seed=0, n=2, phases=["transfer"])[0].batches


def test_neither_hash_nor_trials_depend_on_where_the_files_lie(tiny, example, monkeypatch):
    here, there = EXAMPLE / "protocol.yaml", example / "protocol.yaml"
    assert load_protocol(str(here)).sha256 == load_protocol(str(there)).sha256
    expected = planned(here, tiny("llama"))
    monkeypatch.chdir(example)
    assert planned(Path("protocol.yaml"), tiny("llama")) == expected


def test_a_protocol_finds_its_files_from_any_working_directory(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bank", "recursion"):
        write_bank(tmp_path / name)  # of the same name, and not what is meant
    assert load_protocol(str(EXAMPLE / "protocol.yaml")).folder == EXAMPLE
    assert {p.masked_by[0] for batch in planned(EXAMPLE / "protocol.yaml", tiny("llama")) for p in batch.pairs}
    dec7 = load_protocol("dec7")
    assert len(load_bank(dec7.bank, dec7.folder).prompts) > 400


def test_trials_depend_on_the_scorer_s_content(tiny, example):
    before = planned(example / "protocol.yaml", tiny("llama"))
    with (example / "lexicon.yaml").open("a") as lexicon:
        lexicon.write("# changed\n")
    after = planned(example / "protocol.yaml", tiny("llama"))
    assert {t.trial_id for b in before for t in b.trials}.isdisjoint(t.trial_id for b in after for t in b.trials)


def test_cells_are_the_protocol_s_mode_and_plain(tiny, bank):
    mode_of = {c.text: (c.mode, c.topic_of) for c in bank.continuations}
    for batch in planned(EXAMPLE / "protocol.yaml", tiny("llama")):
        for pair in batch.pairs:
            assert [{mode_of[text] for text in cell} for cell in pair.continuations] == [
                {("French", "target")}, {("plain", "target")}, {("French", "source")}, {("plain", "source")},
            ]  # fmt: skip


def test_mode_without_continuations_is_named_with_those_there_are(tiny, tmp_path):
    content = protocol_content(write_bank(tmp_path / "bank"), mode="French")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    protocol = load_protocol(str(tmp_path / "mine.yaml"))
    with pytest.raises(ProtocolError, match=r"no continuations of mode 'French'; it has plain, recursive"):
        plan_for({None: tiny("llama")}, protocol, load_bank(protocol.bank), seed=0, n=2, phases=None)


def test_example_says_what_editors_check():
    """The files point at the schema in the documents, and the schema knows the mode."""
    for file in ("protocol.yaml", "with_function.yaml"):
        first = (EXAMPLE / file).read_text().splitlines()[0]
        schema = json.loads((EXAMPLE / first.partition("$schema=")[2]).read_text())
        assert "mode" in schema["properties"]
