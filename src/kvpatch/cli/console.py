"""The terminal: what a run, a protocol or a bank says reaches it as text, never as markup or as a control sequence."""

from __future__ import annotations

import json
import sys
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
