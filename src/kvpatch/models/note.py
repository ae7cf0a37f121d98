"""The note beside a converted model, kvpatch.json: what it was made from, and size, time and hash of every file.

A cache that was damaged or edited is refused. Files are hashed again only where their size or time has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kvpatch.errors import ModelError
from kvpatch.files import read_json, write_whole

NOTE = "kvpatch.json"


def write_note(directory: Path, about: dict[str, Any]) -> None:
    """Write the note of a directory that has just been made."""
    files = [path for path in sorted(directory.iterdir()) if path.is_file() and path.name != NOTE]
    _write(directory, {**about, "files": _described(files)})


def refuse_changed(directory: Path, name: str | None = None) -> None:
    """Refuse a converted model whose files are not those of its note.

    name: of a named model, which can be pulled again.

    Raises:
        ModelError: naming the files.
    """
    try:
        note = read_json(directory / NOTE)
        known: dict[str, dict[str, Any]] = note.get("files") or _of_older(directory, note)
        changed = [
            name for name, file in known.items() if _stamp(directory / name) != (file["bytes"], file["mtime_ns"])
        ]
        found = _described([directory / name for name in changed])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _refusal(directory, name, f"its note {NOTE} or a file it names can't be read") from error
    bad = [name for name in changed if found[name]["sha256"] != known[name]["sha256"]]
    bad += sorted({path.name for path in directory.glob("*.safetensors")} - set(known))
    if bad:
        raise _refusal(directory, name, f"{', '.join(bad)} {'is' if len(bad) == 1 else 'are'} not what was written")
    if changed or "files" not in note:
        # A cache that can't be written to is hashed again the next time.
        with contextlib.suppress(OSError):
            _write(directory, {**note, "files": known | found})


def _refusal(directory: Path, name: str | None, why: str) -> ModelError:
    again = f", or run `kvpatch pull {name} --again`" if name else ""
    return ModelError(
        f"the converted model in {directory} was changed: {why}; delete that directory to convert it again{again}"
    )


def _of_older(directory: Path, note: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What an older note, with one hash for all weights, says of the files: that they are as they are, if they fit."""
    described = _described(sorted(path for path in directory.iterdir() if path.is_file() and path.name != NOTE))
    total = hashlib.sha256()
    for name, file in described.items():
        if name.endswith(".safetensors"):
            total.update(name.encode() + bytes.fromhex(file["sha256"]))
    if total.hexdigest() != note["weights_sha256"]:
        raise ValueError(f"the weights in {directory} do not have the hash of the note")
    return described


def _described(paths: list[Path]) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor(max_workers=8) as threads:  # hashing lets go of the interpreter
        digests = list(threads.map(_digest, paths))
    return {
        path.name: dict(zip(("bytes", "mtime_ns"), _stamp(path), strict=True)) | {"sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }


def _stamp(path: Path) -> tuple[int, int]:
    at = path.stat()
    return at.st_size, at.st_mtime_ns


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(directory: Path, note: dict[str, Any]) -> None:
    write_whole(directory / NOTE, json.dumps(note, indent=1).encode())
