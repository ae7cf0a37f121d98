"""The type of a model's weights: floating types, and 8 and 4 bits where bitsandbytes is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import kvpatch as kv
from kvpatch.checks.identities import check
from kvpatch.engine.backend import fast_of
from kvpatch.models import precision
from kvpatch.models.precision import Precision, precision_of
from tiny import CHATML, tiny_of, tiny_tokenizer

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def test_the_usual_type_follows_the_device() -> None:
    assert precision_of(None, "cpu") == Precision(torch.float32)
    assert precision_of(None, "cuda") == precision_of("auto", "cuda") == Precision(torch.bfloat16)
    assert precision_of("float16", "cpu") == precision_of(torch.float16, "cpu") == Precision(torch.float16)


@pytest.mark.parametrize("wrong", ["float12", "int32", "uint8", "Tensor", torch.int64])
def test_another_type_is_refused_with_those_that_there_are(wrong: object) -> None:
    with pytest.raises(kv.ModelError, match=r"use float32, bfloat16, float16 or auto, fp8, or int8 or int4") as caught:
        precision_of(wrong, "cpu")  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_without_bitsandbytes_one_line_says_what_to_install(bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    with pytest.raises(kv.MissingExtra, match=r"pip install 'kvpatch\[quantised\]'"):
        precision_of(bits, "cuda")


def test_float16_passes_check_with_bounds_from_its_own_noise(tiny_dirs) -> None:
    model = kv.load(tiny_dirs("llama"), dtype="float16", device="cpu")
    assert model.backbone.dtype == torch.float16 and not model.backbone.is_exact
    found = check(model)
    assert [i.identity for i in found if i.holds is False] == []
    assert all(i.bound > 1e-3 for i in found if i.identity == "full swap equals text")


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_weights_of_8_bits_pass_check_and_are_told_from_the_whole_ones(tmp_path: Path, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    settings = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2}
    tiny_of("LlamaConfig", **settings).save_pretrained(tmp_path)
    tiny_tokenizer(CHATML).save_pretrained(tmp_path)
    model = kv.load(tmp_path, dtype="int8", device=device)
    assert model.backbone.quantization == "int8" and "quantised (int8)" in fast_of(model.backbone).note
    assert [i.identity for i in check(model) if i.holds is False] == []
    assert model.backbone.identity != kv.load(tmp_path, device=device).backbone.identity


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_weights_of_4_bits_pass_check_on_a_gpu(tmp_path: Path) -> None:
    settings = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2}
    tiny_of("LlamaConfig", **settings).save_pretrained(tmp_path)
    tiny_tokenizer(CHATML).save_pretrained(tmp_path)
    model = kv.load(tmp_path, dtype="int4", device="cuda")
    assert model.backbone.quantization == "int4"
    assert [i.identity for i in check(model) if i.holds is False] == []
