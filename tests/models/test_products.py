"""Products on a processor: oneDNN's equal float64's, a row's are its own, and nothing stays switched."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kvpatch.models import products
from kvpatch.models.products import LaidOut, OneDnnProducts, fast_products

ROWS, WIDTH, OUT = 70, 48, 96


@pytest.fixture
def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((ROWS, WIDTH), (OUT, WIDTH), (OUT,)))


@torch.no_grad()
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(ROWS,), (7, 10), (1, 35, 2)])
def test_products_equal_float64(operands, is_packed: bool, has_bias: bool, shape: tuple[int, ...]):
    x, weight, bias = operands
    with fast_products(weight, [weight] if is_packed else ()):
        found = F.linear(x.view(*shape, WIDTH), weight, bias if has_bias else None)
    expected = F.linear(x.double(), weight.double(), bias.double() if has_bias else None)
    assert found.shape == (*shape, OUT)
    assert (found.view(ROWS, OUT) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_a_view_of_a_weight_is_not_taken_for_the_laid_out_whole(operands):
    x, weight, _ = operands
    with fast_products(weight, [weight]):
        found = F.linear(x, weight[: OUT // 2])
    assert (found - x.double() @ weight[: OUT // 2].double().T).abs().max() < 1e-4


def test_gradients_and_other_types_are_torch_s_own(operands):
    x, weight, bias = operands
    parameter = weight.clone().requires_grad_()
    with OneDnnProducts({}):
        F.linear(x, parameter, bias).sum().backward()
        assert F.linear(x.double(), weight.double()).dtype == torch.float64
    assert parameter.grad is not None


@torch.no_grad()
def test_a_changed_weight_counts_at_the_next_call(operands):
    x, weight, _ = operands
    with fast_products(weight, [weight]):
        before = F.linear(x, weight)
    weight.data.mul_(2)
    with fast_products(weight, [weight]):
        assert (F.linear(x, weight) - 2 * before).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_called_directly_equal_float64_in_every_type(operands, is_packed: bool, has_bias: bool, dtype):
    x, weight, bias = (tensor.to(dtype) for tensor in operands)
    found = LaidOut(weight, [weight] if is_packed else ()).linear(x, weight, bias if has_bias else None)
    expected = F.linear(x.double(), weight.double(), bias.double() if has_bias else None)
    assert found.dtype == dtype and found.shape == (ROWS, OUT)
    assert ((found - expected).abs() <= 2 * torch.finfo(dtype).eps * expected.abs() + 1e-4).all()


@torch.no_grad()
def test_products_called_directly_tell_a_view_from_the_laid_out_whole_and_take_no_rows(operands):
    x, weight, _ = operands
    own = LaidOut(weight, [weight])
    assert (own.linear(x, weight[: OUT // 2]) - x.double() @ weight[: OUT // 2].double().T).abs().max() < 1e-4
    assert own.linear(x[:0], weight).shape == (0, OUT)


@torch.no_grad()
def test_where_memory_is_short_nothing_is_laid_out_and_products_are_the_same(operands, monkeypatch):
    x, weight, _ = operands
    packed = LaidOut(weight, [weight])
    monkeypatch.setattr(products, "PACKED_SHARE", 0.0)
    plain = LaidOut(weight, [weight])
    assert packed._packed and not plain._packed
    assert (packed.linear(x, weight) - plain.linear(x, weight)).abs().max() < 1e-5
