"""Selections of a cache: which layers, which KV heads, which slots. Data only, no tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kvpatch.specs.base import Given, is_false, is_none
from kvpatch.specs.regexes import Pattern, PatternError
from kvpatch.specs.spans import Span, indices_or_all

if TYPE_CHECKING:
    pass

NamedSlots = Literal["all", "bos", "template", "body", "trailer", "last", "sinks"]


def _slots(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, str):
        if value not in get_args(NamedSlots):
            raise ValueError(
                f"slots {value!r} is not a selection; use {', '.join(get_args(NamedSlots))}, a SlotQuery or indices"
            )
        return value
    if value is None:
        raise ValueError("slots must be a named selection, a SlotQuery or indices, got None")
    found = indices_or_all(value, info)
    return "all" if found is None else found


class LayerAt(Given):
    """One layer, as a fraction of depth."""

    depth: float = Field(ge=0, le=1)

    def index(self, count: int) -> int:
        """The layer it means in a model of `count` layers."""
        return min(math.floor(self.depth * count + 0.5), count - 1)


class LayerBand(Given):
    """Layers by depth: `[low, high)` as fractions of the number of layers, so that it fits any model."""

    band: tuple[float, float]
    inverse: bool = Field(default=False, description="True: every layer but the band")

    def within(self, count: int) -> range:
        """The layers of the band itself in a model of `count` layers, rounded to whole ones; it may be empty."""
        low, high = (round(share * count) for share in self.band)
        return range(low, high)

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
    same tenth of the depth of `of` where one is free (the control for a selection by meaning). With `equally_frequent`
    they are not random: of all slots that are free, those that together lie nearest in depth and are most nearly as
    frequent, by rank in the vocabulary; a tenth of the depth weighs as much as a doubled rank. `at_most` keeps so many
    of what is left, drawn at random. With `in_source` the selection is made in the source alone, and its slots land at
    the same relative places of the target's `of`.
    """

    of: NamedSlots = "all"
    without: NamedSlots | None = None
    fraction: tuple[float, float] | None = None
    keywords: list[str] | None = None
    matched_to: SlotQuery | None = None
    equally_frequent: bool = Field(default=False, exclude_if=is_false)
    at_most: int | None = Field(default=None, ge=1, exclude_if=is_none)
    in_source: bool = False

    @field_validator("keywords")
    @classmethod
    def _keywords_compile(cls, keywords: list[str] | None) -> list[str] | None:
        for keyword in keywords or []:
            try:
                Pattern(keyword)
            except PatternError as error:
                raise ValueError(f"keyword {keyword!r} is not a regular expression: {error}") from None
        return keywords

    @model_validator(mode="after")
    def _fraction_is_ordered(self) -> SlotQuery:
        if self.fraction is not None and not 0 <= self.fraction[0] < self.fraction[1] <= 1:
            raise ValueError(f"fraction must be two numbers with 0 <= low < high <= 1, got {list(self.fraction)}")
        return self

    @model_validator(mode="after")
    def _frequency_is_of_a_match(self) -> SlotQuery:
        if self.equally_frequent and self.matched_to is None:
            raise ValueError("equally_frequent says how slots are matched; it goes with matched_to")
        return self

    @property
    def draws(self) -> bool:
        """Whether chance has a part in what it selects."""
        return self.matched_to is not None or self.at_most is not None


Layers = Annotated[list[int] | LayerBand | LayerAt | Span | None, BeforeValidator(indices_or_all)]
QueryHeads = Annotated[list[int] | Span | None, BeforeValidator(indices_or_all)]
KvHeads = Annotated[list[int] | Span | None, BeforeValidator(indices_or_all)]
Slots = Annotated[NamedSlots | SlotQuery | Span | list[int], BeforeValidator(_slots)]
