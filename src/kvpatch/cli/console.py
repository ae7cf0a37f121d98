"""The terminal: what a run, a protocol or a bank says reaches it as text, never as markup or as a control sequence."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from kvpatch.errors import HIDING, visible


class PlainConsole(Console):
    """A console that takes strings as they are: square brackets are no markup, `:smile:` is no picture, and characters
    that would move the cursor, colour or reorder the line are shown as symbols. What is to be styled is a `Text`."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)

    def render_str(self, text: str, **settings: Any) -> Text:
        """The string as it may be shown."""
        return super().render_str(visible(text), **settings)


def styled(text: str, style: str) -> Text:
    """A text in a style, such as "bold"."""
    return Text(visible(text), style)


MOST_LINES = 40
"""That a command prints unless it is asked for more."""


class _Kept(io.StringIO):
    """What is printed meanwhile, styled as the terminal would have it."""

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


def printed(pretty: Callable[[], None]) -> list[str]:
    """The lines that a function prints."""
    with redirect_stdout(_Kept()) as kept:
        pretty()
    return kept.getvalue().splitlines()


def print_briefly(pretty: Callable[[], None], is_all: bool, hint: str = "--all prints all") -> None:
    """Print what a function prints: all of it where that is asked for or short, else its first lines and how to get the
    rest."""
    lines = printed(pretty)
    if not is_all and len(lines) > MOST_LINES:
        rest = len(lines) - MOST_LINES + 2
        lines = [*lines[: MOST_LINES - 2], f"... and {rest} more lines: {hint}"]
    for line in lines:
        typer.echo(line)


def say(text: str, *, err: bool = False) -> None:
    """Print a line."""
    typer.echo(visible(text), err=err)


def say_json(text: str) -> None:
    """Print JSON that holds letters as they are, with whatever would change the terminal escaped; it means the same."""
    typer.echo(HIDING.sub(lambda found: json.dumps(found[0])[1:-1], text), nl=False)


def bear_any_locale() -> None:
    """Let a letter that the terminal's encoding lacks be printed as a question mark, and not stop the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
