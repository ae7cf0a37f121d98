"""The command that writes a pre-registration."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from kvpatch.cli.app import AllowOutside, ModelName, Phases, app, phase_names
from kvpatch.cli.console import say
from kvpatch.errors import KvpatchError


@app.command()
def preregister(
    protocol: Annotated[str, typer.Argument(help="The name of a shipped protocol, such as dec7, or a YAML file.")],
    model: ModelName,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the pre-registration, a Markdown file.")],
    n: Annotated[
        int | None, typer.Option(help="Pairs per condition. Default: the number that each phase names.")
    ] = None,
    phases: Phases = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="A run directory of the same protocol, whose calibration figures are written down too."),
    ] = None,
    allow_outside: AllowOutside = False,
) -> None:
    """Write down what a protocol will ask, before it is run: hypotheses, families, alphas, margins, exclusions, hashes.

    `kvpatch verdicts DIR --registered FILE` then says whether a run has that protocol. No model is loaded.

    Example: kvpatch preregister dec7 --model smollm2-135m -o dec7.md
    """
    import kvpatch
    from kvpatch.planning.plan import chosen_phases
    from kvpatch.prompts.bank import load_bank
    from kvpatch.protocols.load import load_protocol
    from kvpatch.store.directory import Store
    from kvpatch.verdicts.outcome import light_rows
    from kvpatch.verdicts.preregistration import Circumstances, calibration_figures, preregistration

    chosen = load_protocol(protocol, needs_files=True, may_leave=allow_outside)
    chosen_phases(chosen, phase_names(phases), n)
    if os.path.exists(out):
        raise KvpatchError(f"{out} is there already, and a pre-registration is not written over; give another --out")
    figures = None
    if calibration is not None:
        store = Store(calibration)
        figures = calibration_figures(chosen, store.read_record(), light_rows(store))
    text = preregistration(
        chosen,
        Circumstances(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            version=kvpatch.__version__,
            model=model,
            bank_sha256=load_bank(chosen.bank, chosen.folder).sha256,
            n=n,
            phases=phase_names(phases),
            calibration=figures,
        ),
    )
    try:
        out.write_text(text, "utf-8")
    except OSError as error:
        raise KvpatchError(f"{out} can't be written: {error.strerror or error}") from error
    say(f"pre-registration: {out.resolve()}")
    say(f"protocol hash: {chosen.sha256}")
