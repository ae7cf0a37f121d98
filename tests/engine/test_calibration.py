"""Calibration: it times what decoding runs, and leaves the processor as it says."""

from __future__ import annotations

import pytest
import torch

from kvpatch.engine import calibration
from kvpatch.engine.batching import WORTH_PACKING
from kvpatch.engine.step import PlainOps
from kvpatch.models import processor
from kvpatch.models.products import OneDnnProducts

pytestmark = pytest.mark.model


def products_in_use() -> bool:
    return any(isinstance(mode, OneDnnProducts) for mode in torch.overrides._get_current_function_mode_stack())


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_the_fastest_rows_and_threads_are_taken(tiny, monkeypatch, threads):
    seen = []

    def rate(backbone, rows: int) -> float:
        seen.append((torch.get_num_threads(), rows))
        return {32: 10.0, 64: 20.0, 128: 20.5}[rows] * torch.get_num_threads()

    monkeypatch.setattr(calibration, "_rate", rate)
    torch.set_num_threads(2)
    found = calibration.calibrate(tiny("llama").backbone)
    assert (found.threads, found.rows, found.tokens_a_second) == (2, 64, 40.0)
    assert torch.get_num_threads() == 2
    assert {count for count, _ in seen} == {1, 2}


def test_a_timed_model_decodes_some_tokens_a_second_with_decoding_s_products(tiny, threads, monkeypatch):
    laid_out, reuse = [], PlainOps.reuse

    def noted(ops: PlainOps, weights) -> None:
        laid_out.append(len(weights))
        reuse(ops, weights)

    monkeypatch.setattr(PlainOps, "reuse", noted)
    model = tiny("gemma3")
    assert calibration.calibrate(model.backbone).tokens_a_second > 0
    timed = len(laid_out)
    prompts = model.prefill(["one two three"] * 8)
    model.generate(prompts, max_new_tokens=WORTH_PACKING // 8 - 1, stop=False)
    assert len(laid_out) == timed > 0
    model.generate(prompts, max_new_tokens=WORTH_PACKING // 8, stop=False)
    assert len(laid_out) == timed + 1
    assert set(laid_out) == {4 * model.backbone.geometry.layers + 1}


def test_what_the_engine_does_not_step_itself_is_not_calibrated(tiny):
    assert calibration.calibrate(tiny("gpt_neox").backbone) is None


def test_a_processor_without_the_instructions_keeps_float32(monkeypatch):
    monkeypatch.setattr(processor, "_multiplies_bfloat16", lambda: False)
    assert processor.fastest_type() == torch.float32


def test_float32_is_timed_with_decoding_s_products(monkeypatch):
    used, linear = [], processor.F.linear

    def noted(x, weight):
        used.append((x.dtype, products_in_use()))
        return linear(x, weight)

    monkeypatch.setattr(processor, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(processor.F, "linear", noted)
    assert processor.fastest_type() in (torch.float32, torch.bfloat16)
    assert (torch.float32, True) in used and (torch.float32, False) not in used
