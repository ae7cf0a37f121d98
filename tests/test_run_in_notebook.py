"""`kv.run` carries out a protocol from Python, as the command line does."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import kvpatch as kv
from small import write_protocol


def test_it_gives_the_run_and_does_not_run_twice(tiny, tmp_path: Path) -> None:
    protocol = write_protocol(tmp_path, hypotheses=[])
    threads = torch.get_num_threads()
    run = kv.run(protocol, tiny("llama"), tmp_path / "out", n=2, phases=1, seed=3)
    assert isinstance(run, kv.Run) and (tmp_path / "out" / "report.html").exists()
    assert len(run.trials("pandas")) > 0 and run.record.seed == 3 and torch.get_num_threads() == threads
    again = kv.run(str(protocol), tiny("llama"), out=tmp_path / "out", n=2, phases=["1"], seed=3)
    assert len(again.trials()) == len(run.trials())


def test_a_model_from_memory_is_run_and_leaves_no_path(tiny_dirs, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = tiny_dirs("llama")
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where)
    model = kv.load(model=hf.float(), tokenizer=tokenizer)
    run = kv.run(write_protocol(tmp_path, hypotheses=[]), model, tmp_path / "out", n=2)
    assert run.record.model.name == "llama" and str(where) not in (tmp_path / "out" / "run.json").read_text()


def test_mistakes_are_told_before_anything_is_written(tiny, tmp_path: Path) -> None:
    protocol, out = write_protocol(tmp_path), tmp_path / "out"
    for given, told in [
        (("nothing", tiny("llama"), out), "no protocol 'nothing'"),
        ((protocol, 3, out), "must be a Model of kv.load or a name"),
        ((protocol, tiny("llama").hf, out), "got a LlamaForCausalLM"),
    ]:
        with pytest.raises(kv.KvpatchError, match=told) as caught:
            kv.run(*given)
        assert "\n" not in str(caught.value)
    for settings, told in [({"n": 0}, "at least 1"), ({"n": 1.5}, "whole number"), ({"phases": "9"}, "no phase '9'")]:
        with pytest.raises(kv.ProtocolError, match=told):
            kv.run(protocol, tiny("llama"), out, **settings)
    assert not out.exists()


def test_the_module_of_that_name_is_still_one() -> None:
    import kvpatch.run
    from kvpatch.run import run

    assert callable(run) and kvpatch.run is kv.run
    assert list(inspect.signature(kv.run).parameters)[:3] == ["protocol", "model", "out"]
    assert {"run", "load", "logit_difference", "LayerAt", "Sweep"} <= set(dir(kv))
