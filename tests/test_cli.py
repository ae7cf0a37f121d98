"""The command line: help without torch, one line for each mistake, JSON that parses, and runs that survive kill -9."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from kvpatch.cli import main as cli
from kvpatch.store.directory import Store
from small import CONDITIONS, bank_entries, protocol_content, with_patch, write_bank, write_protocol

pytestmark = pytest.mark.model

COMMANDS = ("run", "plan", "status", "verdicts", "report", "check", "bank", "models", "pull", "power", "schema", "view")


class Outcome(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def kvpatch(capsys, monkeypatch) -> Callable[..., Outcome]:
    """`kvpatch(*arguments)`: run a command in this process."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kvpatch", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), printed.out, printed.err)

    monkeypatch.setenv("KVPATCH_DEBUG", "")
    return call


@pytest.fixture(scope="module")
def model_dir(tiny_dirs) -> Path:
    return tiny_dirs("llama")


def assert_one_line(outcome: Outcome, *words: str) -> None:
    """Exit code 2, one line on stderr that holds these words (warnings before it aside), nothing on stdout."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    said = [line for line in outcome.err.splitlines() if not line.startswith("warning: ")]
    assert len(said) == 1 and said[0].startswith("kvpatch: "), outcome.err
    for word in words:
        assert word in said[0], outcome.err


def snapshot(directory: Path) -> dict[str, str]:
    """Hash of every file, the lock left out."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def trials(directory: Path) -> list[tuple]:
    table = Store(directory).read().to_pylist()
    return sorted((row["trial_id"], tuple(row["output_token_ids"]), row["text"], row["error"]) for row in table)


# Help


def test_help_of_every_command_has_an_example_and_loads_no_torch():
    code = (
        "import json, sys, io, contextlib, typer\n"
        "from kvpatch.cli.main import app\n"
        "pages = {}\n"
        "for name in ['', *typer.main.get_command(app).commands]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as page:\n"
        "        app([*([name] if name else []), '--help'], standalone_mode=False)\n"
        "    pages[name] = page.getvalue()\n"
        "heavy = [m for m in ('torch', 'transformers', 'pandas', 'scipy', 'pyarrow') if m in sys.modules]\n"
        "print(json.dumps([pages, heavy]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pages, heavy = json.loads(done.stdout)
    assert set(COMMANDS) <= pages.keys()
    assert heavy == []
    for name, page in pages.items():
        assert f"Example: kvpatch {name}" in page, name


# Mistakes


def test_unknown_protocol(kvpatch, model_dir, tmp_path):
    outcome = kvpatch("run", "dec8", "--model", model_dir, "--out", tmp_path / "out")
    assert_one_line(outcome, "no protocol 'dec8'", "dec7")
    assert not (tmp_path / "out").exists()


def test_unknown_model(kvpatch, tmp_path):
    outcome = kvpatch("run", write_protocol(tmp_path), "--model", "smollm3", "--out", tmp_path / "out")
    assert_one_line(outcome, "no model 'smollm3'", "smollm2-135m")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"GGUF" + bytes(range(200)) * 5, b"GGUF", b"not a model", b""])
def test_corrupted_gguf(kvpatch, tmp_path, monkeypatch, content):
    monkeypatch.setenv("KVPATCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(content)
    outcome = kvpatch("run", write_protocol(tmp_path), "--model", tmp_path / "bad.gguf", "--out", tmp_path / "out")
    assert_one_line(outcome._replace(err=outcome.err.replace("converting bad.gguf to safetensors\n", "")), "bad.gguf")
    assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir() if p.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"layers": [4]}, "layer 4 does not exist: there are 4"),
        ({"layers": [-5]}, "layer -5 does not exist"),
        ({"layers": {"band": [0.0, 0.05]}}, "holds no layer"),
        ({"kv_heads": [2]}, "KV head 2 does not exist: there are 2"),
        ({"slots": [0, 200]}, "slot 200 does not exist"),
        ({"slots": [-200]}, "slot -200 does not exist"),
        ({"slots": {"of": "body", "keywords": ["zebra"]}, "align": "replace"}, "found no slot to replace"),
        ({"slots": {"of": "sinks", "matched_to": {"of": "sinks"}}}, "matched_to"),
    ],
)
def test_patch_that_does_not_fit_is_found_before_anything_is_spent(
    kvpatch, model_dir, tmp_path, patch, words, monkeypatch
):
    monkeypatch.setattr("kvpatch.readiness.check", lambda model: pytest.fail("the run has begun"))
    path = write_protocol(tmp_path, **with_patch(patch))
    outcome = kvpatch("run", path, "--model", model_dir, "--out", tmp_path / "out")
    assert_one_line(outcome, "condition X of phase 1", words)
    assert not (tmp_path / "out").exists()
    assert_one_line(kvpatch("plan", path, "--model", model_dir), "condition X of phase 1", words)


def test_slot_index_must_fit_the_shortest_prompt(kvpatch, model_dir, tmp_path, tiny):
    """One target is shorter than the others, and the index fits all but that one."""
    model = tiny("llama")
    entries = bank_entries()
    entries[0]["text"] = "How long?"
    lengths = sorted(len(model.encode(e["text"]).token_ids) - 1 for e in entries if e.get("group") == "plain")
    assert lengths[0] < lengths[1]
    changes = with_patch({"slots": [lengths[0]]}) | {"pairing": {"max_length_difference": 1.0}}
    changes["phases"]["1"]["n"] = 5
    bank = write_bank(tmp_path / "bank", entries)
    path = write_protocol(tmp_path, bank=bank, **changes)
    in_phase = [kvpatch("plan", path, "--model", model_dir, "--seed", seed) for seed in range(4)]
    assert {outcome.code for outcome in in_phase} <= {0, 2}
    assert any(outcome.code == 2 for outcome in in_phase)
    for outcome in in_phase:
        if outcome.code:
            assert_one_line(outcome, f"slot {lengths[0]} does not exist: there are {lengths[0]}")


def test_head_shuffle_on_one_kv_head(kvpatch, tmp_path, tiny, monkeypatch):
    from dataclasses import replace

    from kvpatch.errors import ProtocolError
    from kvpatch.planned import plan_for
    from kvpatch.planning.fit import refuse_misfits
    from kvpatch.prompts.bank import load_bank
    from kvpatch.protocols.load import load_protocol

    model = tiny("llama")
    protocol = load_protocol(str(write_protocol(tmp_path, **with_patch({"donor": "shuffle_heads"}))))
    plan, _ = plan_for({None: model}, protocol, load_bank(protocol.bank), seed=0, n=None, phases=None)
    with pytest.raises(ProtocolError, match=r"condition X .* one KV head"):
        refuse_misfits(plan.drafts, replace(model.geometry, kv_heads=1), model.encode, model.continuation_ids, 10)


def test_keys_that_would_have_to_move_and_can_t(kvpatch, tmp_path, tiny_dirs):
    """GPT-2's positions are in its embeddings."""
    path = write_protocol(tmp_path, **with_patch({"slots": "body", "align": "stretch"}))
    outcome = kvpatch("run", path, "--model", tiny_dirs("gpt2"), "--out", tmp_path / "out")
    assert_one_line(outcome, "condition X")
    assert not (tmp_path / "out").exists()


def test_cache_that_grows_past_the_context(kvpatch, model_dir, tmp_path):
    generation = {"max_new_tokens": 215}
    fits = write_protocol(tmp_path, **with_patch({"align": "end"}), generation=generation)
    assert kvpatch("plan", fits, "--model", model_dir).code == 0
    grows = write_protocol(tmp_path, **with_patch({"align": "append"}), generation=generation)
    assert_one_line(kvpatch("plan", grows, "--model", model_dir), "condition X", "more than the context, 256")


def test_replace_on_a_subset_of_layers(kvpatch, model_dir, tmp_path):
    path = write_protocol(tmp_path, **with_patch({"layers": [1], "align": "replace"}))
    outcome = kvpatch("run", path, "--model", model_dir, "--out", tmp_path / "out")
    assert_one_line(outcome, "small.yaml, line ", "conditions.X.patch", "needs all layers", "use align='start'")


def edited_bank(folder: Path, text: str) -> Path:
    entries = bank_entries()
    entries[3]["text"] = text
    return write_bank(folder, entries)


@pytest.mark.parametrize("text", ["", " "])
def test_empty_prompt_in_a_bank(kvpatch, model_dir, tmp_path, text):
    path = write_protocol(tmp_path, bank=edited_bank(tmp_path / "bank", text))
    outcome = kvpatch("run", path, "--model", model_dir, "--out", tmp_path / "out")
    assert_one_line(outcome, "bank.yaml, entry 4, text")
    assert not (tmp_path / "out").exists()


def test_prompt_longer_than_the_context(kvpatch, model_dir, tmp_path):
    path = write_protocol(tmp_path, bank=edited_bank(tmp_path / "bank", "word " * 300))
    outcome = kvpatch("run", path, "--model", model_dir, "--out", tmp_path / "out")
    assert_one_line(outcome, "the longest prompt has", "context is 256")
    assert not (tmp_path / "out").exists()


def test_n_larger_than_the_bank(kvpatch, model_dir, tmp_path):
    outcome = kvpatch("run", write_protocol(tmp_path), "--model", model_dir, "--n", 6, "--out", tmp_path / "out")
    assert_one_line(outcome, "wants n=6", "gives 5 pairs")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"generation": {"max_new_tokens": "many"}}, "generation.max_new_tokens"),
        ({"phases": ["1"]}, "phases"),
        ({"readouts": {"lexicon": "klingon"}}, "no lexicon 'klingon'"),
        ({"readouts": {"r_v": {"late": 77}}}, "layer 77 does not exist"),
        ({"bank": "nowhere"}, "no prompt bank 'nowhere'"),
    ],
)
def test_wrong_value_in_the_protocol(kvpatch, model_dir, tmp_path, changes, words):
    path = write_protocol(tmp_path, **changes)
    assert_one_line(kvpatch("run", path, "--model", model_dir, "--out", tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--dtype", "float31", "no dtype 'float31'"),
        ("--device", "abacus", "abacus"),
        ("--phases", "9", "no phase '9'"),
        ("--on", "moon", "no executor 'moon'"),
    ],
)
def test_wrong_value_of_an_option(kvpatch, model_dir, tmp_path, option, value, words):
    outcome = kvpatch("run", write_protocol(tmp_path), "--model", model_dir, "--out", tmp_path / "out", option, value)
    assert_one_line(outcome, words)
    assert not (tmp_path / "out").exists()


def test_output_below_a_file(kvpatch, model_dir, tmp_path):
    (tmp_path / "file").touch()
    outcome = kvpatch("run", write_protocol(tmp_path), "--model", model_dir, "--out", tmp_path / "file" / "run")
    assert_one_line(outcome, "can't be written", "is a file")


def test_read_only_output_directory(kvpatch, model_dir, tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", folder], capture_output=True)
        if made.returncode:
            pytest.skip(f"mounting is not permitted here: {made.stderr.decode().strip()}")
        try:
            outcome = kvpatch("run", write_protocol(tmp_path), "--model", model_dir, "--out", Path(folder) / "run")
        finally:
            subprocess.run(["umount", folder], check=True)
    assert_one_line(outcome, "can't be written", "read-only")


@pytest.mark.parametrize("command", ["status", "verdicts", "report"])
def test_directory_that_is_no_run(kvpatch, tmp_path, command):
    assert_one_line(kvpatch(command, tmp_path / "none"), "is not a run directory")
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_an_error_came_from(tmp_path):
    arguments = [sys.executable, "-m", "kvpatch", "--debug", "status", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback (most recent call last)" in done.stderr
    assert "StoreError" in done.stderr


# A whole run


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory) -> tuple[Path, Path]:
    """A protocol of several batches, and the directory of a run of it that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    protocol = write_protocol(folder, generation={"max_new_tokens": 10, "samples": 4})
    done = subprocess.run(
        [sys.executable, "-m", "kvpatch", "run", protocol, "--model", model_dir, "--out", folder / "run"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {(folder / 'run' / 'report.html').resolve()}"
    return protocol, folder / "run"


@pytest.fixture
def copied(finished, tmp_path) -> tuple[Path, Path]:
    """The same, to be changed."""
    protocol, directory = finished
    shutil.copytree(directory, tmp_path / "copied")
    return protocol, tmp_path / "copied"


def test_whole_run_ends_with_every_file(finished):
    _, directory = finished
    assert {"run.json", "parts.jsonl", "verdicts.json", "report.html"} <= snapshot(directory).keys()
    record = Store(directory).read_record()
    assert record.finished is not None
    assert record.check is not None
    assert record.coherence_limits is not None
    assert Store(directory).read().num_rows == record.planned == 4 * (13 * 5 + 2 * 3)
    assert "<html" in (directory / "report.html").read_text()


def test_stored_verdicts_are_those_of_the_verdicts_command(kvpatch, finished):
    _, directory = finished
    stored = (directory / "verdicts.json").read_text()
    outcome = kvpatch("verdicts", directory, "--json")
    assert outcome.code == 0
    assert outcome.out == stored
    found = {v["id"]: v["verdict"] for v in json.loads(stored)}
    assert found.keys() == {"exists", "seed", "transfer"}
    assert found["seed"] == "tautological"


def test_json_of_every_command_parses(kvpatch, finished, model_dir):
    protocol, directory = finished
    for arguments in (
        ("plan", protocol, "--model", model_dir),
        ("status", directory),
        ("verdicts", directory),
        ("check", model_dir),
        ("bank", "recursion", "--model", model_dir),
        ("models",),
    ):
        outcome = kvpatch(*arguments, "--json")
        assert outcome.code == 0, outcome
        assert json.loads(outcome.out), arguments


def test_status_counts_trials(kvpatch, finished):
    _, directory = finished
    status = json.loads(kvpatch("status", directory, "--json").out)
    assert (status["done"], status["left"], status["failed"]) == (284, 0, 0)
    assert status["state"] == "finished" and sum(phase["done"] for phase in status["phases"]) == 284
    assert "finished" in kvpatch("status", directory).out


def test_plan_says_what_the_run_did(kvpatch, finished, model_dir):
    protocol, directory = finished
    plan = json.loads(kvpatch("plan", protocol, "--model", model_dir, "--json").out)
    assert plan["trials"] == Store(directory).read().num_rows
    assert plan["phases"]["1"]["experiment"] == 3 * 5 * 4


def test_tables_are_printed_without_json(kvpatch, finished, model_dir):
    protocol, directory = finished
    for arguments in (("plan", protocol, "--model", model_dir), ("status", directory), ("verdicts", directory)):
        outcome = kvpatch(*arguments)
        assert outcome.code == 0
        assert outcome.out.strip()


def test_verdicts_report_and_status_need_no_torch(finished, tmp_path):
    """On a machine that has neither torch nor transformers."""
    _, directory = finished
    shutil.copytree(directory, tmp_path / "run")
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers'):\n"
        "            raise ModuleNotFoundError(f'no {name} here', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from kvpatch.cli.main import app\n"
        "directory = sys.argv[1]\n"
        "for arguments in (['status', directory], ['verdicts', directory], ['report', directory, '-o', sys.argv[2]]):\n"
        "    app(arguments, standalone_mode=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "page.html")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "verdicts.json").read_bytes() == (directory / "verdicts.json").read_bytes()
    assert (tmp_path / "page.html").read_bytes() == (directory / "report.html").read_bytes()


def test_running_again_changes_no_trial(kvpatch, copied, model_dir):
    protocol, directory = copied
    before = snapshot(directory)
    assert kvpatch("run", protocol, "--model", model_dir, "--out", directory).code == 0
    after = snapshot(directory)
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed <= {"run.json", "report.html"}


def test_a_run_ends_with_the_effects_of_its_phase_or_says_where_those_of_several_are(
    kvpatch, copied, model_dir, tmp_path
):
    protocol, directory = copied
    table = "difference from the natural run"
    assert table in kvpatch("run", protocol, "--model", model_dir, "--out", directory).out
    phase = {"question": "?", "n": 3, "conditions": ["A", "B", "C"]}
    several = write_protocol(tmp_path, phases={"1": phase, "2": phase}, hypotheses=[])
    outcome = kvpatch("run", several, "--model", model_dir, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert table not in outcome.out
    assert f"effects: kvpatch effects {tmp_path / 'run'}" in outcome.out.splitlines()
    assert table in kvpatch("effects", tmp_path / "run").out


def test_directory_of_another_seed_model_or_protocol_is_left_alone(kvpatch, copied, model_dir, tiny_dirs, tmp_path):
    protocol, directory = copied
    before = snapshot(directory)
    other = yaml.safe_load(protocol.read_text()) | {"title": "Another"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    for arguments, words in (
        ((protocol, "--model", model_dir, "--seed", 1), "seed 0"),
        ((protocol, "--model", model_dir, "--n", 3), "n=as planned"),
        ((protocol, "--model", tiny_dirs("qwen2")), "another model"),
        ((protocol, "--model", tiny_dirs("llama", False)), "another model"),
        ((tmp_path / "other.yaml", "--model", model_dir), "another protocol"),
    ):
        outcome = kvpatch("run", *arguments, "--out", directory)
        assert_one_line(outcome, "belongs to another run", words, "another --out")
    assert snapshot(directory) == before


def test_directory_of_something_else_is_left_alone(kvpatch, finished, model_dir, tmp_path):
    protocol, _ = finished
    (tmp_path / "thesis.tex").write_text("years of work")
    outcome = kvpatch("run", protocol, "--model", model_dir, "--out", tmp_path)
    assert_one_line(outcome, "holds other files")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_truncated_part_is_named_and_nothing_is_lost(kvpatch, copied, model_dir):
    protocol, directory = copied
    part = sorted((directory / "trials").glob("1-*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:1000])
    before = snapshot(directory)
    for arguments in (
        ("run", protocol, "--model", model_dir, "--out", directory),
        ("status", directory),
        ("verdicts", directory),
        ("report", directory),
    ):
        outcome = kvpatch(*arguments)
        outcome = outcome._replace(err=outcome.err.replace("running (284 trials)\n", ""))
        assert_one_line(outcome, part.name)
    changed = {name for name, digest in snapshot(directory).items() if before.get(name) != digest}
    assert changed <= {"run.json"}
    # What the message says to do helps.
    index = directory / "parts.jsonl"
    kept = [line for line in index.read_text().splitlines() if json.loads(line)["part"] != part.name]
    index.write_text("\n".join(kept) + "\n")
    assert kvpatch("run", protocol, "--model", model_dir, "--out", directory).code == 0
    assert trials(directory) == trials(Path(protocol).parent / "run")


@pytest.mark.parametrize("damaged", ["two parts", "the record", "the index"])
def test_repaired_run_ends_as_one_that_was_never_damaged(kvpatch, copied, model_dir, damaged):
    protocol, directory = copied
    parts = sorted((directory / "trials").glob("1-*.parquet"))[:2]
    before = (directory / "verdicts.json").read_bytes()
    if damaged == "two parts":
        parts[0].write_bytes(parts[1].read_bytes())
        parts[1].unlink()
    elif damaged == "the record":
        (directory / "run.json").write_text("{")
    else:
        lines = (directory / "parts.jsonl").read_text().splitlines()
        (directory / "parts.jsonl").write_text("\n".join(["null", *lines[1:]]) + "\n")
    refused = kvpatch("verdicts", directory)
    assert_one_line(refused, "kvpatch repair")
    repaired = kvpatch("repair", directory)
    assert (repaired.code, repaired.err) == (0, "")
    if damaged == "two parts":
        assert all(part.name in repaired.out for part in parts)
    assert "is computed again by" in repaired.out
    assert kvpatch("run", protocol, "--model", model_dir, "--out", directory).code == 0
    assert trials(directory) == trials(Path(protocol).parent / "run")
    assert (directory / "verdicts.json").read_bytes() == before


def test_trials_without_a_record_are_not_taken_up_by_another_run(kvpatch, copied, model_dir):
    protocol, directory = copied
    (directory / "run.json").write_text("{")
    assert kvpatch("repair", directory).code == 0
    before = snapshot(directory)
    outcome = kvpatch("run", protocol, "--model", model_dir, "--seed", 5, "--out", directory)
    assert outcome.code == 2 and "is not one of this run" in outcome.err
    assert snapshot(directory) == before


def test_edited_protocol_in_the_record_is_refused(kvpatch, copied):
    """The hypotheses were fixed before the first trial."""
    _, directory = copied
    record = json.loads((directory / "run.json").read_text())
    record["protocol"]["hypotheses"][0]["alpha"] = 0.5
    (directory / "run.json").write_text(json.dumps(record))
    before = snapshot(directory)
    for command in ("verdicts", "report"):
        assert_one_line(kvpatch(command, directory), "was changed after the run")
    assert snapshot(directory) == before
    marked = kvpatch("verdicts", directory, "--exploratory", "--json")
    assert [v["confirmatory"] for v in json.loads(marked.out)] == [False] * 3
    assert snapshot(directory) == before


def test_another_protocol_decides_a_run_only_as_exploratory(kvpatch, copied, tmp_path):
    _, directory = copied
    hypotheses = [h | {"alpha": 0.5} for h in protocol_content("x")["hypotheses"]]
    other = write_protocol(tmp_path, bank=tmp_path / "bank", hypotheses=hypotheses)
    before = snapshot(directory)
    assert_one_line(kvpatch("verdicts", directory, "--protocol", other), "--exploratory")
    marked = json.loads(kvpatch("verdicts", directory, "--protocol", other, "--exploratory", "--json").out)
    assert [(v["alpha"], v["confirmatory"]) for v in marked] == [(0.5, False)] * 3
    assert snapshot(directory) == before


def test_schema_of_protocols_is_the_one_in_the_documents(kvpatch):
    told = json.loads(kvpatch("schema").out)
    stored = Path(__file__).parents[1] / "docs" / "protocol.schema.json"
    assert told == json.loads(stored.read_text()), "kvpatch schema > docs/protocol.schema.json"
    assert {"conditions", "phases", "hypotheses"} <= set(told["required"])


# Killed


@pytest.mark.parametrize(("seed", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (2, signal.SIGINT)])
def test_run_killed_at_random_moments_ends_as_one_that_was_not(kvpatch, finished, model_dir, tmp_path, seed, how):
    protocol, undisturbed = finished
    out = tmp_path / "run"
    arguments = ["run", str(protocol), "--model", str(model_dir), "--out", str(out)]
    rng = random.Random(seed)
    process = subprocess.Popen(
        [sys.executable, "-m", "kvpatch", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    with process:
        wanted = rng.choice([0, 1, 2])  # parts stored before the blow, which then falls within the next
        deadline = time.monotonic() + 60
        while (
            len(Store(out).parts() if (out / "run.json").exists() else []) < wanted or not (out / "run.json").exists()
        ):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.random() * 0.2)
        process.send_signal(how)
        _, error = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    if how == signal.SIGINT:
        assert "Traceback" not in error
        assert error.splitlines()[-1].startswith("kvpatch: stopped; what was stored is kept")
    assert len(Store(out).parts()) < len(Store(undisturbed).parts())
    assert kvpatch(*arguments).code == 0
    assert trials(out) == trials(undisturbed)
    assert (out / "verdicts.json").read_bytes() == (undisturbed / "verdicts.json").read_bytes()


def test_a_second_run_in_the_same_directory_is_refused(kvpatch, copied, model_dir):
    protocol, directory = copied
    with Store(directory).locked():
        outcome = kvpatch("run", protocol, "--model", model_dir, "--out", directory)
    assert_one_line(outcome, "in use by another kvpatch process")


def test_conditions_of_the_small_protocol_are_all_run(finished):
    _, directory = finished
    table = Store(directory).read().to_pandas()
    assert set(table["condition"]) == CONDITIONS.keys()
    assert protocol_content("x")["phases"]["1"]["n"] == table[table["split"] == "test"]["pair_id"].nunique()
