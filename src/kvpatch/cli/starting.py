"""Commands for whoever writes a first protocol: new, readouts."""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpatch.cli.app import Json, app, show
from kvpatch.cli.console import say
from kvpatch.errors import KvpatchError

ASKED = {
    "attention": "'attention: true' in the phase",
    "attention.marked": "'attention: {marked: ...}' in the phase",
    "geometry": "'geometry: true' in the phase",
    "semantic": "'readouts: {semantic: recursion}' in the protocol",
}
"""What a readout asks of the protocol before it is measured."""


@app.command()
def new(
    name: Annotated[Path, typer.Argument(help="The folder to make. Its last part becomes the protocol's name.")],
) -> None:
    """Write a commented protocol, bank and lexicon into a new folder, to be changed. They run as they are.

    Example: kvpatch new mine
    """
    from kvpatch.specs.base import wrong_name

    if told := wrong_name("protocol", name.name):
        raise KvpatchError(told)
    if name.exists() or name.is_symlink():
        raise KvpatchError(f"{name} is there already, and nothing is written over; give another name")
    try:
        with as_file(files("kvpatch.protocols").joinpath("starter")) as starter:
            shutil.copytree(starter, name, copy_function=shutil.copyfile)
        protocol = name / "protocol.yaml"
        text = protocol.read_text("utf-8").replace("\nprotocol: starter\n", f'\nprotocol: "{name.name}"\n')
        protocol.write_text(text, "utf-8")
    except OSError as error:
        raise KvpatchError(f"{name} can't be written: {error.strerror or error}") from error
    say(f"written: {protocol} (what is asked), {name / 'bank'} (prompts), {name / 'lexicon.yaml'} (what counts)")
    say(f"check it: kvpatch plan {protocol} --model smollm2-135m")
    say(f"run it: kvpatch run {protocol} --model smollm2-135m")


@app.command()
def readouts(
    long: Annotated[bool, typer.Option("--all", help="Also say what each readout measures.")] = False,
    as_json: Json = False,
) -> None:
    """List what a hypothesis may read: the name of each readout, its unit, and what a phase must ask for it.

    Example: kvpatch readouts --all
    """
    from kvpatch.specs.readouts import readouts as known

    found = [
        {
            "name": r.name,
            "unit": r.unit or r.axis or None,
            "evidence_of_the_mode": r.may_be_evidence,
            "takes_log": r.is_positive,
            "asks": r.asks and ASKED[r.asks],
            "about": r.about,
        }
        for r in known().values()
    ]
    show(found, as_json, lambda: _print(found, long))


def _print(found: list[dict[str, Any]], is_long: bool) -> None:
    """Under what a readout asks, one line for all of a unit; or one for each readout, with what it measures."""
    for asks in dict.fromkeys(row["asks"] for row in found):
        say("In any phase:" if asks is None else f"With {asks}:")
        rows = [row for row in found if row["asks"] == asks]
        if is_long:
            for row in rows:
                say(f"  {_name(row)} ({row['unit'] or 'no unit'}): {row['about']}")
            continue
        for unit in dict.fromkeys(row["unit"] for row in rows):
            say(f"  {unit or 'no unit'}: {', '.join(_name(row) for row in rows if row['unit'] == unit)}")
    say("* may be evidence of the mode. " + ("" if is_long else "kvpatch readouts --all says what each measures."))


def _name(row: dict[str, Any]) -> str:
    return row["name"] + "*" * row["evidence_of_the_mode"]
