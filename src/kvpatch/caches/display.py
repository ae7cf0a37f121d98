"""How a cache shows itself in a notebook: short, in text and in HTML."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvpatch import errors
from kvpatch.errors import as_html

MOST_ROWS, MOST_SLOTS = 4, 60
_COLOURS = ("#e8e8e8", "#dbe7f6", "#fdf0cd", "#e3f1e0")
"""Of bos, template, body and trailer."""


class Layers(tuple[Tensor, ...]):
    """One tensor a layer. It prints the shapes; a layer prints its numbers."""

    def __repr__(self) -> str:
        kinds = dict.fromkeys(f"{list(layer.shape)} {str(layer.dtype).removeprefix('torch.')}" for layer in self)
        return f"<{len(self)} layers of {', '.join(kinds) or 'nothing'}>"


def shortened(numbers: Sequence[int]) -> str:
    """A list of numbers of which a long one shows its ends."""
    return str(list(numbers)) if len(numbers) <= 8 else f"[{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}]"


def cache_as_html(title: str, pieces: Sequence[Sequence[str]], segments: Sequence[Sequence[int]]) -> str:
    """The shape of a cache, and the tokens of its first rows, coloured by segment."""
    rows = [_row(row, codes) for row, codes in zip(pieces[:MOST_ROWS], segments[:MOST_ROWS], strict=True)]
    more = f"<p>and {len(pieces) - MOST_ROWS} more rows</p>" if len(pieces) > MOST_ROWS else ""
    return f"<p><code>{as_html(title)}</code></p>{''.join(rows)}{more}"


def _row(pieces: Sequence[str], segments: Sequence[int]) -> str:
    shown = "".join(
        f'<span style="background:{_COLOURS[code % len(_COLOURS)]};color:#222;margin-right:1px" title="slot {slot}">'
        f"{as_html(visible(piece))}</span>"
        for slot, (piece, code) in enumerate(zip(pieces[:MOST_SLOTS], segments[:MOST_SLOTS], strict=True))
    )
    more = f" and {len(pieces) - MOST_SLOTS} more" if len(pieces) > MOST_SLOTS else ""
    return f'<p style="font-family:monospace">{shown}{more}</p>'


def visible(piece: str) -> str:
    """A token's text on one line."""
    return errors.visible(piece).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") or "∅"
