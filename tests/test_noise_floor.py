"""The stored noise floor says how far the same trials move in other company, batches and threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvpatch.checks import noise_floor as room
from kvpatch.checks.noise_floor import noise_floor

pytestmark = pytest.mark.model
WAYS = ("other_mates", "other_batch_shape", "other_threads")


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_float32_writes_the_same_texts_in_any_company_batch_and_number_of_threads(
    tiny: Callable, monkeypatch: pytest.MonkeyPatch, kind: str
):
    monkeypatch.setattr(room, "NEW_TOKENS", 8)
    found = noise_floor(tiny(kind), other_threads=1 if torch.get_num_threads() > 1 else 2)
    assert [found[f"texts_equal_{way}"] for way in WAYS] == [1.0] * 3
    for way in WAYS:
        for what in ("first", "forced", "forced_random"):
            assert found[f"{what}_logprob_{way}"] < 1e-4


def test_bfloat16_is_measured_on_natural_and_on_destroyed_caches(tiny_dirs: Any, monkeypatch: pytest.MonkeyPatch):
    import kvpatch as kv

    monkeypatch.setattr(room, "NEW_TOKENS", 8)
    found = noise_floor(kv.load(tiny_dirs("llama"), device="cpu", dtype="bfloat16"))
    for way in WAYS:
        assert 0 <= found[f"texts_equal_{way}"] <= 1
        assert 0 <= found[f"forced_random_logprob_{way}"] < 1


@pytest.mark.parametrize(("asked", "rows"), [(1, 8), (20, 20), (500, 64)])
def test_it_is_measured_at_the_rows_of_the_run_within_bounds(
    tiny: Callable, monkeypatch: pytest.MonkeyPatch, asked: int, rows: int
):
    monkeypatch.setattr(room, "NEW_TOKENS", 2)
    assert noise_floor(tiny("llama"), rows=asked)["rows"] == rows


def test_what_depends_on_the_threads_is_seen_and_the_threads_are_put_back(
    tiny: Callable, monkeypatch: pytest.MonkeyPatch
):
    model, before, threads = tiny("llama"), 2, [2]
    decode = room.decode

    def threaded(backbone: Any, cache: Any, *, seeds: list[int], **more: Any) -> Any:
        shift = 1000 * (threads[-1] != before)
        return decode(backbone, cache, seeds=[seed + shift for seed in seeds], **more)

    monkeypatch.setattr(room, "decode", threaded)
    monkeypatch.setattr(room.torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(room.torch, "set_num_threads", threads.append)
    found = noise_floor(model)
    assert found["texts_equal_other_threads"] < 0.5
    assert found["texts_equal_other_mates"] == 1
    assert (found["threads"], found["other_number_of_threads"], threads) == (2, 1, [2, 1, 2])
