"""In-prefill patches: change activations while the target's prompt runs, so that later layers see the change.

Hooks live inside one `with` block, count how often they fire, and are gone on any exit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvpatch.models.hf import Backbone


@dataclass
class Firings:
    """How often the hooks of a block were planned to fire, and did."""

    planned: int = 0
    fired: int = 0
    seen: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def recorded_residual(backbone: Backbone, layers: Sequence[int]) -> Iterator[Firings]:
    """Record the residual stream that enters each layer, [batch, tokens, width] a layer."""
    firings = Firings(planned=len(layers))

    def hook(layer: int):
        def record(module, args, kwargs):
            firings.fired += 1
            hidden = args[0] if args else kwargs["hidden_states"]
            firings.seen[layer] = hidden.detach().clone()

        return record

    handles = [backbone.blocks[i].register_forward_pre_hook(hook(i), with_kwargs=True) for i in layers]
    try:
        yield firings
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced_residual(backbone: Backbone, replacement: dict[int, Tensor], at: Tensor) -> Iterator[Firings]:
    """Replace the residual stream that enters some layers.

    Args:
        replacement: layer -> [batch, tokens, width], as recorded.
        at: [batch, tokens], True where the stream is replaced.
    """
    firings = Firings(planned=len(replacement))

    def hook(layer: int):
        def replace(module, args, kwargs):
            firings.fired += 1
            hidden = args[0] if args else kwargs["hidden_states"]
            new = torch.where(at[..., None], replacement[layer], hidden)
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return replace

    handles = [backbone.blocks[i].register_forward_pre_hook(hook(i), with_kwargs=True) for i in replacement]
    try:
        yield firings
    finally:
        for handle in handles:
            handle.remove()
