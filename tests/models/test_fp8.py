"""Weights of 8 floating bits: their numbers, who multiplies by them, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kvpatch as kv
from kvpatch.checks import identities
from kvpatch.checks.identities import check
from kvpatch.engine import backend
from kvpatch.engine.backend import fast_of
from kvpatch.engine.decode import decode
from kvpatch.engine.prefill import prefill
from kvpatch.executors.host import model_record
from kvpatch.models import fp8
from kvpatch.models.e4m3 import Rounded
from kvpatch.models.fp8 import Fp8Linear, ScaledWeight, make_fp8, rows_of, scaled, scaled_linear, whole_activations
from kvpatch.models.products import LaidOut
from tiny import CHATML, CONFIGS, random_prompts, tiny_of, tiny_tokenizer


def saved(where: Path, architecture: str = "llama", **settings: Any) -> Path:
    """A tiny model whose layers fp8 weights fit."""
    name, usual = CONFIGS[architecture]
    tiny_of(name, **{**usual, "hidden_size": 64, **settings}).save_pretrained(where)
    tiny_tokenizer(CHATML).save_pretrained(where)
    return where


@pytest.fixture
def model(tmp_path: Path) -> kv.Model:
    return kv.load(saved(tmp_path), dtype="fp8", device="cpu")


def e4m3_by_search(x: np.ndarray) -> np.ndarray:
    """The nearest number of e4m3, of two that are as near the one whose last bit is 0; by looking at all of them."""
    bits = np.arange(127)  # of 0 to 448; the last, 127, is no number
    exponent, fraction = bits >> 3, bits & 7
    table = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    found = np.zeros_like(x)
    for at in np.ndindex(*x.shape):
        off = np.abs(table - abs(x[at]))
        nearest = np.flatnonzero(off == off.min())
        found[at] = np.copysign(table[min(nearest, key=lambda bit: bit & 1)], x[at])
    return found


def test_rows_are_the_nearest_numbers_of_e4m3_after_each_is_scaled_to_its_largest() -> None:
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[1] *= 300
    x[2, 3:] *= 1e-4
    x[3] = 0
    numbers, scale = rows_of(x)
    own = x.float().numpy()
    largest = np.maximum(np.abs(own).max(axis=1, keepdims=True), np.float32(1e-12))
    np.testing.assert_allclose(scale.numpy(), largest / 448, rtol=2e-7)
    assert np.array_equal(numbers.float().numpy(), e4m3_by_search(own / scale.numpy()))
    assert numbers.float().abs().amax(dim=1).tolist() == [448, 448, 448, 0, 448]


def test_a_product_is_that_of_the_numbers_that_rows_and_weight_stand_for() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 7, 64, generator=generator).bfloat16(), torch.randn(32, 64, generator=generator)
    bias = torch.randn(32, generator=generator).bfloat16()
    held = scaled(weight)
    numbers, scale = rows_of(x.flatten(0, 1))
    expected = (numbers.double() * scale) @ (held.numbers.double() * held.scale[:, None]).T
    found = scaled_linear(x, held, bias)
    assert found.dtype == torch.bfloat16 and found.shape == (3, 7, 32)
    torch.testing.assert_close(found.flatten(0, 1).double(), expected + bias, atol=0.1, rtol=0.01)
    off = (found.float() - (x.float() @ weight.T + bias)).abs().max() / found.float().abs().max()
    assert 0.005 < off < 0.1  # three bits of fraction, and not the model's own


def test_a_row_is_rounded_by_its_own_numbers_alone() -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    loud = torch.cat([x, 1000 * x])
    assert torch.equal(rows_of(loud)[0][:9].float(), rows_of(x)[0].float())
    assert torch.equal(rows_of(loud)[0][9:].float(), rows_of(1000 * x)[0].float())


def test_weights_that_are_laid_out_for_a_processor_give_the_same_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 64, generator=generator).bfloat16(), scaled(torch.randn(96, 64, generator=generator))
    laid_out = LaidOut(torch.zeros(1), [weight])
    assert laid_out._packed
    torch.testing.assert_close(laid_out.linear(x, weight), scaled_linear(x, weight), atol=0, rtol=0.01)


def test_rows_that_are_rounded_already_are_multiplied_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 64, generator=generator).bfloat16(), scaled(torch.randn(32, 64, generator=generator))
    bias = torch.randn(32, generator=generator).bfloat16()
    made = Rounded(*rows_of(x))
    for linear in (scaled_linear, LaidOut(torch.zeros(1), [weight]).linear):
        assert torch.equal(linear(made, weight, bias), linear(x, weight, bias))
    assert fp8.are_rounded_for(weight)
    assert not fp8.are_rounded_for(torch.zeros(3)) and not fp8.are_rounded_for(None)
    with whole_activations():
        assert not fp8.are_rounded_for(weight)


def test_linear_layers_of_the_decoder_take_a_byte_per_weight_and_all_else_is_bfloat16(model: kv.Model) -> None:
    layer: Any = model.backbone.blocks[0]
    for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
        assert type(linear) is Fp8Linear
        assert linear.weight.dtype == torch.float8_e4m3fn and linear.scale.dtype == torch.float32
        assert linear.scale.shape == (linear.out_features,)
    rest = [m for m in model.hf.modules() if not isinstance(m, Fp8Linear)]
    assert {p.dtype for m in rest for p in m.parameters(recurse=False)} == {torch.bfloat16}
    assert type(model.backbone.head) is nn.Linear and model.backbone.dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_the_engine_s_own_step_takes_them(tmp_path: Path, architecture: str) -> None:
    model = kv.load(saved(tmp_path, architecture), dtype="fp8", device="cpu")
    fast = fast_of(model.backbone)
    assert fast.ops == "plain" and fast.network is not None, fast.note
    qkv, first = fast.network.layers[0].qkv, model.backbone.blocks[0].self_attn.q_proj
    assert isinstance(qkv, ScaledWeight) and fast.network.shares_weights()
    assert qkv.numbers.data_ptr() == first.weight.data_ptr() and qkv.scale.data_ptr() == first.scale.data_ptr()
    prompts = random_prompts([3, 9, 20, 14])
    cache = prefill(model.backbone, prompts)
    settings = {"max_new_tokens": 6, "temperature": 0.0, "seeds": range(4)}
    found = decode(model.backbone, cache, **settings)
    model.backbone.kept.backend = backend.Fast(None, "model", "")
    own = decode(model.backbone, cache, **settings)
    # One rounding that fell otherwise is enlarged by activations of 8 bits: the first token's alone are compared.
    torch.testing.assert_close(found.logprobs[:, 0], own.logprobs[:, 0], atol=1.0, rtol=0)


def test_a_step_that_drops_the_scales_is_not_taken(model: kv.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(x: torch.Tensor, weight: ScaledWeight, bias: torch.Tensor | None = None, **kept: Any) -> torch.Tensor:
        return scaled_linear(x, ScaledWeight(weight.numbers, torch.ones_like(weight.scale)), bias)

    monkeypatch.setattr("kvpatch.models.products.scaled_linear", without)
    assert fast_of(model.backbone).ops == "model"


def test_a_step_whose_products_round_otherwise_is_not_taken(model: kv.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(x: torch.Tensor, weight: ScaledWeight, bias: torch.Tensor | None = None, **kept: Any) -> torch.Tensor:
        with whole_activations():
            return scaled_linear(x, weight, bias)

    monkeypatch.setattr("kvpatch.models.products.scaled_linear", without)
    found = fast_of(model.backbone)
    assert found.ops == "model" and "fp8 products differ from the model's own by" in found.note


def test_a_model_with_them_passes_check_and_is_told_from_the_whole_one(tmp_path: Path) -> None:
    whole, model = (kv.load(saved(tmp_path), dtype=kind, device="cpu") for kind in ("bfloat16", "fp8"))
    assert model.backbone.quantization == "fp8" and not model.backbone.is_exact
    assert model_record(model).dtype == "bfloat16, fp8 weights"
    assert model.backbone.identity != whole.backbone.identity
    found = {i.identity: i for i in check(model)}
    assert [name for name, i in found.items() if i.holds is False] == []
    twofold = [i for i in found.values() if "with activations left whole" in i.note]
    assert len(twofold) == len(identities._MOVED_BY_ROUNDING)
    assert [i.identity for i in check(whole) if "left whole" in i.note] == []


def test_check_sees_a_wrong_splice_through_the_noise_of_8_bits(
    model: kv.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned = identities.rotate
    monkeypatch.setattr(identities, "rotate", lambda key, by, rope: turned(key, by + 1, rope))
    found = {i.identity: i for i in check(model)}
    assert found["moving all keys and the query changes nothing"].holds is False


def test_left_whole_activations_come_back_after_an_error() -> None:
    seen: list[bool] = []
    with pytest.raises(IndexError), whole_activations():
        _ = seen[not seen.append(fp8.are_activations_whole()) and 1]
    assert seen == [True]
    assert not fp8.are_activations_whole()


def test_a_changed_scale_moves_the_engine_s_step_too(model: kv.Model) -> None:
    cache = model.prefill(["How bread rises"])
    before = model.generate(cache, max_new_tokens=3, temperature=0).logprobs
    model.hf.model.layers[0].mlp.down_proj.scale.data.mul_(2)
    assert not torch.equal(model.generate(cache, max_new_tokens=3, temperature=0).logprobs, before)


def test_a_layer_of_another_class_leaves_the_engine_s_step(model: kv.Model) -> None:
    class Other(Fp8Linear):
        pass

    own: Any = model.hf.model.layers[1].mlp.down_proj
    model.hf.model.layers[1].mlp.down_proj = Other(ScaledWeight(own.weight.data, own.scale.data))
    assert "Other" in fast_of(model.backbone).note


def test_layers_of_odd_size_stay_as_they_are(tmp_path: Path) -> None:
    model = kv.load(saved(tmp_path, intermediate_size=72), dtype="fp8", device="cpu")
    layer: Any = model.backbone.blocks[0]
    assert type(layer.mlp.up_proj) is nn.Linear and type(layer.self_attn.q_proj) is Fp8Linear
    assert fast_of(model.backbone).ops == "plain"


def test_a_shared_layer_stays_shared() -> None:
    hf = tiny_of("LlamaConfig", **{**CONFIGS["llama"][1], "hidden_size": 64}).bfloat16()
    hf.model.layers[1].mlp = hf.model.layers[0].mlp
    make_fp8(hf, torch.device("cpu"))
    assert hf.model.layers[1].mlp.up_proj is hf.model.layers[0].mlp.up_proj
    assert type(hf.model.layers[1].mlp.up_proj) is Fp8Linear


def test_bytes_saved_are_those_that_are(tmp_path: Path) -> None:
    hf = tiny_of("Qwen2Config", **{**CONFIGS["qwen2"][1], "hidden_size": 64}).bfloat16()

    def size() -> int:
        return sum(p.numel() * p.element_size() for p in hf.parameters())

    before, saved_bytes = size(), fp8.bytes_saved(hf)
    make_fp8(hf, torch.device("cpu"))
    assert before - size() == saved_bytes > 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"device_map": "auto"}, "fp8 weights lie on one device; give device in place of device_map"),
        ({"device": "meta"}, "meta"),
    ],
)
def test_devices_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(kv.ModelError, match=told) as caught:
        kv.load(saved(tmp_path), dtype="fp8", **settings)
    assert "\n" not in str(caught.value)


def test_an_older_gpu_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(kv.ModelError, match=r"NVIDIA A100 \(compute capability 8.0\) has no fp8 products") as caught:
        fp8.refuse_unfit(torch.device("cuda"))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp8.refuse_unfit(torch.device("cuda"))


def test_models_that_have_no_such_layers_or_another_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(kv.ModelError, match="has no linear layers in its decoder"):
        kv.load(saved(tmp_path, "gpt2"), dtype="fp8", device="cpu")
    with pytest.raises(kv.ModelError, match="made of bfloat16 ones"):
        make_fp8(copy.deepcopy(tiny_of("LlamaConfig")), torch.device("cpu"))


def test_the_command_line_takes_the_type(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from kvpatch.cli.main import app

    out = CliRunner().invoke(app, ["check", str(saved(tmp_path)), "--dtype", "fp8", "--device", "cpu", "--json"])
    assert out.exit_code == 0, out.output
    assert "activations left whole" in out.output
