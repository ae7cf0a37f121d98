"""Attention broken on purpose, for the tests of what must notice it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvpatch.models import hf


def attention_without_window(monkeypatch: pytest.MonkeyPatch) -> None:
    bias = hf.Step.bias
    monkeypatch.setattr(hf.Step, "bias", lambda step, window, *groups: bias(step, None, *groups))


def attention_with_a_window_one_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    bias = hf.Step.bias
    monkeypatch.setattr(hf.Step, "bias", lambda step, window, *groups: bias(step, window and window + 1, *groups))


def attention_to_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    bias = hf.Step.bias

    def seeing_padding(step, window, *groups):
        seen = replace(step, slot_positions=step.slot_positions.clamp(min=0), _bias={})
        return bias(seen, window, *groups)

    monkeypatch.setattr(hf.Step, "bias", seeing_padding)
