"""fp8 weights on a CUDA device: one kernel's bits are torch's, and a row has the same bits in any company."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvpatch.engine.backend import fast_of, hold_cache_in
from kvpatch.engine.decode import decode
from kvpatch.engine.model import Model
from kvpatch.engine.places import make_places
from kvpatch.engine.prefill import prefill
from kvpatch.engine.score import score
from kvpatch.engine.step import PlainOps, Sampling
from kvpatch.models import fp8
from kvpatch.models.backbone import Backbone
from kvpatch.models.e4m3 import Rounded, rows_by_torch
from kvpatch.models.fp8 import make_fp8, rows_of, scaled, scaled_linear
from tiny import CONFIGS, random_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < fp8.CAPABILITY,
        reason="there is no CUDA device with fp8 products",
    ),
]
LENGTHS = [1 + (7 * i) % 46 for i in range(40)]


def on_the_gpu(architecture: str, *, cache: str | None = None) -> Backbone:
    """A tiny model with fp8 weights, and cache, whose heads are large enough for the fused kernels."""
    name, settings = CONFIGS[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings | {"head_dim": 32, "hidden_size": 128})
    hf = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    make_fp8(hf, torch.device("cuda"))
    backbone = Backbone(hf.cuda().requires_grad_(False))
    hold_cache_in(backbone, cache)
    return backbone


@pytest.mark.parametrize("inner", [48, 576, 4096, 14_336])
def test_the_kernel_gives_the_bits_that_torch_gives(inner: int) -> None:
    x = torch.randn(300, inner, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[1] *= 3e4
    x[2, 5:] *= 1e-5
    x[3] = 0
    on_processor, on_gpu, by_kernel = rows_by_torch(x), rows_by_torch(x.cuda()), rows_of(x.cuda())
    assert fp8._kernel() is not None
    for numbers, scale in (on_gpu, by_kernel):
        assert torch.equal(numbers.cpu().view(torch.uint8), on_processor[0].view(torch.uint8))
        assert torch.equal(scale.cpu(), on_processor[1])


@pytest.mark.parametrize("width", [48, 128, 576, 4096, 14_336])
def test_kernels_that_round_what_they_make_give_the_bits_of_rounding_it_afterwards(width: int) -> None:
    from kvpatch.engine.fused import add_norm, gated, norm

    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    following = scaled(drawn(16, width))
    hidden, added, both = drawn(300, width).bfloat16(), drawn(300, width).bfloat16(), drawn(300, 2 * width).bfloat16()
    for x in (hidden, added, both):
        x[1] *= 3e4
        x[2, 5:] *= 1e-5
        x[3] = 0
    weight, after = drawn(width), drawn(width)
    made = {
        "norm": lambda to: norm(hidden, weight, 1e-5, to),
        "add_norm": lambda to: add_norm(hidden.clone(), added, None, weight, 1e-5, to),
        "add_norm after a norm": lambda to: add_norm(hidden.clone(), added, after, weight, 1e-5, to),
        "silu": lambda to: gated(both, "silu", to),
        "gelu": lambda to: gated(both, "gelu_tanh", to),
    }
    for name, make in made.items():
        whole, found = make(None), make(following)
        assert isinstance(whole, torch.Tensor) and isinstance(found, Rounded), name
        numbers, scale = rows_of(whole)
        assert torch.equal(found.numbers.view(torch.uint8), numbers.view(torch.uint8)), name
        assert torch.equal(found.scale, scale), name
        with fp8.whole_activations():
            assert isinstance(make(following), torch.Tensor), name


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 300])
def test_a_product_is_that_of_the_processor_but_for_the_order_of_its_sum(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 576, generator=generator).bfloat16(), scaled(torch.randn(192, 576))
    there = fp8.ScaledWeight(weight.numbers.cuda(), weight.scale.cuda())
    expected = scaled_linear(x, weight).float()
    found = scaled_linear(x.cuda(), there).float().cpu()
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-2


def test_products_have_one_order_of_summation_at_any_number_of_rows() -> None:
    from kvpatch.engine.scaled_products import ScaledProducts, ordered_scaled_product

    torch.manual_seed(0)
    products = ScaledProducts()
    for outputs, inner in ((192, 4096), (1008, 576)):
        weight = scaled(torch.randn(outputs, inner, device="cuda"))
        x = torch.randn(1100, inner, device="cuda").bfloat16()
        whole = ordered_scaled_product(*rows_of(x), weight)
        for rows in (1, 2, 7, 16, 17, 44, 64, 100, 128, 300, 511, 512, 513, 1100):
            assert torch.equal(products.linear(x[:rows], weight), whole[:rows])


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_the_kernel_holds_the_bits_that_torch_holds_and_attends_to_them(architecture: str) -> None:
    from kvpatch.engine.fused import FusedOps

    backbone = on_the_gpu(architecture, cache="fp8")
    fast = fast_of(backbone)
    assert fast.ops == "fused" and fast.network is not None, fast.note
    sampling, rows, slots = Sampling(0.0, 1.0, ()), 70, 150
    generator = torch.Generator("cuda").manual_seed(0)
    geometry, net = backbone.geometry, fast.network

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    cached = [drawn(rows, geometry.kv_heads, slots, geometry.head_dim) for _ in range(2)]
    ways = (PlainOps(backbone, net, sampling, slots + 2), fast.make_ops(backbone, sampling, slots + 2))
    assert isinstance(ways[1], FusedOps)
    for layer, weights in enumerate(net.layers):
        qkv = drawn(rows, weights.qkv.shape[0])
        qkv[1] *= 1e-4
        qkv[2] *= 300
        seen = []
        for ops in ways:
            places = make_places(backbone, rows, slots, 1, [])
            for held, new in zip((places.keys[layer], places.values[layer]), cached, strict=True):
                held.write((slice(None), slice(None), slice(0, slots)), new)
            places.slot_positions[:, :slots] = torch.arange(slots, device="cuda")
            places.first.copy_(torch.arange(rows) * 2 % slots)
            places.position.fill_(slots)
            places.going.fill_(True)
            places.live = slots + 1
            ops.begin(places)
            seen.append((ops.attend(layer, weights, qkv.clone(), places).float(), places))
        (one, plain), (two, fused) = seen
        off = (one - two).abs().amax(1) / one.abs().amax(1)
        assert float(off.max()) < 2e-2, (layer, float(off.max()))
        # Values pass no rotation, whose sums may be contracted otherwise: equal to the bit, and nearly all keys are.
        values = [p.values[layer] for p in (plain, fused)]
        assert torch.equal(*(v.numbers.view(torch.uint8) for v in values))
        assert values[0].scale is not None and values[1].scale is not None
        assert torch.equal(values[0].scale, values[1].scale)
        keys = [p.keys[layer].numbers.view(torch.uint8)[:, :, slots] for p in (plain, fused)]
        assert float((keys[0] != keys[1]).float().mean()) < 0.01


@pytest.mark.parametrize("cache", [None, "fp8"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_has_the_same_bits_in_any_company(architecture: str, temperature: float, cache: str | None) -> None:
    backbone = on_the_gpu(architecture, cache=cache)
    assert fast_of(backbone).is_batch_invariant, fast_of(backbone).note
    prompts = random_prompts(LENGTHS)

    def bits(batches: list[list[int]], **settings: int) -> dict[int, list[torch.Tensor]]:
        found: dict[int, list[torch.Tensor]] = {}
        for rows in batches:
            cache = prefill(backbone, [prompts[i] for i in rows])
            out = decode(backbone, cache, max_new_tokens=24, temperature=temperature, seeds=rows, **settings)
            scored = score(backbone, cache, [[[5 + (i + t) % 90 for t in range(9)]] for i in rows])
            for at, i in enumerate(rows):
                found[i] = [out.token_ids[at], out.logprobs[at], scored.logprobs[at]]
        return found

    rows = list(range(40))
    whole = bits([rows])
    for batches, settings in (
        ([[i] for i in rows[:5]], {}),
        ([rows[low : low + 7] for low in range(0, 40, 7)], {}),
        ([rows[::-1]], {"places": 5}),
        ([rows[3:], rows[:3]], {"places": 44}),
    ):
        for i, own in bits(batches, **settings).items():
            for one, two in zip(whole[i], own, strict=True):
                torch.testing.assert_close(two, one, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "cache"), [("fp8", None), ("fp8", "fp8"), ("bfloat16", "fp8")])
def test_a_model_passes_check_on_a_gpu(tiny_dirs, dtype: str, cache: str | None) -> None:
    import kvpatch as kv
    from kvpatch.checks.identities import check

    model: Model = kv.load(tiny_dirs("llama"), dtype=dtype, cache_dtype=cache, device="cuda")
    assert (model.backbone.quantization or "bfloat16", model.backbone.cache_dtype or None) == (dtype, cache)
    assert [i.identity for i in check(model) if i.holds is False] == []
