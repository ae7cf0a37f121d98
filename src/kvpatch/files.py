"""Files that several packages share: the loader of YAML, and the directory for what is made once and kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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
