"""The model directories of organisms, each written once into the user's cache, by its wiring or its shipped weights."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from kvpatch.errors import ModelError
from kvpatch.files import held
from kvpatch.models.makers import register_maker
from kvpatch.models.named import part_of
from kvpatch.models.note import refuse_changed, write_note
from kvpatch.specs.organisms import ORGANISMS, PREFIX, Organism

WEIGHTS = Path(__file__).parent / "shipped"


def organism_directory(name: str, cache: Path, weights: Path = WEIGHTS) -> Path:
    """The model directory of an organism, written into the cache where it is not there yet.

    Raises:
        ModelError: where it can't be written.
    """
    organism = ORGANISMS[name]
    home = cache / "organisms" / f"{name}-{_key(organism, weights)}"
    if _is_whole(home):
        return home
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with held(Path(f"{home}.lock")), part_of(home) as folder:
            if _is_whole(home):  # another process was first
                return home
            made = write_organism(organism, folder / "model", weights)
            write_note(made, {"organism": name})
            if home.exists():
                os.replace(home, folder / "before")
            os.replace(made, home)
    except OSError as error:
        raise ModelError(
            f"{home.parent}: {error.strerror or error}; set KVPATCH_CACHE to a directory with room"
        ) from error
    return home


def _is_whole(home: Path) -> bool:
    """Whether an organism was written, and its files are still what was written; what is damaged is written again."""
    if not home.exists():
        return False
    try:
        refuse_changed(home)
    except ModelError:
        return False
    return True


def write_organism(organism: Organism, folder: Path, weights: Path = WEIGHTS) -> Path:
    """Write one organism as a model directory."""
    from kvpatch.organisms.impostors import disguise
    from kvpatch.organisms.wired import Wiring, wire, write_directory

    if organism.weights is None:
        hf = wire(Wiring(**organism.wiring), organism.architecture)
        return write_directory(hf if organism.impostor is None else disguise(hf, organism.impostor), folder)
    from kvpatch.organisms.weights import load_weights

    return write_directory(load_weights(weights / f"{organism.weights}.safetensors"), folder)


def _key(organism: Organism, weights: Path) -> str:
    """Sixteen hex digits that change with anything the directory is made from."""
    total = hashlib.sha256(
        json.dumps([organism.wiring, organism.architecture, organism.impostor], sort_keys=True).encode()
    )
    here = Path(__file__).parent
    for path in (
        here / "wired.py",
        here / "impostors.py",
        here / "language.py",
        weights / f"{organism.weights}.safetensors",
    ):
        if path.exists():
            total.update(path.read_bytes())
    return total.hexdigest()[:16]


register_maker(PREFIX, ORGANISMS, organism_directory)
