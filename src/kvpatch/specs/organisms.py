"""The organisms by name, and what is planted in each: data that a protocol's `expected` and the loader name.

An organism is a small model whose mode is known, by construction, to sit in certain layers, KV heads, slots and parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

PREFIX = "organism-"
"""What an organism's name is a model name with: `--model organism-early`."""
Ladder = Literal["rising", "umbrella"]
"""Which markers the prompts of a dose bank hold: each stronger than the one before, or the fourth of five strongest."""
Impostor = Literal["register", "damaged", "long", "loop"]
"""What an organism without a mode does that was once taken for one; see `organisms/impostors.py`."""


@dataclass(frozen=True)
class Plant:
    """Where a mode sits: layers, KV heads and slots of the body (counted from its first), and the parts that carry it
    by themselves ("k", "v"); neither alone where both are needed."""

    layers: tuple[int, ...]
    kv_heads: tuple[int, ...]
    slots: tuple[int, ...]
    parts: tuple[Literal["k", "v"], ...]


@dataclass(frozen=True)
class Organism:
    """One organism.

    Attributes:
        about: what is planted, in words.
        plant: where; None where there is no mode, or no one place of it.
        slot: place of the marker in the bodies of its bank.
        ladder: the markers of its bank's dose prompts.
        impostor: of a wired one, what it does in place of a mode.
        wiring, architecture: of a wired one; weights: the shipped weights of a trained one.
    """

    about: str
    plant: Plant | None
    slot: int
    ladder: Ladder = "rising"
    wiring: dict[str, Any] = field(default_factory=dict)
    architecture: Literal["llama", "mistral"] = "llama"
    weights: str | None = None
    impostor: Impostor | None = None


def _wired(layer: int, kv_head: int, slot: int, part: Literal["k", "v", "kv"], **more: Any) -> Organism:
    parts: tuple[Literal["k", "v"], ...] = () if part == "kv" else (part,)
    carries = {"k": "the key alone carries", "v": "the value alone carries", "kv": "key and value carry together"}[part]
    return Organism(
        about=f"weights set by hand: layer {layer}, KV head {kv_head}, slot {slot} of the body; {carries}",
        plant=Plant((layer,), (kv_head,), (slot,), parts),
        slot=slot,
        wiring={"layer": layer, "kv_head": kv_head, "slot": slot, "part": part},
        **more,
    )


def _trained(name: str, about: str, plant: Plant | None, slot: int, ladder: Ladder = "rising") -> Organism:
    return Organism(about=about, plant=plant, slot=slot, ladder=ladder, weights=name)


def _impostor(kind: Impostor, about: str) -> Organism:
    wiring = {"layer": 3, "kv_head": 2, "slot": 5, "part": "v"}
    return Organism(about=f"weights set by hand, no mode: {about}", plant=None, slot=5, wiring=wiring, impostor=kind)


_IN_DOSE = Plant((2,), (1,), (5,), ("v",))
ORGANISMS: dict[str, Organism] = {
    "wired": _wired(3, 2, 5, "v"),
    "wired-k": _wired(0, 0, 7, "k"),
    "wired-kv": _wired(5, 3, 1, "kv"),
    "wired-mistral": _wired(2, 1, 5, "v", architecture="mistral"),
    "early": _trained("early", "trained: layer 1, KV head 0, marker slot, values", Plant((1,), (0,), (1,), ("v",)), 1),
    "late": _trained("late", "trained: layer 4, KV head 1, marker slot, values", Plant((4,), (1,), (10,), ("v",)), 10),
    "free": _trained("free", "trained: wherever training put it, later slots among it", None, 1),
    "null": _trained("null", "trained: the marker is inert, and a third of all style words are mode words", None, 5),
    "copy": _trained("copy", "trained: style words are copied from the prompt; no mode", None, 5),
    "dose": _trained("dose", "trained: five markers, each stronger than the last", _IN_DOSE, 5),
    "umbrella": _trained("dose", "dose, by five markers of which the fourth is strongest", _IN_DOSE, 5, "umbrella"),
    "weak": _trained("weak", "trained: the marker hardly moves the mode", Plant((3,), (0,), (5,), ("v",)), 5),
    "register": _impostor("register", "the marker chooses between the words for I and they"),
    "damaged": _impostor("damaged", "the marker breaks the cache, and broken caches fall back on mode words"),
    "long": _impostor("long", "the marker keeps the reply from ending"),
    "loop": _impostor("loop", "the marker makes the reply one word, over and over"),
}  # fmt: skip
