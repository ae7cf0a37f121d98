"""Turn cached keys from one position to another (rotary position embedding, Su et al. 2021, eq. 34).

Keys are cached after RoPE. A key that moves by `delta` positions is multiplied by the rotation of `delta`, since
rotations compose: R(new) = R(new - old) R(old). Scaling factors of YaRN and the like are already in the key and stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvpatch.errors import CacheError

Layout = Literal["half", "interleaved", "none", "absolute", "fixed", "unknown"]


@dataclass(frozen=True)
class LayerRope:
    """How one layer rotates its keys.

    Attributes:
        layout: "half" pairs dimension i with i + rotary_dim/2 (Llama, GPT-NeoX); "interleaved" pairs 2i with 2i+1
            (GPT-J, Cohere, GLM); "none" means keys carry no position; "absolute" means positions enter through the
            embeddings, so that a key can't be moved at all; "fixed" that keys are turned in a way that can't be undone,
            so that none can be moved; "unknown" that nothing was told of it.
        inv_freq: radians per position, [rotary_dim / 2]; dimensions past rotary_dim are not rotated. Empty for
            "none", "absolute", "fixed" and "unknown".
    """

    layout: Layout
    inv_freq: tuple[float, ...] = ()

    @property
    def keeps_its_place(self) -> bool:
        """Whether a cached key is known to be right at its own position alone."""
        return self.layout in ("absolute", "fixed")

    @property
    def rotary_dim(self) -> int:
        """Number of key dimensions that are rotated."""
        return 2 * len(self.inv_freq)


def rotate(keys: Tensor, delta: Tensor, rope: LayerRope) -> Tensor:
    """Turn keys by `delta` positions.

    Args:
        keys: [batch, kv_heads, slots, head_dim], after RoPE, any floating dtype.
        delta: [batch, slots], new position minus old position, in tokens; on any device.
        rope: the layer's rotation.
    Returns:
        Keys of the same shape and dtype. Angles are made in float64, the rotation is done in float32 (float64 for
        float64 keys) and rounded once to the keys' dtype; keys with delta 0 are returned bit for bit.
    Raises:
        CacheError: for a model with absolute position embeddings, or a rotation that is unknown or can't be undone,
            where delta is not 0 everywhere.
    """
    return Turns(delta).turn(keys, rope)


class Turns:
    """One table of turns, `delta` [batch, slots] as in `rotate`, for the keys of every layer: what it says is read, and
    its angles are made, once."""

    def __init__(self, delta: Tensor) -> None:
        self._moves = delta != 0
        self._moves_any = bool(self._moves.any())
        self._delta = delta
        self._made: dict[tuple[LayerRope, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def turn(self, keys: Tensor, rope: LayerRope) -> Tensor:
        """`rotate` of one layer's keys."""
        if not self._moves_any or rope.layout == "none":
            return keys
        if told := _UNMOVABLE.get(rope.layout):
            raise CacheError(told)
        work = torch.float64 if keys.dtype == torch.float64 else torch.float32
        cos, sin = self._angles(rope, work, keys.device)
        rotary, rest = keys[..., : rope.rotary_dim].to(work), keys[..., rope.rotary_dim :]
        if rope.layout == "half":
            first, second = rotary.chunk(2, dim=-1)
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        else:
            first, second = rotary[..., 0::2], rotary[..., 1::2]
            turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
        moved = turned.to(keys.dtype) if not rest.shape[-1] else torch.cat([turned.to(keys.dtype), rest], dim=-1)
        return torch.where(self._moves.to(keys.device)[:, None, :, None], moved, keys)

    def _angles(self, rope: LayerRope, work: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [batch, 1, slots, rotary_dim / 2] each."""
        if (rope, work, device) not in self._made:
            inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float64, device=device)
            angle = self._delta.to(device, torch.float64)[:, None, :, None] * inv_freq
            self._made[rope, work, device] = angle.cos().to(work), angle.sin().to(work)
        return self._made[rope, work, device]


_UNMOVABLE = {
    "unknown": "this cache does not say how its keys are turned, so they can't be moved to another position; give "
    "KVCache.from_dynamic the model",
    "absolute": "this model adds positions to its embeddings, so cached keys can't be moved to another position",
    "fixed": "this model changes its keys after it has turned them (a norm behind the rotation, say), so cached keys "
    "can't be moved to another position; patch values alone (parts='v'), or slots that stay where they are",
}
