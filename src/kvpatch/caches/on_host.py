"""What a cache's labels say, as numbers on the host.

A GPU answers only after all that it was asked before, and stands still until it is asked again. So labels are brought
to the host once, and what is known of a cache's rows is known of a cache of some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")
LENGTHS, OWN, PLAIN = "lengths", "own", "plain"
"""What is read: how many slots of a row are real, the labels of those, or the labels as they are."""
_READ: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Of labels that were read: what tells whether they were changed in place since, and what was read, by what it is."""


def once(labels: Tensor, what: str, read: Callable[[list[Any]], tuple[T, ...]]) -> tuple[T, ...]:
    """What is read off labels, one entry a row; read again only where they were changed in place since.

    Args:
        what: its name, since the same labels may be read for several things.
    """
    known = _known(labels)
    if what not in known:
        known[what] = read(labels.tolist())
    return known[what]


def told(labels: Tensor, what: str, entries: tuple[Any, ...]) -> None:
    """Note what reading labels would give, one entry a row."""
    _known(labels)[what] = entries


def pass_on(whole: Tensor, part: Tensor, rows: Sequence[int] | slice) -> None:
    """Note of labels that are some rows of others what was read off those."""
    for what, entries in _known(whole).items():
        told(part, what, entries[rows] if isinstance(rows, slice) else tuple(entries[row] for row in rows))


def _known(labels: Tensor) -> dict[str, tuple[Any, ...]]:
    """What was read off labels since they were last changed in place. torch counts changes, but not of what was made in
    inference mode, which is compared with what it was."""
    seen = _READ.get(labels)
    if labels.is_inference():
        if seen is None or not torch.equal(seen[0], labels):
            seen = _READ[labels] = labels.clone(), {}
    elif seen is None or seen[0] != labels._version:
        seen = _READ[labels] = labels._version, {}
    return seen[1]
