"""Commands about runs: run, plan, status, verdicts, effects, power, report, repair, view."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpatch.cli.app import (
    All,
    AllowCode,
    AllowOutside,
    AllowPickle,
    Device,
    Directory,
    Dtype,
    Json,
    ModelName,
    OtherModels,
    Phases,
    Revision,
    TrustRemoteCode,
    app,
    how_to_read,
    load_all,
    phase_names,
    refuse_code,
    refuse_unwritable,
    show,
    usual_directory,
    warn_of_clocks,
    warn_of_deviations,
    warn_of_missing_meaning,
    warn_of_too_few,
)
from kvpatch.cli.console import MOST_LINES, print_briefly, printed, say, say_json
from kvpatch.errors import KvpatchError
from kvpatch.files import is_directory

if TYPE_CHECKING:
    from kvpatch.store.directory import Store


@app.command()
def run(
    protocol: Annotated[str, typer.Argument(help="The name of a shipped protocol, such as dec7, or a YAML file.")],
    model: ModelName,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run directory. A run that is already there is resumed. Default: runs/PROTOCOL-MODEL.",
            show_default=False,
        ),
    ] = None,
    n: Annotated[
        int | None, typer.Option(help="Pairs per condition. Default: the number that each phase names.")
    ] = None,
    phases: Phases = None,
    seed: Annotated[int, typer.Option(help="Decides the order of the pairs and the trials' random numbers.")] = 0,
    other_model: OtherModels = None,
    on: Annotated[str, typer.Option(help="Where to run: local.")] = "local",
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    revision: Revision = None,
    allow_code: AllowCode = False,
    allow_outside: AllowOutside = False,
) -> None:
    """Run a protocol on a model, resuming where a previous run stopped, and write verdicts and a report.

    Example: kvpatch run dec7 --model smollm2-135m --phases 1 --n 20 --out results
    """
    if on != "local":
        raise KvpatchError(f"no executor {on!r}: there is 'local'")
    from kvpatch.planning.plan import chosen_phases
    from kvpatch.protocols.load import load_protocol
    from kvpatch.protocols.names import Planned

    planned = Planned(n, phase_names(phases))
    chosen = load_protocol(protocol, needs_files=True, may_leave=allow_outside, planned=planned)
    refuse_code(chosen, allow_code)
    out = out or usual_directory(chosen, model)
    refuse_unwritable(out)
    chosen_phases(chosen, phase_names(phases), n)
    from kvpatch.cli.progress import run_progress
    from kvpatch.run import run as run_protocol

    how = how_to_read(device, dtype, trust_remote_code, allow_pickle, revision)
    loaded = load_all(chosen, model, phase_names(phases), other_model, **how)

    def begin() -> None:
        """Said once nothing can be refused any more, and before anything is computed."""
        say(f"run directory: {out}; watch it: kvpatch view {shlex.quote(str(out))}")
        sys.stdout.flush()
        warn_of_too_few(chosen, n, phase_names(phases))
        warn_of_missing_meaning(chosen)
        warn_of_clocks(loaded)

    with run_progress(begin) as listener:
        outcome = run_protocol(
            chosen, loaded, out, seed=seed, n=n, phases=phase_names(phases), command=sys.argv, listener=listener
        )
    from kvpatch.cli.brief_verdicts import print_brief_verdicts
    from kvpatch.cli.tables import print_effects
    from kvpatch.verdicts.headline import few_pairs

    # The table of one phase is looked at; those of ten scroll away.
    room = MOST_LINES - 6
    if len({effect.phase for effect in outcome.effects}) == 1:
        table = printed(lambda: print_effects(outcome.effects))
        if len(table) > room - 10:
            table = [*table[: room - 11], f"... and {len(table) - room + 11} more lines: kvpatch effects {out} --all"]
        room -= len(table)
        typer.echo("\n".join(table))
    print_brief_verdicts(outcome, f"kvpatch verdicts {shlex.quote(str(out))} --all", room)
    if told := few_pairs(outcome.verdicts):
        say(told)
    say(f"effects: kvpatch effects {out}")
    say(f"report: {(out / 'report.html').resolve()}")


@app.command()
def plan(
    protocol: Annotated[str, typer.Argument(help="The name of a shipped protocol, such as dec7, or a YAML file.")],
    model: ModelName,
    n: Annotated[
        int | None, typer.Option(help="Pairs per condition. Default: the number that each phase names.")
    ] = None,
    phases: Phases = None,
    seed: Annotated[int, typer.Option(help="Decides the order of the pairs and the trials' random numbers.")] = 0,
    other_model: OtherModels = None,
    timing: Annotated[
        bool,
        typer.Option("--timing/--no-timing", help="Estimate time and memory by running some trials for about 10 s."),
    ] = True,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    revision: Revision = None,
    allow_code: AllowCode = False,
    allow_outside: AllowOutside = False,
    as_json: Json = False,
    is_all: All = False,
) -> None:
    """Show what a run would do, without running it.

    Example: kvpatch plan dec7 --model smollm2-135m
    """
    from kvpatch.protocols.load import load_protocol
    from kvpatch.protocols.names import Planned

    planned = Planned(n, phase_names(phases))
    chosen = load_protocol(protocol, needs_files=True, may_leave=allow_outside, planned=planned)
    refuse_code(chosen, allow_code)
    warn_of_deviations(chosen)
    warn_of_too_few(chosen, n, phase_names(phases))
    from kvpatch.cli.tables import plan_summary, print_plan
    from kvpatch.prompts.bank import load_bank
    from kvpatch.run import plan_for
    from kvpatch.verdicts.deviations import stated

    how = how_to_read(device, dtype, trust_remote_code, allow_pickle, revision)
    loaded = load_all(chosen, model, phase_names(phases), other_model, **how)
    warn_of_clocks(loaded)
    made, _ = plan_for(
        loaded, chosen, load_bank(chosen.bank, chosen.folder), seed=seed, n=n, phases=phase_names(phases)
    )
    cost = None
    if timing:
        from kvpatch.executors.estimate import estimate

        cost = estimate(made, loaded)
    summary = plan_summary(
        made, chosen, lambda key, text: len(loaded[key].encode(text, may_be_empty=True).token_ids), cost
    ) | stated(chosen, n, phase_names(phases))
    show(summary, as_json, lambda: print_plan(summary), is_all)


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
    outcome = outcome_of(store, is_exploratory=exploratory, protocol=other)
    if not exploratory:
        if told := write_verdicts(store, outcome):
            say(f"warning: {told}", err=True)
    if as_json:
        say_json(canonical_json(outcome.plan_table if only_plan else outcome.verdicts))
    elif only_plan:
        print_briefly(
            lambda: print_plan_table(outcome.plan_table), is_all, f"kvpatch verdicts {directory} --plan --all"
        )
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
        print_brief_verdicts(outcome, f"kvpatch verdicts {shlex.quote(str(directory))} --all")
    if not is_registered:
        raise typer.Exit(1)


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
    from kvpatch.cli.tables import print_effects
    from kvpatch.store.directory import Store
    from kvpatch.verdicts.outcome import phase_effects

    found = phase_effects(Store(directory), phase)
    show([effect.model_dump() for effect in found], as_json, lambda: print_effects(found), is_all)


@app.command()
def power(
    protocol: Annotated[str, typer.Argument(help="The name of a shipped protocol, such as dec7, or a YAML file.")],
    n: Annotated[
        int | None, typer.Option(help="Pairs per condition. Default: the number that each phase names.")
    ] = None,
    effect: Annotated[
        float, typer.Option(help="The effect to be seen, in dz (mean over standard deviation of pair differences).")
    ] = 0.5,
    pilot: Annotated[
        Path | None, typer.Option(help="A run directory. Its pair differences then replace normal noise.")
    ] = None,
    phases: Phases = None,
    assume: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file of what is true, for the whole rule: 'dz' by hypothesis, 'means' and 'hits' by readout "
            "and condition, 'correlations', 'coherent'. Default: every claim, at --effect; with --pilot, its."
        ),
    ] = None,
    draws: Annotated[
        int, typer.Option(min=0, help="Simulated runs of the whole rule for each n. 0 leaves the whole rule out.")
    ] = 50,
    seed: Annotated[int, typer.Option(help="Decides the simulated runs.")] = 0,
    as_json: Json = False,
    is_all: All = False,
) -> None:
    """Show the smallest effect that each hypothesis can see at its n, the n that a given effect needs, and how often
    the whole rule says yes: prerequisites, families, coherence and all.

    Example: kvpatch power dec7 --n 20
    """
    from kvpatch.cli.power import print_rule, simulated
    from kvpatch.cli.tables import print_power
    from kvpatch.protocols.load import load_protocol
    from kvpatch.store.directory import Store
    from kvpatch.verdicts.power import power as power_of

    chosen = load_protocol(protocol)
    rows = None if pilot is None else Store(pilot).read().to_pandas()
    found = power_of(chosen, n=n, phases=phase_names(phases), wanted_dz=effect, pilot=rows)
    whole = simulated(chosen, rows, assume, n, effect, draws, seed) if draws else []
    asked = [entry.id for entry in found]
    rule = {name: [p.model_dump(exclude={"id"}) for p in whole if p.id == name] for name in asked}

    def pretty() -> None:
        print_power(found)
        print_rule(chosen, [p for p in whole if p.id in rule], draws)

    show([entry.model_dump() | {"rule": rule[entry.id]} for entry in found], as_json, pretty, is_all)


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
    outcome = outcome_of(store)
    try:
        where = write_report(store, outcome, out)
    except OSError as error:
        raise KvpatchError(f"{out} can't be written: {error.strerror or error}") from error
    say(f"report: {where.resolve()}")


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
        list[Path], typer.Argument(help="Run directories, or directories that contain run directories.")
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
