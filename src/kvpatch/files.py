"""Files that several packages share: YAML and JSON within limits, locks, and the directory for what is kept."""

from __future__ import annotations

import errno
import functools
import json
import operator
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import platformdirs
import yaml

try:
    import fcntl
except ImportError:  # Windows, where locks of our kind are msvcrt's, which filelock takes
    fcntl = None

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Reads banks, lexicons and protocols without running anything; in C where libyaml is installed, ten times as fast."""


MOST_BYTES = 4 << 20
"""Of a file of YAML; the largest that is shipped has 0.2 MB."""
MOST_JSON = 256 << 20
"""Bytes of a file of JSON, such as the record of a run."""
MOST_NODES = 150_000
"""Of a file of YAML, aliases written out: keys, values and collections."""
MOST_DEPTH = 60
"""Collections within collections."""
MOST_OF_A_NUMBER = 400
"""Letters; one to base 60, such as 1:1:1, takes a time that grows with their square."""
_NO_NUMBER = re.compile(r"[^-+0-9a-fA-F_:.xo]")
"""What no number of YAML holds."""


class NotYaml(ValueError):
    """A text is no YAML, or more of it than is read; `line` is where, from 1, where that is known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def read_yaml(content: bytes | str) -> Any:
    """What a text in YAML says. Size, depth and aliases are limited before anything is built.

    Raises:
        NotYaml: where it is none, or past a limit.
    """
    return _built(content, lambda: yaml.load(content, Loader=LOADER))


def yaml_nodes(content: bytes | str) -> tuple[yaml.Node | None, Any]:
    """The nodes of a text in YAML, each of which knows its line, and what the text says; limited as `read_yaml` is.

    Raises:
        NotYaml: where it is none, or past a limit.
    """
    return _built(content, lambda: (yaml.compose(content, Loader=LOADER), yaml.load(content, Loader=LOADER)))


def _built(content: bytes | str, build: Callable[[], Any]) -> Any:
    try:
        _refuse_too_much(content)
        return build()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        told = getattr(error, "problem", None) or " ".join(str(error).split())
        raise NotYaml(str(told), None if mark is None else mark.line + 1) from error
    except (ValueError, OverflowError, RecursionError, TypeError, AttributeError) as error:
        if isinstance(error, NotYaml):
            raise
        raise NotYaml(f"a value in it can't be read: {' '.join(str(error).split())[:200]}") from error


def _refuse_too_much(content: bytes | str) -> None:
    """Go through the events of a text, which cost little, before they are built into nodes and values."""
    if len(content) > MOST_BYTES:
        raise NotYaml(f"it has {len(content):,} bytes, and may have {MOST_BYTES:,}")
    sizes: dict[str, int] = {}  # anchor -> nodes that it stands for, aliases within written out
    open_: list[tuple[str | None, int]] = []  # collections that have begun: anchor, and the count before each
    count = 0
    for event in yaml.parse(content, Loader=LOADER):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, count))
            count += 1
            if len(open_) > MOST_DEPTH:
                raise NotYaml(f"more than {MOST_DEPTH} collections stand within one another", line)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in open_):
                raise NotYaml(f"the alias {event.anchor!r} stands within what it stands for", line)
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            _refuse_long_number(event, line)
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if count > MOST_NODES:
            raise NotYaml(f"it has more than {MOST_NODES:,} keys and values, those of aliases counted", line)


def _refuse_long_number(event: yaml.ScalarEvent, line: int) -> None:
    may_be_number = event.style not in ("'", '"', "|", ">") or event.tag is not None
    if len(event.value) > MOST_OF_A_NUMBER and may_be_number and not _NO_NUMBER.search(event.value):
        raise NotYaml(f"a number has {len(event.value):,} letters, and may have {MOST_OF_A_NUMBER}", line)


def _flags(*names: str) -> int:
    """Flags for opening a file, those left out that the system does not have."""
    return functools.reduce(operator.or_, (getattr(os, name, 0) for name in names))


def open_flags(*, is_new: bool) -> int:
    """Flags to write a file through no symbolic link: one that is not there yet, or any."""
    return _flags("O_CREAT", "O_NOFOLLOW", "O_BINARY") | (os.O_WRONLY | os.O_EXCL if is_new else os.O_RDWR)


def flush_folder(folder: Path) -> None:
    """Flush a folder's own entries to the disk, where the system lets a folder be opened (Windows does not)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_held(path: Path) -> bool:
    """Whether a process holds a lock file; where it is free it is let go again at once."""
    if fcntl is None:
        if not path.exists():
            return False
        lock = filelock.FileLock(path, timeout=0)
        try:
            lock.acquire()
        except (filelock.Timeout, OSError):
            return True
        lock.release()
        return False
    try:
        handle = os.open(path, os.O_RDONLY | _flags("O_NONBLOCK"))
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(handle, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks, on which no run is written
        return False
    finally:
        os.close(handle)
    return False


def bytes_within(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file, or as much of it as shows that it is too long for its reader.

    Raises:
        OSError: where it can't be read, or is no regular file, such as a pipe, which might never end.
    """
    try:
        handle = os.open(path, os.O_RDONLY | _flags("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    except ValueError as error:  # a zero byte, or a letter that no name of a file can have
        raise FileNotFoundError(errno.ENOENT, "no file can have this name") from error
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return file.read(most + 1)


def read_json(path: Path) -> Any:
    """What a file of JSON says.

    Raises:
        OSError: where it can't be read.
        ValueError: where it is no JSON, too large or too deeply nested.
    """
    content = bytes_within(path, MOST_JSON)
    if len(content) > MOST_JSON:
        raise ValueError(f"it has more than {MOST_JSON:,} bytes")
    return parse_json(content)


def parse_json(content: bytes | str) -> Any:
    """What a text of JSON says.

    Raises:
        ValueError: where it is no JSON, or too deeply nested.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is too deeply nested") from None


def write_whole(path: Path, content: bytes, *, is_flushed: bool = False) -> None:
    """Write a file so that another process sees all of it or what was there before; make its directory where needed.

    It is written beside its place, under a name of its own that is locked meanwhile, and moved there. What a killed
    process left beside the same place is taken away.

    is_flushed: whether file and name are on the disk when this returns. What is kept in a cache can be made again.

    Raises:
        OSError: where it can't be written, or is a device or a pipe; what was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not (path.is_file() or path.is_dir()):  # moving a file there would take /dev/null away
        raise OSError(errno.EINVAL, f"{path.name} is no regular file")
    _clear_leftovers(path)
    part = path
    try:
        part, handle = _begun_beside(path)
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            if is_flushed:
                os.fsync(file.fileno())
            os.replace(part, path)
    except BaseException:
        if part != path:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        raise
    if is_flushed:
        flush_folder(path.parent)


def is_beside(name: str, of: str = "") -> bool:
    """Whether a file of a directory is one that `write_whole` had not moved into its place, whose name is `of`."""
    return name.startswith(f".{of}") and name.endswith(".tmp")


def _begun_beside(path: Path) -> tuple[Path, int]:
    """A new file beside a place, and a handle to write it, which holds its lock where there are locks."""
    for _ in range(100):
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        handle = os.open(part, open_flags(is_new=True), 0o666)
        if fcntl is None:
            return part, handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process took it for a leftover before its lock was held
            os.close(handle)
            continue
        except OSError:  # no locks here: nobody takes it away
            pass
        return part, handle
    raise OSError(errno.EBUSY, f"{path} is written by many processes at once")


def _clear_leftovers(path: Path) -> None:
    """Take away what was written beside a place by processes that are no more; their locks are gone with them."""
    if fcntl is None:
        return
    with suppress(OSError), os.scandir(path.parent) as entries:
        for name in [entry.name for entry in entries if is_beside(entry.name, f"{path.name}.")]:
            left = path.with_name(name)
            with suppress(OSError), open(os.open(left, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


def cache_directory() -> Path:
    """Where converted models, organisms and validations are kept: $KVPATCH_CACHE, or the user's cache directory."""
    return Path(os.environ.get("KVPATCH_CACHE") or platformdirs.user_cache_dir("kvpatch"))


def remember_tokenizer(sha256: str, place: Path) -> None:
    """Note in the user's cache, which is not published as a run is, where the tokenizer of a hash lies."""
    with suppress(OSError):
        write_whole(cache_directory() / "tokenizers" / sha256, str(place.resolve()).encode())


def known_tokenizer(sha256: str) -> list[Path]:
    """Where the tokenizer of a hash was when it was last used here; empty where that is not known."""
    try:
        return [Path((cache_directory() / "tokenizers" / sha256).read_text("utf-8"))]
    except (OSError, ValueError):
        return []


def is_directory(path: Path) -> bool:
    """Whether there is such a directory; a path that the system can't look up, such as one too long, is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """The same of a file."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def leaves(folder: Path, name: str, pattern: str = "*") -> bool:
    """Whether a path that a file names lies outside the file's own folder, links followed; or, of a directory, a file
    in it that fits the pattern."""
    try:
        home, path = folder.resolve(), Path(folder, name).resolve()
        if not path.is_relative_to(home):
            return True
        return path.is_dir() and any(not inner.resolve().is_relative_to(home) for inner in path.glob(pattern))
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, a circle of links: no file of ours
        return False


class Taken(Exception):
    """A lock is held by another process."""


@contextmanager
def held(path: Path, wait: float = -1) -> Iterator[None]:
    """Hold a lock file, made if need be, while the block runs.

    Args:
        wait: seconds to wait for another process to let go of it; for ever below 0.
    Raises:
        Taken: where another process still holds it.
        OSError: where it can't be made, or the file system has no locks, as some network file systems.
    """
    _refuse_without_locks(path)
    lock = filelock.FileLock(path, timeout=wait)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise Taken from None
    try:
        yield
    finally:
        lock.release()


def _refuse_without_locks(path: Path) -> None:
    """Try the lock once. A library that takes every failure for a lock that is held would wait for ever."""
    handle = os.open(path, open_flags(is_new=False), 0o644)
    if fcntl is None:
        os.close(handle)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(handle, fcntl.LOCK_UN)
    except BlockingIOError:
        pass
    except OSError as error:
        raise OSError(
            error.errno or errno.ENOLCK,
            f"its file system has no file locks ({error.strerror or error}), without which two processes could write "
            "there at once; give a directory on a local disk, and copy it afterwards",
        ) from error
    finally:
        os.close(handle)
