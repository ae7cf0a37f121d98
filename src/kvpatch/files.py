"""Files that several packages share: the loader of YAML, locks, and the directory for what is made once and kept."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import platformdirs
import yaml

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Reads banks, lexicons and protocols without running anything; in C where libyaml is installed, ten times as fast."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that another process sees all of it or what was there before; make its directory where needed.

    It is not flushed to the disk: what is kept here can be made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def cache_directory() -> Path:
    """Where converted models, organisms and validations are kept: $KVPATCH_CACHE, or the user's cache directory."""
    return Path(os.environ.get("KVPATCH_CACHE") or platformdirs.user_cache_dir("kvpatch"))


def is_directory(path: Path) -> bool:
    """Whether there is such a directory; a path that the system can't look up, such as one too long, is none."""
    try:
        return path.is_dir()
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
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
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
