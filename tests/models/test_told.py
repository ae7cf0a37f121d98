"""Models that lie: refused in one line that says what is wrong, in which file, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvpatch as kv
from kvpatch.cli.app import with_flags
from kvpatch.errors import ModelError
from kvpatch.executors.host import model_record
from kvpatch.planning.listener import ProgressListener
from kvpatch.readiness import checked
from tiny import CHATML, tiny_model_dir, tiny_tokenizer

pytestmark = pytest.mark.model


def _set(file: str, **settings: Any) -> Callable[[Path], None]:
    def change(where: Path) -> None:
        content = json.loads((where / file).read_text())
        (where / file).write_text(json.dumps(content | settings))

    return change


def _cut(where: Path) -> None:
    path = where / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])


def _without_tokenizer(where: Path) -> None:
    for path in where.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("config.json", num_key_value_heads=4), "k_proj.weight [32, 48] where the model has [64, 48]"),
        (_set("config.json", vocab_size=300), "model.embed_tokens.weight [384, 48] where the model has [300, 48]"),
        (_set("config.json", hidden_act="bogus"), "config.json says hidden_act: 'bogus', which transformers"),
        (_set("config.json", model_type="bogus"), "config.json names the model_type 'bogus'"),
        (_set("config.json", dtype="bogus"), "config.json says dtype: 'bogus'"),
        (
            _set("config.json", rope_parameters={"rope_type": "default", "rope_theta": None}),
            "of its config.json (TypeError",
        ),
        (_set("config.json", num_attention_heads=0), "of its config.json (ZeroDivisionError"),
        (_cut, "model.safetensors is cut short or damaged"),
        (_without_tokenizer, "it has no tokenizer that can be read"),
    ],
)
def test_a_lie_is_named_in_one_line(change: Callable[[Path], None], words: str, tmp_path: Path):
    where = tiny_model_dir("llama", tmp_path)
    change(where)
    with pytest.raises(ModelError) as error:
        kv.load(where, device="cpu")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_names_no_end_is_refused_before_any_trial(tmp_path: Path):
    where = tiny_model_dir("llama", tmp_path)
    for file in ("config.json", "generation_config.json"):
        _set(file, eos_token_id=None)(where)
    _set("tokenizer_config.json", eos_token=None)(where)
    model = kv.load(where, device="cpu")
    with pytest.raises(ModelError, match="names no token that ends a reply"):
        checked(model, model_record(model), {}, ProgressListener())


def test_another_model_s_tokenizer_is_refused_and_one_with_a_token_more_is_not(tmp_path: Path):
    where = tiny_model_dir("llama", tmp_path)
    more = tiny_tokenizer(CHATML)
    more.add_special_tokens({"pad_token": "<|another pad|>"})
    more.save_pretrained(where)
    kv.load(where, device="cpu")
    small = kv.load(where, device="cpu").hf
    small.resize_token_embeddings(200)
    with pytest.raises(ModelError, match="the model embeddings for 200"):
        kv.load(model=small, tokenizer=tiny_tokenizer(CHATML))


def test_the_command_line_names_its_own_options():
    assert with_flags("x (allow_pickle=True reads them)") == "x (--allow-pickle reads them)"
    assert with_flags("trust_remote_code=True runs it") == "--trust-remote-code runs it"
