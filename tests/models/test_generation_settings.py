"""A model's generation settings say nothing about how kvpatch runs it: they neither change texts nor refuse a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, WatermarkingConfig

import kvpatch as kv
from kvpatch.checks.identities import check
from kvpatch.errors import ModelError
from kvpatch.models.probe import native_greedy

pytestmark = pytest.mark.model

PROMPT = "how bread rises in a warm oven"
GREEDY = "own decoding gives transformers' greedy text"
MANY = list(range(5, 200))
SETTINGS: dict[str, dict[str, Any]] = {
    "penalty": {"repetition_penalty": 1.3},
    "n-grams": {"no_repeat_ngram_size": 1},
    "beams": {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    "stop strings": {"stop_strings": ["e", "a"]},
    "least length": {"min_length": 100, "min_new_tokens": 50},
    "most length": {"max_length": 3, "max_time": 1e-9},
    "forced tokens": {"forced_bos_token_id": 7, "forced_eos_token_id": 9},
    "suppressed tokens": {"suppress_tokens": MANY, "begin_suppress_tokens": MANY},
    "bad words": {"bad_words_ids": [[token] for token in MANY]},
    "bias": {"sequence_bias": [[[5], 10.0]]},
    "dictionaries": {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "several sequences": {"num_return_sequences": 2},
    "several beams": {"num_return_sequences": 3, "num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "early exit": {"assistant_early_exit": 2},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "unknown cache": {"cache_implementation": "of the future"},
    "watermark": {"watermarking_config": {"bias": 2.5, "seeding_scheme": "lefthash"}},
    "guidance": {"guidance_scale": 3.0},
    "layers": {"dola_layers": "low"},
    "sampling": {"do_sample": True, "temperature": 0.1, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
    "compilation": {"compile_config": {"mode": "default"}},
    "unknown": {"from_the_future": {"a": 1}, "repetition_penalty": "high"},
}


@pytest.fixture
def with_settings(tiny_dirs: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`with_settings(settings)`: the directory of a tiny model that has these generation settings too."""

    def make(settings: dict[str, Any] | str, config: dict[str, Any] | None = None) -> Path:
        out = tmp_path / "model"
        shutil.copytree(tiny_dirs("llama"), out)
        path = out / "generation_config.json"
        if isinstance(settings, str):
            path.write_text(settings)
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        path = out / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
        return out

    return make


def _text(model: kv.Model) -> list[int]:
    return model.generate(model.prefill(PROMPT), max_new_tokens=8, temperature=0, stop=False).token_ids[0].tolist()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_with_settings_is_run_as_without_them(name: str, with_settings, tiny):
    model = kv.load(with_settings(SETTINGS[name]), device="cpu")
    assert _text(model) == _text(tiny("llama"))
    found = {identity.identity: identity.holds for identity in check(model)}
    assert found[GREEDY] is True
    assert False not in found.values()


@pytest.mark.parametrize("settings", ["no json", "[]", "{}", "null", '"text"'])
def test_a_file_without_settings_is_no_reason_to_refuse_a_model(settings: str, with_settings, tiny):
    model = kv.load(with_settings(settings), device="cpu")
    assert _text(model) == _text(tiny("llama"))
    assert model.end_tokens == [2]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1},
        {"num_beams": 4, "num_return_sequences": 4},
        {"return_dict_in_generate": True},
        {"compile_config": CompileConfig(), "cache_implementation": "static"},
        {"watermarking_config": WatermarkingConfig(bias=9.0)},
        {"stop_strings": ["e"]},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_settings_given_later_do_not_reach_the_reference(settings: dict[str, Any], tiny_dirs):
    model = kv.load(tiny_dirs("llama"), device="cpu")
    ids = list(model.encode(PROMPT).token_ids)
    expected = native_greedy(model.hf, ids, 8)
    model.hf.generation_config = GenerationConfig(**settings)
    assert native_greedy(model.hf, ids, 8) == expected
    model.hf.generation_config = None
    assert native_greedy(model.hf, ids, 8) == expected


def test_the_reference_is_what_transformers_generates(tiny):
    model = tiny("llama")
    ids = torch.tensor([model.encode(PROMPT).token_ids])
    clean = GenerationConfig(max_new_tokens=10, do_sample=False, pad_token_id=0)
    generated = model.hf.generate(ids, attention_mask=torch.ones_like(ids), generation_config=clean)
    assert native_greedy(model.hf, ids[0].tolist(), 10)[: generated.shape[1] - ids.shape[1]] == (
        generated[0, ids.shape[1] :].tolist()
    )


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (7, [7]),
        ([7, 9], [7, 9]),
        ((7,), [7]),
        (torch.tensor([7, 9]), [7, 9]),
        (torch.tensor(7), [7]),
        ([], [2]),
        (None, [2]),
        (-1, [2]),
    ],
    ids=str,
)
def test_end_tokens_are_those_of_the_settings_or_else_the_configuration_s(named: Any, expected: list[int], tiny_dirs):
    model = kv.load(tiny_dirs("llama"), device="cpu")
    model.hf.generation_config.eos_token_id = named
    assert model.end_tokens == expected


def test_end_tokens_without_any_settings_are_the_tokenizer_s(tiny_dirs):
    model = kv.load(tiny_dirs("llama"), device="cpu")
    model.hf.generation_config = None
    assert model.end_tokens == [2]
    model.hf.config.eos_token_id = None
    model.tokenizer.eos_token = "<|im_end|>"
    assert model.end_tokens == [4]
    model.tokenizer.eos_token = None
    assert model.end_tokens == []


@pytest.mark.parametrize("named", ["</s>", [2, "</s>"], 2.5, True])
def test_an_end_token_that_is_no_token_id_is_refused(named: Any, tiny_dirs):
    model = kv.load(tiny_dirs("llama"), device="cpu")
    model.hf.generation_config.eos_token_id = named
    with pytest.raises(ModelError, match=r"names .* as the token that ends a reply"):
        _ = model.end_tokens


def test_end_tokens_of_the_settings_are_loaded(with_settings):
    assert kv.load(with_settings({"eos_token_id": [2, 9]}), device="cpu").end_tokens == [2, 9]
