"""Patch: which layers, KV heads, slots and parts of a cache are changed, and how. Data only, no tensors.

A patch is built, printed, hashed, written in YAML and stored without a model and without torch. `splice.py` carries it
out on two caches; `Patch.apply` is the way in.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kvpatch.arguments import indices_of_slice, real, whole_numbers
from kvpatch.errors import CacheError
from kvpatch.refusals import refusal_of

if TYPE_CHECKING:
    from kvpatch.cache import KVCache

Align = Literal["start", "end", "stretch", "replace", "append"]
Parts = Literal["k", "v", "kv"]
NamedSlots = Literal["all", "bos", "template", "body", "trailer", "last", "sinks"]
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


class Frozen(BaseModel):
    """Base of the data types: no unknown keys, no change after it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Given(Frozen):
    """Base of what a person writes in Python: what is wrong with it is said in one line.

    Raises:
        CacheError: where it is made of something that can't be meant.
    """

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise CacheError(refusal_of(error, type(self))) from None

    # pydantic then takes it for its own, and a part of a protocol is built as before, with the place of what is wrong.
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]


def _indices(value: Any, info: ValidationInfo) -> Any:
    """Indices as a list of Python's numbers; None for all; what is no collection stays as it is."""
    name = str(info.field_name)
    if isinstance(value, slice):
        return None if value == slice(None) else indices_of_slice(name, value)
    if value is None or isinstance(value, (dict, BaseModel)):
        return value
    if isinstance(value, str):
        if value != "all":
            raise ValueError(f"{name} must be whole numbers or 'all', got {value!r}")
        return None
    return whole_numbers(name, value)


def _slots(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, str):
        if value not in get_args(NamedSlots):
            raise ValueError(
                f"slots {value!r} is not a selection; use {', '.join(get_args(NamedSlots))}, a SlotQuery or indices"
            )
        return value
    if value is None:
        raise ValueError("slots must be a named selection, a SlotQuery or indices, got None")
    found = _indices(value, info)
    return "all" if found is None else found


def _number(value: Any, info: ValidationInfo) -> Any:
    return real(str(info.field_name), value)


Number = Annotated[float, BeforeValidator(_number)]
"""A finite number."""


class LayerAt(Given):
    """One layer, as a fraction of depth."""

    depth: float = Field(ge=0, le=1)


class LayerBand(Given):
    """Layers by depth: `[low, high)` as fractions of the number of layers, so that it fits any model."""

    band: tuple[float, float]
    inverse: bool = Field(default=False, description="True: every layer but the band")

    @model_validator(mode="after")
    def _ordered(self) -> LayerBand:
        low, high = self.band
        if not 0 <= low < high <= 1:
            raise ValueError(f"band must be two fractions with 0 <= low < high <= 1, got [{low}, {high}]")
        return self


class SlotQuery(Given):
    """Slots by meaning. The filters are applied in the order of the fields.

    `of` names where to look; `without` takes a named stretch out; `fraction` keeps `[low, high)` of what is left;
    `keywords` keeps slots whose token overlaps a match of one of these regular expressions in the text of the slots;
    `matched_to` gives as many random slots as that query selects, none of them selected by it, each drawn from the
    same tenth of the depth of `of` where one is free (the control for a selection by meaning). With `in_source` the
    selection is made in the source alone, and its slots land at the same relative places of the target's `of`.
    """

    of: NamedSlots = "all"
    without: NamedSlots | None = None
    fraction: tuple[float, float] | None = None
    keywords: list[str] | None = None
    matched_to: SlotQuery | None = None
    in_source: bool = False

    @field_validator("keywords")
    @classmethod
    def _keywords_compile(cls, keywords: list[str] | None) -> list[str] | None:
        for keyword in keywords or []:
            try:
                re.compile(keyword)
            except re.error as error:
                raise ValueError(f"keyword {keyword!r} is not a regular expression: {error}") from None
        return keywords

    @model_validator(mode="after")
    def _fraction_is_ordered(self) -> SlotQuery:
        if self.fraction is not None and not 0 <= self.fraction[0] < self.fraction[1] <= 1:
            raise ValueError(f"fraction must be two numbers with 0 <= low < high <= 1, got {list(self.fraction)}")
        return self


Layers = Annotated[list[int] | LayerBand | LayerAt | None, BeforeValidator(_indices)]
KvHeads = Annotated[list[int] | None, BeforeValidator(_indices)]
Slots = Annotated[NamedSlots | SlotQuery | list[int], BeforeValidator(_slots)]


class Patch(Given):
    """Which part of a source's cache goes where in a target's cache.

    Args:
        layers: layer indices (a number, a collection, an array or a slice that has an end), a `LayerBand`, a `LayerAt`,
            or None or "all" for all.
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
        donor: what is put in: the source, or a control made from it (see `donors.py`).
    """

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
        from kvpatch.splice import splice

        return splice(self, source, target, seed=seed, reference=reference)
