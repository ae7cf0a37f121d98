"""pydantic's errors, which take several lines, in one sentence."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from kvpatch.specs.arguments import shown
from kvpatch.specs.nearest import nearest

_PLAINLY = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "list_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
}
"""pydantic's kinds of error -> what was expected, where its own words are those of a programmer."""


_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
"""pydantic's kinds of error about a limit -> words, and where it says the limit."""


def sentence(details: Any) -> str:
    """What one of pydantic's error details says, with the value that was wrong."""
    if details["type"].startswith("bool"):
        return f"must be True or False, not {shown(details['input'])}"
    if details["type"] in _PLAINLY:
        return f"{_PLAINLY[details['type']]}, not {shown(details['input'])}"
    if details["type"] in _LIMITS:
        word, key = _LIMITS[details["type"]]
        return f"must be {word} {details['ctx'][key]:g}, not {shown(details['input'])}"
    message = details["msg"].removeprefix("Value error, ")
    return message if details["type"] == "value_error" else f"{message}, not {shown(details['input'])}"


def refusal_of(error: ValidationError, of: type[BaseModel]) -> str:
    """What is wrong with the arguments of a data type, in one line: the type, the field and what is expected there."""

    found = error.errors()
    other_forms = {e["loc"][:-1] for e in found if e["type"] in ("extra_forbidden", "missing")}

    def weight(details: Any) -> tuple[bool, int, bool, bool]:
        # Of the forms that a field may have, the one that was meant is the one that was followed deepest.
        loc, kind = details["loc"], details["type"]
        return kind == "value_error", len(loc), loc[:-1] not in other_forms, kind == "extra_forbidden"

    first = max(found, key=weight)
    at = [str(part) for part in first["loc"] if isinstance(part, int) or (part.isidentifier() and part.islower())]
    if first["type"] == "extra_forbidden":
        if len(at) > 1:
            return f"{of.__name__}: there is no {'.'.join(at)!r}"
        near = nearest(at[0], of.model_fields)
        meant = f"; did you mean {near!r}?" if near else ""
        return f"{of.__name__}: there is no {at[0]!r}; it has {', '.join(of.model_fields)}{meant}"
    if first["type"] == "missing":
        return f"{of.__name__}: {'.'.join(at)!r} is missing"
    told = sentence(first)
    is_named = first["type"] == "value_error" or not at
    return " ".join((f"{of.__name__}: {told}" if is_named else f"{of.__name__}: {'.'.join(at)}: {told}").split())
