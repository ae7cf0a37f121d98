"""Which package indexes to ask, where a person has told uv and not pip.

pip reads its own settings by itself: its configuration files and the variables that begin with PIP_. Wheels of models
are checked against their SHA-256, so that a further index can add a place to find them and nothing else.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_NAME = re.compile(r"^[A-Za-z0-9._-]+=(?=[a-z+]+:|/)")
"""uv lets an index have a name before its address: `lab=https://...`."""


def index_options(pip: Sequence[str]) -> list[str]:
    """Options for `pip download` that name the indexes uv was told of.

    Args:
        pip: the command that begins with pip.
    Returns:
        `--extra-index-url` and `--find-links` for what uv adds, and `--index-url` for uv's default index where pip has
        been told of none. Empty where uv has been told nothing.
    """
    default, extra, links = _uv_settings(os.environ)
    options = [f"--extra-index-url={url}" for url in extra] + [f"--find-links={place}" for place in links]
    if default and not _names_an_index(pip):
        options.append(f"--index-url={default}")
    return options


def _names_an_index(pip: Sequence[str]) -> bool:
    """Whether pip's own settings name the index in place of the public one."""
    listed = subprocess.run([*pip, "config", "list"], capture_output=True, text=True)
    return any(re.match(r"\S*\.index-url=", line) for line in listed.stdout.splitlines())


def _uv_settings(environment: Mapping[str, str]) -> tuple[str | None, list[str], list[str]]:
    """uv's default index, its further indexes and its find-links; variables go before files, as they do in uv."""
    default = environment.get("UV_DEFAULT_INDEX") or environment.get("UV_INDEX_URL")
    extra = [*environment.get("UV_INDEX", "").split(), *environment.get("UV_EXTRA_INDEX_URL", "").split()]
    links = [place for place in environment.get("UV_FIND_LINKS", "").split(",") if place]
    for settings in _uv_files(environment):
        for table in (settings, settings.get("pip", {})):
            default = default or table.get("index-url")
            extra += table.get("extra-index-url", [])
            links += table.get("find-links", [])
        for index in settings.get("index", []):
            if index.get("default"):
                default = default or index.get("url")
            elif "url" in index:
                extra.append(index["url"])
    bare = [_NAME.sub("", url) for url in extra]
    return (_NAME.sub("", default) if default else None), list(dict.fromkeys(bare)), list(dict.fromkeys(links))


def _uv_files(environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What stands in uv's configuration files: UV_CONFIG_FILE's, or the user's and the system's."""
    if environment.get("UV_NO_CONFIG"):
        return
    if named := environment.get("UV_CONFIG_FILE"):
        places = [Path(named)]
    else:
        home = environment.get("XDG_CONFIG_HOME") or environment.get("APPDATA") or "~/.config"
        places = [Path(home).expanduser() / "uv" / "uv.toml", Path("/etc/uv/uv.toml")]
    for place in places:
        try:
            yield tomllib.loads(place.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError):  # none there, or uv itself will complain of it
            continue
