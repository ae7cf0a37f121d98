"""The organisms by name, what was planted in each, and their model directories.

A directory is written once, into the user's cache, from the wiring or from the shipped weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvpatch.errors import ModelError
from kvpatch.organisms.language import DOSE, UMBRELLA

WEIGHTS = Path(__file__).parent / "shipped"
PREFIX = "organism-"
"""What an organism's name is a model name with: `--model organism-early`."""


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
        dose: markers of its bank's ladder.
        wiring, architecture: of a wired one; weights: the shipped weights of a trained one.
    """

    about: str
    plant: Plant | None
    slot: int
    dose: tuple[str, ...] = DOSE
    wiring: dict[str, Any] = field(default_factory=dict)
    architecture: Literal["llama", "mistral"] = "llama"
    weights: str | None = None


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


def _trained(name: str, about: str, plant: Plant | None, slot: int, dose: tuple[str, ...] = DOSE) -> Organism:
    return Organism(about=about, plant=plant, slot=slot, dose=dose, weights=name)


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
    "umbrella": _trained("dose", "dose, by five markers of which the fourth is strongest", _IN_DOSE, 5, UMBRELLA),
    "weak": _trained("weak", "trained: the marker hardly moves the mode", Plant((3,), (0,), (5,), ("v",)), 5),
}  # fmt: skip


def organism_directory(name: str, cache: Path, weights: Path = WEIGHTS) -> Path:
    """The model directory of an organism, written into the cache where it is not there yet.

    Raises:
        ModelError: where it can't be written.
    """
    organism = ORGANISMS[name]
    home = cache / "organisms" / f"{name}-{_key(organism, weights)}"
    if home.exists():
        return home
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent, prefix=".part-") as folder:
            made = write_organism(organism, Path(folder) / "model", weights)
            try:
                os.replace(made, home)
            except OSError:  # another process was first
                if not home.exists():
                    raise
    except OSError as error:
        raise ModelError(
            f"{home.parent}: {error.strerror or error}; set KVPATCH_CACHE to a directory with room"
        ) from error
    return home


def write_organism(organism: Organism, folder: Path, weights: Path = WEIGHTS) -> Path:
    """Write one organism as a model directory."""
    from kvpatch.organisms.wired import Wiring, wire, write_directory

    if organism.weights is None:
        return write_directory(wire(Wiring(**organism.wiring), organism.architecture), folder)
    from kvpatch.organisms.weights import load_weights

    return write_directory(load_weights(weights / f"{organism.weights}.safetensors"), folder)


def _key(organism: Organism, weights: Path) -> str:
    """Sixteen hex digits that change with anything the directory is made from."""
    total = hashlib.sha256(json.dumps([organism.wiring, organism.architecture], sort_keys=True).encode())
    here = Path(__file__).parent
    for path in (here / "wired.py", here / "language.py", weights / f"{organism.weights}.safetensors"):
        if path.exists():
            total.update(path.read_bytes())
    return total.hexdigest()[:16]
