"""The script that draws charts in a page: vl-convert's own bundle of Vega-Lite, made once and kept."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from importlib import metadata
from pathlib import Path

import vl_convert

from kvpatch.files import cache_directory, write_whole


@functools.cache
def chart_library() -> str:
    """Return the script, which holds vega, vega-lite and vega-embed.

    Bundling takes seconds, so the script is kept in `cache_directory()` for each version of vl-convert. Where that
    directory can't be written, the script is bundled anew in each process.
    """
    path = cache_directory() / "scripts" / f"vega-{metadata.version('vl-convert-python')}.js"
    kept = _kept(path)
    if kept is not None:
        return kept
    script = vl_convert.javascript_bundle()  # pyright: ignore[reportCallIssue] (its stub forgets the default)
    content = script.encode("utf-8")
    with contextlib.suppress(OSError):
        write_whole(path, _digest(content) + b"\n" + content)
    return script


def _kept(path: Path) -> str | None:
    """The script that a file holds after its digest; None where there is none, or it is not what was written."""
    try:
        digest, _, script = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return script.decode("utf-8") if _digest(script) == digest else None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
