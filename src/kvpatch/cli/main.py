"""The command line: parses, calls, prints. Importing it loads no torch, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys

from kvpatch.cli import registration, results, runs, starting, tools
from kvpatch.cli.app import app, one_line_errors
from kvpatch.cli.console import bear_any_locale

COMMANDS = (starting, runs, results, registration, tools)
"""Imported for the commands that they register, in the order in which `--help` lists them."""


def main() -> None:
    """Entry point."""
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        os.environ["KVPATCH_DEBUG"] = "1"
    with one_line_errors():
        bear_any_locale()
        app()
