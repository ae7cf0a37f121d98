"""Patch: which layers, KV heads, slots and parts of a cache are changed, and how. Data only, no tensors.

A patch is built, printed, hashed, written in YAML and stored without a model and without torch. `interventions.splice`
carries it out on two caches; `Patch.apply` is the way in.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import (
    model_validator,
)

from kvpatch.specs.base import Change, Number
from kvpatch.specs.selectors import KvHeads, Layers, Slots

if TYPE_CHECKING:
    from kvpatch.caches.kvcache import KVCache


Align = Literal["start", "end", "stretch", "replace", "append"]
Parts = Literal["k", "v", "kv"]
Donor = Literal[
    "source",
    "shuffle_values",
    "shuffle_rerotate",
    "shuffle_jointly",
    "shuffle_heads",
    "gaussian_isotropic",
    "gaussian_fitted",
    "mean",
]


class Patch(Change):
    """Which part of a source's cache goes where in a target's cache.

    Args:
        layers: layer indices (a number, a collection, an array or a slice, also one without an end), a `LayerBand`, a
            `LayerAt`, or None or "all" for all.
        kv_heads: KV-head indices (heads of the cache, not query heads), or None or "all" for all.
        slots: a named selection, a `SlotQuery`, or slot indices (0 is a row's first real slot; negative from its end).
            Taken in the source and in the target alike.
        parts: "k", "v" or "kv".
        align: how the n selected source slots map onto the m selected target slots. "start" and "end" pair them from
            the first or the last one and leave the surplus of the longer side alone; "stretch" gives every target slot
            the source slot at the same relative place; "replace" takes the target's selected slots out and puts the
            source's in their place (the length becomes m - ... + n, so it needs all layers and all KV heads and both
            parts); "append" puts the source's slots behind the target's last slot.
        strength: 1 replaces, between 0 and 1 interpolates, 0 leaves the target. Other values extrapolate.
        rotate: True turns keys to the position they land on; False keeps the rotation they had (old scripts' way;
            `KVCache.positions` then names where they landed, not what they were turned by).
        donor: what is put in: the source, or a control made from it (see `interventions.donors`).
    """

    takes_giver: ClassVar[bool] = True

    layers: Layers = None
    kv_heads: KvHeads = None
    slots: Slots = "all"
    parts: Parts = "kv"
    align: Align = "end"
    strength: Number = 1.0
    rotate: bool = True
    donor: Donor = "source"

    @model_validator(mode="after")
    def _lengths_stay_equal(self) -> Patch:
        if self.align in ("replace", "append"):
            if self.layers is not None or self.kv_heads is not None or self.parts != "kv":
                raise ValueError(
                    f"align={self.align!r} changes the number of slots, so it needs all layers, all KV heads and both "
                    "parts; for a subset use align='start', 'end' or 'stretch'"
                )
            if self.strength != 1:
                raise ValueError(f"align={self.align!r} has nothing to interpolate with; strength must be 1")
        return self

    @property
    def is_full_swap(self) -> bool:
        """Whether the whole source cache, unchanged, takes the place of the whole target cache."""
        return self.slots == "all" and self.align == "replace" and self.donor == "source"

    @property
    def is_fitted(self) -> bool:
        return self.donor in ("gaussian_fitted", "mean")

    @property
    def keeps_text_whole(self) -> bool:
        return self.is_full_swap

    @property
    def told(self) -> str:
        return "its cache put in"

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, every field present."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def apply(self, source: KVCache, target: KVCache, *, seed: int = 0, reference: KVCache | None = None) -> KVCache:
        """Return a new cache: the target's, with this patch of the source's in it.

        Args:
            source: batch of 1 or of the target's batch size.
            target: any batch.
            seed: what random donors and random slots draw from; the same seed gives the same cache.
            reference: caches whose statistics "gaussian_fitted" and "mean" take (the source if None).
        Returns:
            A new `KVCache` [target's batch]; `pending` is the target's. Neither input is changed.
        Raises:
            CacheError: where the batch sizes or the models' geometry do not fit, or where the selection finds nothing
                in a row of the source or of the target, so that nothing would change there.
        """
        from kvpatch.interventions.splice import splice

        return splice(self, source, target, seed=seed, reference=reference)
