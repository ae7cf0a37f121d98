"""Slices whose meaning waits for the model: `slice(16, None)` is every layer from 16 on, however many there are."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, ValidationInfo, model_validator

from kvpatch.specs.arguments import indices_of_slice, whole_numbers
from kvpatch.specs.base import Given, is_none


class Span(Given):
    """Indices `[start, stop)` in steps, as a slice of Python: what is left out is the end, negative counts from there.

    In Python a slice says the same; in YAML write `layers: {start: 16}`.
    """

    start: int | None = Field(default=None, exclude_if=is_none)
    stop: int | None = Field(default=None, exclude_if=is_none)
    step: int | None = Field(default=None, ge=1, exclude_if=is_none)

    @model_validator(mode="after")
    def _says_something(self) -> Span:
        if self.start is None and self.stop is None and self.step is None:
            raise ValueError("a span needs start, stop or step; leave it out for all")
        return self

    def within(self, count: int) -> range:
        """The indices it means of `count` things; there may be none."""
        return range(count)[self.start : self.stop : self.step]

    def __repr__(self) -> str:
        return repr(slice(self.start, self.stop, self.step))


def indices_or_all(value: Any, info: ValidationInfo) -> Any:
    """Indices as a list of Python's numbers; None for all; what is no collection stays as it is. A slice that has no
    end, or counts from it, becomes a `Span`."""
    name = str(info.field_name)
    if isinstance(value, slice):
        found = None if value == slice(None) else indices_of_slice(name, value)
        return Span(**found) if isinstance(found, dict) else found
    if value is None or isinstance(value, (dict, BaseModel)):
        return value
    if isinstance(value, str):
        if value != "all":
            raise ValueError(f"{name} must be whole numbers or 'all', got {value!r}")
        return None
    return whole_numbers(name, value)
