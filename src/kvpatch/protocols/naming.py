"""How the parts of a protocol may be called: their names become file names, columns and parts of pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvpatch.protocols.hypotheses import Misplaced
from kvpatch.specs.base import wrong_name

if TYPE_CHECKING:
    from kvpatch.protocols.schema import Protocol

MOST_WRONG = 200
"""Names that are looked up for a message; a file of thousands of wrong ones would take minutes."""
RESERVED = {"phase": ("calibration",), "model": ("own",)}
"""What a phase and a model may not be called: the phase of held-out pairs, and run.json's word for the run's model."""


def misnamed(protocol: Protocol) -> Iterator[Misplaced]:
    """Names that could not be a file's, or that kvpatch uses itself."""
    named: list[tuple[str, str, tuple[str | int, ...]]] = [
        *(("phase", name, ("phases", name)) for name in protocol.phases),
        *(("condition", name, ("conditions", name)) for name in protocol.conditions),
        *(("model", name, ("models", name)) for name in protocol.models),
        *(("family", name, ("families", name)) for name in protocol.families),
        *(("hypothesis", h.id, ("hypotheses", place, "id")) for place, h in enumerate(protocol.hypotheses)),
        *(("family", h.family, ("hypotheses", place, "family")) for place, h in enumerate(protocol.hypotheses)),
    ]
    for kind, name, loc in named:
        if told := wrong_name(kind, name, RESERVED.get(kind, ())):
            yield Misplaced(told, *loc)
