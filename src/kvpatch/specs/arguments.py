"""What a caller may give: numbers, indices, seeds and token ids. Whatever can't be meant is refused in one line.

Python's own numbers, NumPy's and torch's are taken alike. A boolean is no number here: in a list it is a mask, and
where a mask can't be meant it is refused. Needs no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

from kvpatch.errors import CacheError, KvpatchError, ProtocolError

LEAST_TEMPERATURE = 1e-30
"""Logits are divided by the temperature in float32, which holds no number above 3.4e38."""

Refusal = type[KvpatchError]


def shown(value: object) -> str:
    """A value as it stands in a message: one line of at most 80 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer of too many digits, or an object that can't tell what it is
        text = f"a {type(value).__name__} that can't be printed"
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain(value: Any) -> Any:
    """NumPy's and torch's numbers and arrays as Python's own."""
    return value.tolist() if hasattr(value, "tolist") else value


def refuse_other(name: str, value: object, kind: type) -> None:
    """Refuse what is not of a type.

    Raises:
        CacheError: naming what it is.
    """
    if not isinstance(value, kind):
        raise CacheError(f"{name} must be a {kind.__name__}, got {type(value).__name__} {shown(value)}")


def whole(
    name: str, value: object, *, least: int | None = None, most: int | None = None, error: Refusal = CacheError
) -> int:
    """A whole number within bounds, both included.

    Raises:
        KvpatchError: of the type given by `error`, for anything else.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise error(f"{name} must be a whole number, got {shown(value)}")
    if least is not None and number < least:
        raise error(f"{name} must be at least {least}, got {shown(number)}")
    if most is not None and number > most:
        raise error(f"{name} must be at most {most}, got {shown(number)}")
    return number


def real(name: str, value: object, *, error: Refusal = CacheError) -> float:
    """A finite number.

    Raises:
        KvpatchError: of the type given by `error`, for anything else.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not _is_finite(number):
        raise error(f"{name} must be a finite number, got {shown(value)}")
    return float(number)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number that no float holds
        return False


def path(name: str, value: object, *, error: Refusal = CacheError) -> str:
    """A path, as text.

    Raises:
        KvpatchError: of the type given by `error`, for what is neither text nor a `Path`.
    """
    found = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(found, str) or "\0" in found:
        raise error(f"{name} must be a path, got {shown(value)}")
    return found


def unicode_text(name: str, value: object, *, error: Refusal = CacheError) -> str:
    """A text of whole letters; half of one (a lone surrogate) no tokenizer reads.

    Raises:
        KvpatchError: of the type given by `error`, for anything else.
    """
    if not isinstance(value, str):
        raise error(f"{name} must be text, got {shown(value)}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise error(f"{name} holds half a letter (a lone surrogate), which no tokenizer reads: {shown(value)}")
    return value


def switch(name: str, value: object, *, error: Refusal = CacheError) -> bool:
    """True or False.

    Raises:
        KvpatchError: of the type given by `error`, for anything else.
    """
    found = plain(value)
    if not isinstance(found, bool):
        raise error(f"{name} must be True or False, got {shown(value)}")
    return found


def temperature(value: object, *, error: Refusal = CacheError) -> float:
    """A temperature: 0, or a number that float32 logits can be divided by.

    Raises:
        KvpatchError: of the type given by `error`, for anything else.
    """
    number = real("temperature", value, error=error)
    if number < 0:
        raise error(f"temperature must be at least 0, got {number}")
    if 0 < number < LEAST_TEMPERATURE:
        raise error(f"temperature must be 0 (greedy) or at least {LEAST_TEMPERATURE}, got {number}")
    return number


def sampling(given_temperature: object, given_top_p: object) -> tuple[float, float]:
    """A temperature and a top_p.

    Raises:
        ProtocolError: for anything else.
    """
    number, share = plain(given_temperature), plain(given_top_p)
    for name, value in (("temperature", number), ("top_p", share)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ProtocolError(f"{name} must be a number, got {shown(value)}")
    if not number >= 0 or not 0 < share <= 1:
        raise ProtocolError(
            f"temperature must be at least 0 and top_p in (0, 1], got {shown(number)} and {shown(share)}"
        )
    return temperature(number, error=ProtocolError), float(share)


def whole_numbers(name: str, value: object) -> list[int]:
    """A list of whole numbers, of any collection or array of them; one number is a list of one.

    Raises:
        CacheError: for text, fractions, booleans, nested lists and everything that is no collection.
    """
    found = plain(value)
    if isinstance(found, int) and not isinstance(found, bool):
        return [found]
    if isinstance(found, (str, bytes, dict)) or not isinstance(found, Iterable):
        raise CacheError(f"{name} must be whole numbers, got {shown(value)}")
    items = [plain(item) for item in found]
    if any(isinstance(item, bool) for item in items):
        raise CacheError(
            f"{name} must be whole numbers, got booleans; give the indices that a mask marks, as numpy.flatnonzero does"
        )
    if bad := [item for item in items if not isinstance(item, int)]:
        raise CacheError(f"{name} must be whole numbers, got {shown(bad[0])} among them")
    return items


def chosen_rows(value: object, count: int) -> list[int]:
    """Rows of a batch that a caller means, from 0.

    Args:
        value: an index, several, a slice, or a mask of one boolean a row. Negative indices count from the end.
        count: rows of the batch.
    Raises:
        CacheError: for a row that there is not, a mask of another length, or anything else.
    """
    if isinstance(value, slice):
        try:
            found = list(range(count))[value]
        except (TypeError, ValueError):
            raise CacheError(f"rows must be cut by whole numbers, got {shown(value)}") from None
    else:
        listed = plain(value)
        items = [plain(item) for item in listed] if isinstance(listed, (list, tuple)) else None
        if items and all(isinstance(item, bool) for item in items):
            if len(items) != count:
                raise CacheError(f"a mask of {len(items)} booleans does not fit a batch of {count}")
            found = [row for row, is_chosen in enumerate(items) if is_chosen]
        else:
            found = whole_numbers("rows", value)
    if not found or any(not -count <= row < count for row in found):
        raise CacheError(f"rows {shown(found)} are not in a batch of {count}")
    return [row % count for row in found]


def indices_of_slice(name: str, cut: slice) -> list[int] | dict[str, int | None]:
    """The indices that a slice means; of one that means others in every model, such as [4:], its start, stop and step.

    Raises:
        CacheError: for a slice by anything but whole numbers, or in steps below 1.
    """
    start, stop, step = (plain(part) for part in (cut.start, cut.stop, cut.step))
    if any(part is not None and (isinstance(part, bool) or not isinstance(part, int)) for part in (start, stop, step)):
        raise CacheError(f"{name} must be cut by whole numbers, got {cut}")
    if step is not None and step < 1:
        raise CacheError(f"{name} must be cut in steps of at least 1, got {cut}")
    first = 0 if start is None else start
    if stop is None and first < 0:
        return list(range(first, 0, step or 1))
    if stop == 0:
        return []
    if stop is None or (first < 0) != (stop < 0):
        return {"start": start, "stop": stop, "step": step}
    return list(range(first, stop, step or 1))


def seeds(value: object, count: int) -> list[int]:
    """One seed a row, each a whole number of 64 bits with a sign.

    Raises:
        CacheError: for anything else.
    """
    found = plain(value)
    if isinstance(found, (str, bytes, dict)) or not isinstance(found, Iterable):
        raise CacheError(f"seeds must be one whole number a row, {count} in all, got {shown(value)}")
    rows = [whole("a seed", seed, least=-(2**63), most=2**63 - 1) for seed in found]
    if len(rows) != count:
        raise CacheError(f"{len(rows)} seeds for a batch of {count}; give one a row")
    return rows


def token_ids(what: str, value: object, vocabulary: int) -> list[int]:
    """Token ids that a model has.

    Raises:
        CacheError: for anything else, the first such id named.
    """
    if isinstance(value, set | frozenset):
        raise CacheError(f"{what} must be in an order, got {shown(value)}")
    ids = whole_numbers(what, value)
    refuse_foreign_tokens(what, ids, vocabulary)
    return ids


def refuse_foreign_tokens(what: str, ids: Sequence[int], vocabulary: int) -> None:
    """Refuse token ids that are not in a vocabulary.

    Raises:
        CacheError: naming the first.
    """
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        bad = next(token for token in ids if not 0 <= token < vocabulary)
        raise CacheError(f"{what} hold token id {bad}; the model's vocabulary goes from 0 to {vocabulary - 1}")
