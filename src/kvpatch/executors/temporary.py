"""The folder for temporary files of a cluster that a run starts: for no other user, and cleared once its run is gone.

A driver that is ended by SIGKILL can clear nothing. So each folder names its owner, by process and the time at which
that began, and its owner holds a lock in it. The next run that starts a cluster takes away the folders of this user
whose owner is no more. One that says nothing of its owner stays.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from kvpatch.files import bytes_within, is_held

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PREFIX = "kvp-"
OWNER = "owner.json"
SAME_TIME = 2.0
"""Seconds within which two times at which a process began are one; the system's clock may be set meanwhile."""


@dataclass(frozen=True)
class Temporary:
    """A folder of this process, which nobody else may enter. inner: a folder in it, which Ray opens to everybody."""

    path: Path
    _lock: IO[bytes]

    @property
    def inner(self) -> str:
        """Where files go; the name is short, since names of sockets may not be long."""
        return str(self.path / "r")

    def remove(self) -> None:
        """Take it away."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def temporary_folder(parent: str | None) -> Temporary:
    """A new folder, once what ended processes left there is taken away. parent: where, the usual place if None.

    Raises:
        OSError: where it can't be made.
    """
    clear_left(Path(parent or tempfile.gettempdir()))
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        process = psutil.Process()
        file = open(path / OWNER, "wb", buffering=0)  # open for as long as the folder is there
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(json.dumps({"process": process.pid, "began": process.create_time()}).encode())
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return Temporary(path, file)


def clear_left(parent: Path) -> None:
    """Take away the folders of this user whose owners are no more; what can't be looked at or taken away stays."""
    with suppress(OSError):
        for path in parent.glob(f"{PREFIX}*"):
            with suppress(OSError):
                if _is_own(path) and _is_left(path / OWNER):
                    shutil.rmtree(path, ignore_errors=True)


def _is_own(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid())


def _is_left(owner: Path) -> bool:
    """Whether the process that the file names is no more."""
    if owner.is_symlink() or is_held(owner):
        return False
    try:
        said = json.loads(bytes_within(owner, 1000))
        number, began = int(said["process"]), float(said["began"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False
    try:
        return abs(psutil.Process(number).create_time() - began) > SAME_TIME
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return True
    except psutil.Error:
        return False
