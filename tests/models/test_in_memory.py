"""A model that is already in memory is patched like one from disk, and refused for the same reasons."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kvpatch as kv
from tiny import CHATML, tiny_hf, tiny_tokenizer

PROMPTS = ["Explain how bread rises.", "Watch yourself write this."]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_model_in_memory_gives_the_caches_of_the_one_on_disk(tiny, architecture: str) -> None:
    hf = tiny_hf(architecture)
    model = kv.load(model=hf, tokenizer=tiny_tokenizer(CHATML))
    assert model.hf is hf
    expected = tiny(architecture).prefill(PROMPTS)
    found = model.prefill(PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(found.keys, expected.keys, strict=True))
    assert (
        model.generate(found, max_new_tokens=4).texts == tiny(architecture).generate(expected, max_new_tokens=4).texts
    )


def test_it_is_named_without_a_path() -> None:
    hf = tiny_hf("llama")
    assert kv.load(model=hf, tokenizer=tiny_tokenizer()).loaded.name == "LlamaForCausalLM"
    for origin in ("/home/someone/models/llama-7b/", "owner/llama-7b", "C:\\models\\llama-7b"):
        hf.config._name_or_path = origin
        assert kv.load(model=hf, tokenizer=tiny_tokenizer()).loaded.name == "llama-7b"


def _refusal(*args: object, **given: object) -> str:
    with pytest.raises(kv.ModelError) as caught:
        kv.load(*args, **given)  # type: ignore[arg-type]
    told = str(caught.value)
    assert "\n" not in told and len(told) < 300
    return told


def test_mistakes_are_told_in_one_line() -> None:
    hf, tokenizer = tiny_hf("llama"), tiny_tokenizer()
    assert "kv.load(model=hf_model, tokenizer=tokenizer)" in _refusal(hf)
    assert "kv.load(model=" in _refusal(hf, tokenizer=tokenizer)
    assert "needs its tokenizer" in _refusal(model=hf)
    assert "must be a transformers model, got a Linear" in _refusal(model=nn.Linear(2, 2), tokenizer=tokenizer)
    assert "must be a transformers model, got str 'gpt2'" in _refusal(model="gpt2", tokenizer=tokenizer)
    assert "must be a transformers tokenizer" in _refusal(model=hf, tokenizer="gpt2")
    assert "no model is named" in _refusal()
    assert "one of the two" in _refusal("llama", model=hf, tokenizer=tokenizer)
    assert "goes with a model in memory" in _refusal("llama", tokenizer=tokenizer)
    assert "move one in memory" in _refusal(model=hf, tokenizer=tokenizer, dtype="float16")
    assert "one linear output head" in _refusal(model=hf.model, tokenizer=tokenizer)


def test_what_is_refused_from_disk_is_refused_from_memory() -> None:
    hf = tiny_hf("llama")
    hf.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    assert "up_proj" in _refusal(model=hf, tokenizer=tiny_tokenizer())
    hf = tiny_hf("llama").to("meta")
    assert "meta" in _refusal(model=hf, tokenizer=tiny_tokenizer())
    assert "mamba" in _refusal(model=tiny_hf("mamba"), tokenizer=tiny_tokenizer()).lower()
