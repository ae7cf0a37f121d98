"""A model whose kernels are shorter than their launches takes more rows and tokens at once, where the card has room."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvpatch.engine.batching import AT_MOST, most_places
from kvpatch.engine.token_budget import LARGE_CARD, MORE_AT_ONCE, NARROW, TOKENS_AT_ONCE, tokens_at_once


def backbone(width: int, device: str = "cuda") -> Any:
    kept = SimpleNamespace(tokens_at_once=None)
    return SimpleNamespace(device=torch.device(device), config=SimpleNamespace(hidden_size=width), kept=kept)


@pytest.mark.parametrize(
    ("width", "memory", "times"),
    [(NARROW, LARGE_CARD, MORE_AT_ONCE), (NARROW + 1, LARGE_CARD, 1), (NARROW, LARGE_CARD - 1, 1)],
)
def test_a_narrow_model_takes_more_at_once_on_a_large_card(
    width: int, memory: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    assert most_places(backbone(width)) == times * AT_MOST
    assert tokens_at_once(backbone(width)) == times * TOKENS_AT_ONCE["cuda"]


def test_a_processor_takes_what_it_took() -> None:
    assert tokens_at_once(backbone(NARROW, "cpu")) == TOKENS_AT_ONCE["cpu"]
