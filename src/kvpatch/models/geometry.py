"""Geometry: what kvpatch has found out about a model's shape, its windows and its rotations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvpatch.caches.rope import LayerRope


@dataclass(frozen=True)
class Geometry:
    """Shape of a model's cache.

    Attributes:
        architecture: transformers' class name.
        layers, query_heads, kv_heads, head_dim: counts; kv_heads and head_dim of the first layer.
        vocabulary: number of logits.
        context: most positions the model takes.
        windows: attention window of each layer in tokens, None for full attention.
        rope: how each layer turns its keys.
        dtype: type of the keys that are cached.
        chunks: size of the pieces that each layer's attention is cut into, in tokens, None for no pieces.
        devices: where each layer runs, as it was found.
        ends_because: what changes past the context, where kvpatch ends it before the model does; else empty.
    """

    architecture: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    windows: tuple[int | None, ...]
    rope: tuple[LayerRope, ...]
    dtype: torch.dtype
    ends_because: str = ""
    chunks: tuple[int | None, ...] = ()
    devices: tuple[torch.device, ...] = ()

    @property
    def limit(self) -> str:
        """The context as the end of a sentence for a person."""
        if not self.ends_because:
            return f"the model's context is {self.context}"
        return (
            f"prompts of this model may have at most {self.context} tokens, new ones included: "
            f"past that {self.ends_because}"
        )
