"""What an unexpected error leaves behind: crash.txt, to be sent with a bug report, with nothing private in it."""

from __future__ import annotations

import getpass
import os
import platform
import re
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvpatch.files import write_whole

NAME = "crash.txt"
PACKAGES = ("kvpatch", "torch", "transformers", "numpy", "pyarrow", "duckdb", "pydantic")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASS|KEY(?!BOARD)|CREDENTIAL|AUTH|COOKIE|BEARER|SIGNATURE", re.IGNORECASE)
_SECRET = re.compile(
    r"\b(?:hf|sk|ghp|gho|ghs|github_pat|glpat|xox[abprs])[_-][A-Za-z0-9_-]{8,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\bAIza[A-Za-z0-9_-]{20,}"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?"  # a signed token, in three parts
    r"|(?<=://)[^/@\s]+(?=@)"  # user and password of an address
    r"|(?i:(?:(?<=bearer )|(?<=token=)|(?<=signature=)|(?<=secret=)|(?<=password=)|(?<=passwd=)|(?<=api_key=)))"
    r"[^&\s'\"]+"
)
_FEWEST = 3
"""Letters of a user's or a host's name; shorter ones would be found within other words."""


def without_private(text: str) -> str:
    """The text without paths of this machine's user, the user's and the host's names, tokens, and values of variables
    that are named like a secret."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 6:
            text = text.replace(value, "***")
    text = _SECRET.sub("***", text)
    homes = {_or_nothing(lambda: str(Path.home())), os.environ.get("HOME", "")} - {"", "/"}
    places = [(sys.prefix, "<environment>"), (_or_nothing(os.getcwd), "."), (tempfile.gettempdir(), "<temporary>")]
    places += [(home, "~") for home in homes]
    for place, shown in sorted(places, key=lambda each: -len(each[0])):
        if len(place) > 1:
            text = re.sub(rf"{re.escape(place)}(?![\w.-])", shown, text)
    for name, shown in ((_user(), "<user>"), (socket.gethostname(), "<host>")):
        if len(name) >= _FEWEST:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", shown, text)
    return text


def _user() -> str:
    return _or_nothing(getpass.getuser)


def _or_nothing(ask: Callable[[], str]) -> str:
    """What the system says; nothing of a user without a name or a home, as in some containers, or a folder that is
    gone."""
    try:
        return ask()
    except (OSError, KeyError, ImportError, RuntimeError):
        return ""


def told_command(command: Sequence[str]) -> list[str]:
    """A command line as it may be published: of an absolute path its last part, of the program its name alone."""
    words = [re.sub(r"(^|=)(?:~|/)[^\s=]*?([^/\s=]*)/*$", r"\1\2", word) for word in command]
    return [without_private(word) for word in words]


def write_crash(directory: Path, stage: str, error: BaseException) -> Path | None:
    """Write crash.txt: when, versions, stage and traceback, nothing private in them; None where it can't be written."""
    lines = [
        f"kvpatch stopped by an unexpected error, {datetime.now(UTC).isoformat(timespec='seconds')}",
        f"stage: {stage}",
        f"python {sys.version.split()[0]} on {platform.system()} {platform.machine()}",
        *(f"{name} {_version(name)}" for name in PACKAGES),
        "",
        "".join(traceback.format_exception(error)),
    ]
    place = directory / NAME
    try:
        write_whole(place, without_private("\n".join(lines)).encode("utf-8", "replace"))
    except OSError:
        return None
    return place


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
