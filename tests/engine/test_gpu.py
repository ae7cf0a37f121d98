"""What only a CUDA device can show: graphs and fused kernels write the texts of the model's own forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from kvpatch.engine.backend import Fast, fast_of
from kvpatch.engine.decode import decode
from kvpatch.engine.prefill import prefill, prefill_pass
from kvpatch.engine.residual import recorded_residual, replaced_residual
from kvpatch.engine.score import score
from kvpatch.models.backbone import Backbone
from kvpatch.models.hf import LayerEdit
from tiny import CONFIGS, WINDOW, random_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
LENGTHS = [1 + (7 * i) % (WINDOW + 30) for i in range(40)]


def on_the_gpu(architecture: str, dtype: torch.dtype = torch.float32) -> Backbone:
    """A tiny model whose heads are large enough for the fused kernels."""
    name, settings = CONFIGS[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings | {"head_dim": 32, "hidden_size": 128})
    return Backbone(transformers.AutoModelForCausalLM.from_config(config).to(dtype).cuda().requires_grad_(False))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("ops", ["fused", "plain"])
def test_texts_equal_those_of_the_model_s_own_forward_pass(architecture: str, temperature: float, ops: str):
    backbone = on_the_gpu(architecture)
    known = fast_of(backbone)
    assert known.ops == "fused", known.note
    cache = prefill(backbone, random_prompts(LENGTHS))
    settings = {"max_new_tokens": 40, "temperature": temperature, "seeds": range(len(LENGTHS))}
    backbone.kept.backend = Fast(None, "model", "")
    free = decode(backbone, cache, **settings)
    ends = [int(free.token_ids[row, row]) for row in range(3, 30, 4)]
    expected = decode(backbone, cache, **settings, end_tokens=ends, keep_values=[1])
    backbone.kept.backend = replace(known, ops=ops)
    for places in (40, 16):
        found = decode(backbone, cache, **settings, end_tokens=ends, keep_values=[1], places=places)
        assert torch.equal(found.token_ids, expected.token_ids)
        assert torch.allclose(found.logprobs, expected.logprobs, atol=1e-3, equal_nan=True)
        assert torch.allclose(found.values[1], expected.values[1], atol=1e-3)


def bits_of(backbone: Backbone, batches: list[list[int]], temperature: float, **settings: object) -> list[torch.Tensor]:
    """Tokens, log-probabilities, and scores of given tokens, of 40 prompts in their order, made in these batches."""
    prompts = random_prompts(LENGTHS)
    found: dict[int, list[torch.Tensor]] = {}
    for rows in batches:
        cache = prefill(backbone, [prompts[i] for i in rows])
        out = decode(backbone, cache, max_new_tokens=24, temperature=temperature, seeds=rows, **settings)
        given = [[[5 + (i + t) % 90 for t in range(1 + (i + b) % 9)] for b in range(1 + i % 4)] for i in rows]
        scored = score(backbone, cache, given, keep_values=[1], keep_logits=2, keep_entropies=True)
        for at, i in enumerate(rows):
            lines = [
                torch.nn.functional.pad(one[at], (0, 9 - one.shape[2], 0, 4 - one.shape[1]), value=float("nan"))
                for one in (scored.logprobs, scored.entropies)
            ]
            length = len(given[at][0])
            found[i] = [out.token_ids[at], out.logprobs[at], *lines, scored.logits[at, : min(2, length)]]
            found[i].append(scored.values[1][at, :, :length])
    return [tensor for i in range(len(prompts)) for tensor in found[i]]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_has_the_same_bits_in_any_company(architecture: str, dtype: torch.dtype, temperature: float):
    backbone = on_the_gpu(architecture, dtype)
    assert fast_of(backbone).is_batch_invariant, fast_of(backbone).note
    rows = list(range(40))
    whole = bits_of(backbone, [rows], temperature)
    for batches, settings in (
        ([[i] for i in rows], {}),
        ([rows[low : low + 7] for low in range(0, 40, 7)], {}),
        ([rows[::-1]], {"places": 5}),
        ([rows[3:], rows[:3]], {"places": 44}),
    ):
        found = bits_of(backbone, batches, temperature, **settings)
        for one, two in zip(whole, found, strict=True):
            torch.testing.assert_close(two, one, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_reading_equals_the_model_s_own_forward_pass(architecture: str):
    backbone = on_the_gpu(architecture)
    prompts = random_prompts(LENGTHS)
    given = [[[5 + (i + t) % 90 for t in range(1 + (i + b) % 9)] for b in range(1 + i % 4)] for i in range(40)]
    of = [(7 * i) % 40 for i in range(40)]

    def edits() -> dict[int, LayerEdit]:
        return {1: LayerEdit(query=lambda x: x + 1, key=lambda x: -x, value=lambda x: 0.5 * x + 0.1)}

    def all_of() -> list[torch.Tensor]:
        cache = prefill(backbone, prompts)
        scored = score(backbone, cache, given, of=of, keep_values=[1], keep_logits=2, keep_entropies=True)
        edited = prefill_pass(backbone, prompts, edits=edits())
        steered = score(backbone, cache, given, edits=lambda rows: edits())
        with recorded_residual(backbone, [0, 2]) as seen:
            prefill_pass(backbone, prompts)
        is_put = torch.arange(cache.slots, device="cuda") % 3 == 0
        streams = {layer: stream.flip(-1) for layer, stream in seen.seen.items()}
        with replaced_residual(backbone, streams, is_put.expand(len(prompts), -1)) as firings:
            replaced = prefill_pass(backbone, prompts)
        assert firings.fired == firings.planned == 2
        real = (cache.positions >= 0)[:, None, :, None]
        firsts = [scored.values[1][i, :, : len(given[i][0])] for i in range(40)]
        numbers = [scored.logprobs, scored.entropies, scored.logits, steered.logprobs, *firsts]
        return [*numbers, *(real * tensor for one in (cache, edited, replaced) for tensor in (*one.keys, *one.values))]

    assert fast_of(backbone).reader is not None
    found = all_of()
    backbone.kept.backend = Fast(None, "model", "")
    for own, expected in zip(found, all_of(), strict=True):
        torch.testing.assert_close(own, expected, atol=2e-4, rtol=2e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_have_one_order_of_summation_at_any_number_of_rows(dtype: torch.dtype):
    from kvpatch.engine.exact_products import Products, ordered_product

    torch.manual_seed(0)
    products = Products(is_exact=True)
    for outputs, inner in ((192, 4096), (1000, 576)):
        weight = torch.randn(outputs, inner, device="cuda").to(dtype)
        x = torch.randn(1100, inner, device="cuda").to(dtype)
        whole = ordered_product(x, weight)
        torch.testing.assert_close(whole, torch.nn.functional.linear(x, weight), atol=0.5, rtol=0.02)
        for rows in (1, 2, 7, 16, 17, 44, 64, 100, 128, 300, 511, 512, 513, 1100):
            assert torch.equal(products.linear(x[:rows], weight), whole[:rows])
