"""Changes to the residual stream while prompts run: record it, or put another in its place."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvpatch.models.backbone import Backbone


@dataclass
class Firings:
    """How often changes were planned to fire, and did; `seen` holds what was recorded, by layer."""

    planned: int = 0
    fired: int = 0
    seen: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def recorded_residual(backbone: Backbone, layers: Sequence[int]) -> Generator[Firings, None, None]:
    """Record the residual stream that enters each layer, [batch, tokens, width] a layer."""
    firings = Firings(planned=len(layers))

    def change(layer: int, hidden: Tensor) -> Tensor:
        firings.seen[layer] = hidden.detach().clone()
        return hidden

    with _hooked(backbone, layers, change, firings):
        yield firings


@contextmanager
def replaced_residual(backbone: Backbone, replacement: dict[int, Tensor], at: Tensor) -> Generator[Firings, None, None]:
    """Replace the residual stream that enters some layers.

    Args:
        replacement: layer -> [batch, tokens, width], as recorded.
        at: [batch, tokens], True where the stream is replaced.
    """
    firings = Firings(planned=len(replacement))

    def change(layer: int, hidden: Tensor) -> Tensor:
        return torch.where(at[..., None].to(hidden.device), replacement[layer].to(hidden.device), hidden)

    with _hooked(backbone, list(replacement), change, firings):
        yield firings


@contextmanager
def disturbed_residual(backbone: Backbone) -> Generator[Firings, None, None]:
    """Move every number that enters a layer by one unit in its last place, up or down at random."""
    layers = list(range(len(backbone.blocks)))
    firings = Firings(planned=len(layers))

    def change(layer: int, hidden: Tensor) -> Tensor:
        generator = torch.Generator(hidden.device).manual_seed(layer)
        signs = torch.randint(2, hidden.shape, generator=generator, device=hidden.device) * 2 - 1
        return (hidden.float() * (1 + torch.finfo(hidden.dtype).eps * signs)).to(hidden.dtype)

    with _hooked(backbone, layers, change, firings):
        yield firings


@contextmanager
def _hooked(
    backbone: Backbone, layers: Sequence[int], change: Callable[[int, Tensor], Tensor], firings: Firings
) -> Generator[None, None, None]:
    """Change what enters some layers in every pass of the block, the model's own or the engine's."""

    def counted(layer: int) -> Callable[[Tensor], Tensor]:
        def run(hidden: Tensor) -> Tensor:
            firings.fired += 1
            return change(layer, hidden)

        return run

    before = backbone.changed_streams
    backbone.changed_streams = before | {i: (*before.get(i, ()), counted(i)) for i in layers}
    try:
        yield
    finally:
        backbone.changed_streams = before


@contextmanager
def growing_rows(backbone: Backbone, added: Mapping[int, int]) -> Generator[Firings, None, None]:
    """Let a pass that begins with one row grow: so many copies of row 0 join, behind the others, at each layer.

    Until they join, the new rows are what row 0 is, so that what they share is computed once.
    """
    firings = Firings(planned=len(added))

    def change(layer: int, hidden: Tensor) -> Tensor:
        return torch.cat([hidden, hidden[:1].expand(added[layer], -1, -1)])

    with _hooked(backbone, list(added), change, firings):
        yield firings
