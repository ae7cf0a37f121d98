"""Commands that read a run directory: status, verdicts, effects, report, repair, view."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpatch.cli.app import (
    All,
    Directory,
    Json,
    app,
    as_place,
    show,
)
from kvpatch.cli.console import print_briefly, say, say_json
from kvpatch.errors import KvpatchError
from kvpatch.files import is_directory

if TYPE_CHECKING:
    from kvpatch.store.directory import Store
    from kvpatch.verdicts.outcome import Outcome


@contextmanager
def _writing(out: object) -> Iterator[None]:
    """Tell of what can't be written in one line."""
    try:
        yield
    except OSError as error:
        raise KvpatchError(f"{out} can't be written: {error.strerror or error}") from error


@app.command()
def status(directory: Directory, as_json: Json = False, is_all: All = False) -> None:
    """Show how far a run is: trials done, left and failed.

    Example: kvpatch status results
    """
    from kvpatch.cli.tables import print_status, status_summary
    from kvpatch.store.directory import Store

    summary = status_summary(Store(directory))
    show(summary, as_json, lambda: print_status(summary), is_all)


@app.command()
def verdicts(
    directory: Directory,
    protocol: Annotated[
        str | None, typer.Option(help="Decide by a protocol other than the run's own. Needs --exploratory.")
    ] = None,
    exploratory: Annotated[
        bool, typer.Option("--exploratory", help="Accept a changed protocol, and mark every verdict as exploratory.")
    ] = False,
    only_plan: Annotated[
        bool,
        typer.Option("--plan", help="Print the plan's table alone; with --json, its rows in place of the verdicts."),
    ] = False,
    registered: Annotated[
        Path | None, typer.Option(help="A pre-registration. Say whether the run has its protocol; exit code 1 if not.")
    ] = None,
    as_json: Json = False,
    is_all: All = False,
) -> None:
    """Print the answer and one line for each row of the plan and each verdict, recomputed from the stored trials.

    --all prints the plan's table, with what was expected, what was measured and what follows, and every verdict with
    its reason. Exploratory verdicts are printed, not stored.

    Example: kvpatch verdicts results
    """
    from kvpatch.cli.brief_verdicts import print_brief_verdicts
    from kvpatch.cli.plan_table import print_plan_table
    from kvpatch.cli.tables import print_verdicts
    from kvpatch.store.directory import Store
    from kvpatch.store.validation import gate_zero
    from kvpatch.verdicts.deviations import error_statement
    from kvpatch.verdicts.outcome import outcome_of, write_verdicts
    from kvpatch.verdicts.records import canonical_json
    from kvpatch.verdicts.specificity import specificities

    store = Store(directory)
    other = None
    if protocol is not None:
        from kvpatch.protocols.load import load_protocol

        other = load_protocol(protocol)
    is_registered = registered is None or _held_against(registered, store)
    outcome = _told(outcome_of(store, is_exploratory=exploratory, protocol=other))
    if not exploratory:
        if told := write_verdicts(store, outcome):
            say(f"warning: {told}", err=True)
    again = f"kvpatch verdicts {shlex.quote(str(directory))}"
    if as_json:
        say_json(canonical_json(outcome.plan_table if only_plan else outcome.verdicts))
    elif only_plan and not outcome.plan_table:
        say("this protocol has no plan, which names the rows of such a table; leave --plan out")
    elif only_plan:
        print_briefly(lambda: print_plan_table(outcome.plan_table), is_all, f"{again} --plan --all")
    elif is_all:
        print_plan_table(outcome.plan_table)
        say(gate_zero(outcome.record.validation))
        for of in specificities(outcome.record):
            say(of.sentence)
        say(error_statement(outcome.protocol))
        for told in dict.fromkeys(told for v in outcome.verdicts for told in v.deviations):
            say(f"deviation: {told}")
        print_verdicts(outcome.verdicts)
    else:
        print_brief_verdicts(outcome, f"{again} --all")
    if not is_registered:
        raise typer.Exit(1)


def _told(outcome: Outcome) -> Outcome:
    """Say on standard error where trials are missing that the numbers should rest on."""
    if outcome.incomplete is not None:
        say(f"warning: {outcome.incomplete}", err=True)
    return outcome


def _held_against(registered: Path, store: Store) -> bool:
    """Say whether a run has the protocol of a pre-registration, on standard error, which leaves JSON whole."""
    from kvpatch.verdicts.preregistration import held_against, read_preregistration

    holds, told = held_against(read_preregistration(registered), store.read_record())
    for sentence in told:
        say(sentence, err=True)
    return holds


@app.command()
def effects(
    directory: Directory,
    phase: Annotated[str | None, typer.Option(help="Show one phase. Default: all phases that have trials.")] = None,
    as_json: Json = False,
    is_all: All = False,
) -> None:
    """Print every condition's difference from its natural run, on one scale.

    Example: kvpatch effects results --phase interventions
    """
    from kvpatch.cli.effects_table import print_effects
    from kvpatch.store.directory import Store
    from kvpatch.verdicts.outcome import outcome_of, phase_effects

    found = phase_effects(_told(outcome_of(Store(directory))), phase)
    show([effect.model_dump() for effect in found], as_json, lambda: print_effects(found), is_all)


@app.command()
def report(
    directory: Directory,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write the report. Default: DIR/report.html.")
    ] = None,
) -> None:
    """Write the report: one HTML file that needs no network and no other file.

    Example: kvpatch report results -o report.html
    """
    from kvpatch.report.build import write_report
    from kvpatch.store.directory import Store
    from kvpatch.verdicts.outcome import outcome_of

    store = Store(directory)
    outcome = _told(outcome_of(store))
    with _writing(out):
        where = write_report(store, outcome, out)
    say(f"report: {where.resolve()}")


@app.command()
def figures(
    directory: Directory,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")] = Path("figures"),
    only: Annotated[list[str] | None, typer.Option(help="The id of a figure; may be repeated. Default: all.")] = None,
    width: Annotated[
        list[float] | None,
        typer.Option(help="Inches; may be repeated. Default: 3.25 and 6.75, for one column and two."),
    ] = None,
    is_list: Annotated[bool, typer.Option("--list", help="Print the ids and titles, and write nothing.")] = False,
    is_all: All = False,
) -> None:
    """Write the report's figures for a paper: SVG, PDF and PNG of a set width, and a script that draws each anew.

    The script computes the numbers from the run's Parquet files.

    Example: kvpatch figures results --only primary-mode_llr --width 3.25
    """
    from kvpatch.notebook import Run
    from kvpatch.report.build import report_figures
    from kvpatch.report.paper import WIDTHS, chosen, write_figures

    run = Run(directory)
    found = report_figures(run.store, _told(run.outcome))
    if is_list:

        def listed() -> None:
            for name, one in found.items():
                say(f"{name}: {one.title}")

        print_briefly(listed, is_all)
        return
    with _writing(out):
        written = write_figures(chosen(found, only or []), out, run.directory, width or list(WIDTHS))
    say(f"{len(written)} files in {out.resolve()}; each figure has a script that draws it anew")


@app.command()
def export(
    directory: Directory,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")] = Path("dataset"),
) -> None:
    """Write a run as a dataset of the Hugging Face hub: Parquet files, and a card that says what they hold.

    `datasets.load_dataset("dataset")` reads it, and `load_dataset("dataset", "verdicts")` its verdicts.

    Example: kvpatch export results -o dataset
    """
    from kvpatch.report.dataset import write_dataset
    from kvpatch.store.directory import Store
    from kvpatch.verdicts.outcome import outcome_of

    store = Store(directory)
    outcome = _told(outcome_of(store))
    with _writing(out):
        written = write_dataset(store, outcome, out)
    say(f"{len(written)} files in {out.resolve()}; its card is {written[-1].name}")


@app.command()
def repair(directory: Directory, as_json: Json = False, is_all: All = False) -> None:
    """Set aside what is damaged in a run, and say what the same run command will compute again.

    Damaged files are moved to DIR/set-aside; nothing is deleted.

    Example: kvpatch repair results
    """
    from kvpatch.store.directory import Store
    from kvpatch.store.repair import repair as repair_run

    found = repair_run(Store(directory))

    def pretty() -> None:
        for line in found.lines:
            say(line)

    show(found.model_dump() | {"lines": found.lines}, as_json, pretty, is_all)


@app.command()
def view(
    directories: Annotated[
        list[Path],
        typer.Argument(
            help="Run directories, or directories that contain run directories; or their addresses: s3://BUCKET/RUN.",
            parser=as_place,
            metavar="DIRECTORIES...",
        ),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port. 0 takes a free one.")] = 0,
    token: Annotated[
        bool, typer.Option("--token/--no-token", help="Require a random token. The printed address contains it.")
    ] = True,
    browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the address in a browser.")] = False,
) -> None:
    """Show runs in a browser while they go on: progress, estimates and every trial.

    Only this machine can open the page. Ctrl-C ends it.

    Example: kvpatch view results
    """
    for directory in directories:
        if not is_directory(directory):
            raise KvpatchError(f"{directory} is not a directory")
    from kvpatch.view.server import new_token, serve

    def ready(address: str) -> None:
        say(f"view: {address}")
        sys.stdout.flush()
        if browser:
            import webbrowser

            webbrowser.open(address)

    serve(directories, port=port, token=new_token() if token else None, on_ready=ready)
