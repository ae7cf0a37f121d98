"""What a cache's labels say, as numbers on the host.

A GPU answers only after all that it was asked before, and stands still until it is asked again. So labels are brought
to the host once, and what is known of a cache's rows is known of a cache of some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")
_READ: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Of labels that were read: how often they had been changed in place by then, and what was read."""


def once(labels: Tensor, read: Callable[[list[Any]], T]) -> T:
    """What is read off labels, again only where they were changed in place since."""
    known = _READ.get(labels)
    if known is None or known[0] != _changes(labels):
        known = _READ[labels] = _changes(labels), read(labels.tolist())
    return known[1]


def told(labels: Tensor, known: tuple[Any, ...]) -> None:
    """Note what reading labels would give."""
    _READ[labels] = _changes(labels), known


def pass_on(whole: Tensor, part: Tensor, rows: Sequence[int] | slice) -> None:
    """Note of labels that are some rows of others what was read off those, if it was."""
    known = _READ.get(whole)
    if known is not None and known[0] == _changes(whole):
        told(part, known[1][rows] if isinstance(rows, slice) else tuple(known[1][row] for row in rows))


def _changes(labels: Tensor) -> int:
    """How often a tensor was changed in place; torch does not count it for what is made in inference mode."""
    return 0 if labels.is_inference() else labels._version
