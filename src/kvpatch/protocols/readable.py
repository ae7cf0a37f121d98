"""What can be read of a protocol that has mistakes, so that those behind them are told in the same call.

pydantic stops at what has the wrong form, and looks at names only where all forms are right. Here each part with a
mistake is put aside, or a plain one is put in its place, and the rest is read. Nothing made here is ever run.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from kvpatch.protocols.hypotheses import Misplaced
from kvpatch.protocols.schema import Protocol

ROUNDS = 5
_STOPS = ("conditions", "phases", "hypotheses")
"""Where one of these is no mapping or list, or is missing, no name can be looked up."""
_MEANWHILE: dict[str, Any] = {"claim": "-", "needs": [], "margin": {"dz": 1.0}, "transform": "none", "family": "-"}
"""What stands for a wrong key of a hypothesis, so that its other names are still looked up."""


@dataclass
class Readable:
    """The protocol as far as it can be read, and what is wrong with the rest.

    Attributes:
        protocol: None where too little is left.
        errors: pydantic's error details, with places of the file's own content.
        names: wrong names of what was read, with places of the file's own content.
        put_aside: places that were left out or replaced, of which nothing more is to be told.
    """

    protocol: Protocol | None = None
    errors: list[Any] = field(default_factory=list)
    names: list[Misplaced] = field(default_factory=list)
    put_aside: set[tuple[int | str, ...]] = field(default_factory=set)
    kept: list[int] = field(default_factory=list)
    """Indices in the file of the hypotheses that were read."""

    def place(self, loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
        """A place of what was read, as a place of the file."""
        if len(loc) > 1 and loc[0] == "hypotheses" and isinstance(loc[1], int) and loc[1] < len(self.kept):
            return ("hypotheses", self.kept[loc[1]], *loc[2:])
        return loc

    def is_new(self, wrong: Misplaced) -> bool:
        """Whether something wrong with what was read is a mistake of the file, and not of what was put aside."""
        loc = wrong.loc
        if loc[:1] == ("families",) and any(place[0] == "hypotheses" for place in self.put_aside):
            return False  # its only hypothesis may be one of those
        rooms = {place[0] for place in self.put_aside if len(place) == 1}
        if str(wrong).startswith("bank ") and ("bank" in rooms or ("pairing" in rooms and loc == ("mode",))):
            return False  # it is held against another bank, or another group, than the file means
        gone = {str(place[-1]) for place in self.put_aside}
        return not any(loc[: len(place)] == place for place in self.put_aside) and not any(
            f"{name!r}" in str(wrong).partition(";")[0] for name in gone
        )


def as_far_as_readable(loaded: dict[str, Any]) -> Readable:
    """Read a protocol's content part by part.

    loaded: what its file says, laid over what it extends.
    """
    content, out = deepcopy(loaded), Readable()
    hypotheses = content.get("hypotheses")
    out.kept = list(range(len(hypotheses))) if isinstance(hypotheses, list) else []
    for _ in range(ROUNDS):
        names: list[Misplaced] = []
        try:
            out.protocol = Protocol.model_validate(content, context=names)
        except ValidationError as error:
            before = {place[:2] for place in out.put_aside}
            details = [{**each, "loc": out.place(each["loc"])} for each in error.errors()]
            out.errors += [each for each in details if each["loc"][:2] not in before]
            if any(len(each["loc"]) == 1 and each["loc"][0] in _STOPS for each in details):
                return out
            _put_aside(content, [each["loc"] for each in details], out)
            continue
        out.names = [Misplaced(str(each), *out.place(each.loc)) for each in names]
        break
    return out


def _put_aside(content: dict[str, Any], locs: list[tuple[int | str, ...]], out: Readable) -> None:
    """Take what is wrong at these places of the file out of the content, or put something plain there."""
    left_out: set[int] = set()
    at = {index: here for here, index in enumerate(out.kept)}  # a file may have thousands of wrong hypotheses
    for loc in locs:
        room, *rest = loc or ("",)
        if room == "hypotheses" and rest and isinstance(rest[0], int):
            key = str(rest[1]) if len(rest) > 1 else ""
            hypothesis = content["hypotheses"][at[rest[0]]] if rest[0] in at else None
            was_mended = ("hypotheses", rest[0], key) in out.put_aside
            if isinstance(hypothesis, dict) and key in _MEANWHILE and not was_mended:
                hypothesis[key] = _MEANWHILE[key]
                out.put_aside.add(("hypotheses", rest[0], key))
            else:
                left_out.add(rest[0])
        elif room == "conditions" and rest:
            content["conditions"][rest[0]] = {"about": "-"}
            out.put_aside.add(("conditions", rest[0]))
        elif room == "phases" and rest:
            _plain_phase(content, str(rest[0]), [str(part) for part in rest[1:2]])
            out.put_aside.add(loc[:3])
        else:
            inner = content.get(str(room))
            if len(rest) and isinstance(inner, dict) and rest[0] in inner:
                del inner[rest[0]]
            elif room in ("protocol", "title", "question"):
                content[str(room)] = "-"
            else:
                content.pop(str(room), None)
            out.put_aside.add(loc[:1])
    for index in left_out & at.keys():
        gone = content["hypotheses"][at[index]]
        out.put_aside.add(("hypotheses", index))
        if isinstance(gone, dict) and "id" in gone:
            out.put_aside.add(("hypotheses", index, str(gone["id"])))
    if left_out:
        content["hypotheses"] = [content["hypotheses"][at[index]] for index in out.kept if index not in left_out]
        out.kept = [index for index in out.kept if index not in left_out]


def _plain_phase(content: dict[str, Any], name: str, keys: list[str]) -> None:
    """The phase with something plain at these keys; it then has every condition, and measures everything."""
    phase = content["phases"].get(name)
    plain = {"question": "-", "n": 1, "conditions": list(content["conditions"]), "attention": True, "geometry": True}
    if not isinstance(phase, dict) or not keys:
        content["phases"][name] = dict(plain)
    elif keys[0] in plain:
        phase[keys[0]] = plain[keys[0]]
        if keys[0] == "conditions":
            phase.pop("controls", None)
    else:
        phase.pop(keys[0], None)
