"""What a loaded model remembers of its prompts, and what of them a run's record holds."""

from __future__ import annotations

import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from known_templates import GEMMA, LLAMA32
from test_template_faults import BAD, PARTS
from tokenizers import processors
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

import kvpatch as kv
from kvpatch.cli import main as cli
from kvpatch.errors import ModelError, StoreError
from kvpatch.executors.host import model_record
from kvpatch.planned import plan_for
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.load import load_protocol
from kvpatch.run import ProgressListener, run
from kvpatch.store.directory import Store
from small import CONDITIONS, write_protocol
from tiny import CHATML, tiny_hf, tiny_tokenizer

pytestmark = pytest.mark.model


class Clock(datetime):
    """A clock that a test sets."""

    moment = datetime(2024, 7, 26, 23, 59)

    @classmethod
    def now(cls, tz=None):
        return cls.moment


@pytest.fixture
def clock(monkeypatch) -> type[Clock]:
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(Clock, "moment", datetime(2024, 7, 26, 23, 59))
    return Clock


@pytest.fixture(scope="module")
def dated(tmp_path_factory) -> Path:
    """A tiny model whose template writes the date."""
    out = tmp_path_factory.mktemp("dated")
    tiny_hf("llama").save_pretrained(out)
    tiny_tokenizer(LLAMA32).save_pretrained(out)
    return out


@pytest.fixture
def model(tiny_dirs) -> kv.Model:
    """A model of one's own, whose tokenizer may be changed."""
    return kv.load(tiny_dirs("llama"), device="cpu")


def text_of(model: kv.Model, words: str) -> str:
    return "".join(model.encode(words).pieces)


# --- what is remembered ---


def test_prompts_that_would_be_one_cache_are_refused(model):
    model.tokenizer.chat_template = PARTS
    with pytest.raises(ModelError, match="drops the user's words: it expects content as a list of parts") as raised:
        model.prefill("Explain how bread rises.")
    assert str(model.loaded.name) in str(raised.value)
    raw = model.prefill("Explain how bread rises.", chat=False)
    assert raw.checksums() != model.prefill("Watch yourself write this.", chat=False).checksums()


def test_a_changed_template_is_seen(model):
    before = text_of(model, "bread")
    model.tokenizer.chat_template = GEMMA
    assert text_of(model, "bread") == "<s><start_of_turn>user\nbread<end_of_turn>\n<start_of_turn>model\n"
    model.tokenizer.chat_template = CHATML
    assert text_of(model, "bread") == before


def test_a_changed_special_token_is_seen(model):
    model.tokenizer.chat_template = GEMMA
    assert text_of(model, "bread").startswith("<s>")
    model.tokenizer.bos_token = "<pad>"
    assert text_of(model, "bread").startswith("<pad>")


def test_added_tokens_and_another_tokenizer_are_seen(model):
    ids, continuation = model.encode("bread rises").token_ids, model.continuation_ids("bread rises")
    model.tokenizer.add_tokens(["bread rises"])
    assert len(model.encode("bread rises").token_ids) < len(ids)
    assert len(model.continuation_ids("bread rises")) < len(continuation)
    model.tokenizer = tiny_tokenizer(CHATML)
    assert (model.encode("bread rises").token_ids, model.continuation_ids("bread rises")) == (ids, continuation)


def test_a_changed_post_processor_is_seen(model):
    text = "bread rises"
    ids = model.encode(text, chat=False).token_ids
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    assert model.encode(text, chat=False).token_ids == (*ids[1:], 2) == tuple(model.tokenizer(text)["input_ids"])


def test_a_run_past_midnight_keeps_the_date_it_began_with(dated, clock):
    model = kv.load(dated, device="cpu")
    first = text_of(model, "bread")
    clock.moment += timedelta(hours=1)
    assert text_of(model, "rises") == first.replace("bread", "rises")
    assert "26 Jul 2024" in first
    assert "27 Jul 2024" in text_of(kv.load(dated, device="cpu"), "rises")


# --- what a run records ---


def test_the_record_holds_the_hash_of_what_the_template_writes(model):
    assert model.scaffold is not None
    assert model_record(model).scaffold_sha256 == model.scaffold.sha256
    model.tokenizer.chat_template = None
    assert model_record(model).scaffold_sha256 is None


@pytest.fixture
def protocol(tmp_path) -> Path:
    conditions = {name: CONDITIONS[name] for name in ("A", "B")}
    phases = {"1": {"question": "?", "n": 3, "conditions": ["A", "B"]}}
    return write_protocol(tmp_path, conditions=conditions, phases=phases, hypotheses=[])


def test_a_record_is_the_same_on_one_day_and_another_on_the_next(dated, clock):
    first = model_record(kv.load(dated, device="cpu"))
    assert model_record(kv.load(dated, device="cpu")) == first
    clock.moment += timedelta(days=1)
    later = model_record(kv.load(dated, device="cpu"))
    assert later.scaffold_sha256 != first.scaffold_sha256
    assert later.template_sha256 == first.template_sha256


class Stopping(ProgressListener):
    """Stops a run whose record is written and whose first trial is not."""

    def stage(self, what: str) -> None:
        if what == "running":
            raise KeyboardInterrupt


def test_a_run_is_not_resumed_on_another_day(dated, protocol, tmp_path, clock):
    chosen, out = load_protocol(protocol), tmp_path / "out"
    for _ in range(2):  # on its own day it is
        with pytest.raises(KeyboardInterrupt):
            run(chosen, {None: kv.load(dated, device="cpu")}, out, listener=Stopping())
    clock.moment += timedelta(days=1)
    with pytest.raises(StoreError, match="renders other words around the prompt than when the run began"):
        run(chosen, {None: kv.load(dated, device="cpu")}, out, listener=Stopping())
    assert Store(out).read_record().model.scaffold_sha256


def test_plan_warns_of_a_template_that_writes_the_date(dated, protocol, tiny_dirs, monkeypatch, capsys):
    said = {}
    for where in (dated, tiny_dirs("llama")):
        monkeypatch.setattr(sys, "argv", ["kvpatch", "plan", str(protocol), "--model", str(where), "--no-timing"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        said[where] = [line for line in capsys.readouterr().err.splitlines() if "chat template" in line]
    assert said[tiny_dirs("llama")] == []
    assert len(said[dated]) == 1
    assert said[dated][0].startswith(f"warning: the chat template of {dated} writes the date or time")


@pytest.mark.parametrize("fault", ["iterates over parts", "upper", "random", "syntax"])
def test_a_template_at_fault_ends_the_command_in_one_line(fault, dated, protocol, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in dated.iterdir():
        (broken / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(dated)
    tokenizer.chat_template = BAD[fault][0]
    for file in [*broken.glob("tokenizer*"), *broken.glob("*.jinja")]:
        file.unlink()
    tokenizer.save_pretrained(broken)
    for arguments in (["plan", str(protocol), "--model", str(broken)], ["check", str(broken)]):
        monkeypatch.setattr(sys, "argv", ["kvpatch", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        assert (stopped.value.code, printed.out) == (2, "")
        lines = [line for line in printed.err.splitlines() if line.startswith("kvpatch: ")]
        assert lines == [printed.err.splitlines()[-1]] and f"the chat template {BAD[fault][1]}" in lines[0]


def test_a_plan_of_a_template_at_fault_is_refused_before_anything_is_written(model, protocol):
    model.tokenizer.chat_template = BAD["twice"][0]
    chosen = load_protocol(protocol)
    with pytest.raises(ModelError, match="writes the user's words 2 times"):
        plan_for({None: model}, chosen, load_bank(chosen.bank, chosen.folder), seed=0, n=None, phases=None)
