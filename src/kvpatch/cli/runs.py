"""Commands before and during a run: run, plan, power."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvpatch.cli.app import (
    All,
    AllowCode,
    AllowOutside,
    Json,
    ModelName,
    OtherModels,
    Phases,
    app,
    as_place,
    load_all,
    phase_names,
    refuse_code,
    refuse_unwritable,
    show,
    sources_of,
    usual_directory,
    warn_of_clocks,
    warn_of_deviations,
    warn_of_missing_meaning,
    warn_of_too_few,
)
from kvpatch.cli.console import MOST_LINES, printed, say
from kvpatch.cli.hosts import Address, Gpus, On, Workers, asked_for, host_of
from kvpatch.cli.reading import (
    AllowPickle,
    CacheDtype,
    Device,
    DeviceMap,
    Dtype,
    Revision,
    TrustRemoteCode,
    at_its_commit,
    how_to_read,
)
from kvpatch.errors import KvpatchError


@app.command()
def run(
    protocol: Annotated[str, typer.Argument(help="The name of a shipped protocol, such as dec7, or a YAML file.")],
    model: ModelName,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run directory, or its address: s3://BUCKET/RUN. A run that is already there is resumed. "
            "Default: runs/PROTOCOL-MODEL.",
            show_default=False,
            parser=as_place,
            metavar="PATH",
        ),
    ] = None,
    n: Annotated[
        int | None, typer.Option(help="Pairs per condition. Default: the number that each phase names.")
    ] = None,
    phases: Phases = None,
    seed: Annotated[int, typer.Option(help="Decides the order of the pairs and the trials' random numbers.")] = 0,
    other_model: OtherModels = None,
    on: On = None,
    gpus: Gpus = None,
    workers: Workers = None,
    address: Address = None,
    device: Device = None,
    dtype: Dtype = None,
    cache_dtype: CacheDtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    revision: Revision = None,
    allow_code: AllowCode = False,
    allow_outside: AllowOutside = False,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="On a GPU, let a trial's last bits depend on the trials that it runs with. The gain is a few percent.",
        ),
    ] = False,
) -> None:
    """Run a protocol on a model, resuming where a previous run stopped, and write verdicts and a report.

    Example: kvpatch run dec7 --model smollm2-135m --phases 1 --n 20 --out results
    """
    asked = asked_for(on, device, workers, gpus, address, device_map)
    from kvpatch.planning.plan import chosen_phases
    from kvpatch.protocols.load import load_protocol
    from kvpatch.protocols.names import Planned
    from kvpatch.store.objects import ObjectPath

    planned = Planned(n, phase_names(phases))
    chosen = load_protocol(protocol, needs_files=True, may_leave=allow_outside, planned=planned)
    refuse_code(chosen, allow_code)
    out = out or usual_directory(chosen, model)
    if asked is not None and isinstance(out, ObjectPath):
        raise KvpatchError(
            f"workers write into a directory that all of them see, and {out} is an object store; leave --gpus and "
            "--workers out, or give a shared directory"
        )
    refuse_unwritable(out)
    chosen_phases(chosen, phase_names(phases), n)
    read = how_to_read(device, dtype, device_map, trust_remote_code, allow_pickle, revision, cache_dtype)
    how = at_its_commit(model, read)
    from kvpatch.cli.progress import run_progress
    from kvpatch.planned import clocked
    from kvpatch.planning.listener import ProgressListener
    from kvpatch.run import run as run_protocol

    sources = sources_of(chosen, model, phase_names(phases), other_model, **how, batch_invariant=not fast)
    with host_of(asked, sources) as host:
        clocks = host.ask(clocked, listener=ProgressListener())

        def begin() -> None:
            """Said once nothing can be refused any more, and before anything is computed."""
            say(f"run directory: {out}; watch it: kvpatch view {shlex.quote(str(out))}")
            sys.stdout.flush()
            warn_of_too_few(chosen, n, phase_names(phases))
            warn_of_missing_meaning(chosen)
            warn_of_clocks(clocks)

        with run_progress(begin) as listener:
            outcome = run_protocol(
                chosen, host, out, seed=seed, n=n, phases=phase_names(phases), command=sys.argv, listener=listener
            )
    from kvpatch.cli.brief_verdicts import print_brief_verdicts
    from kvpatch.cli.effects_table import print_effects
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
        typer.Option(
            "--timing/--no-timing",
            help="Estimate time and memory by running some trials: seconds on a GPU, up to 2 minutes on 2 cores.",
        ),
    ] = True,
    device: Device = None,
    dtype: Dtype = None,
    cache_dtype: CacheDtype = None,
    device_map: DeviceMap = None,
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
    read = how_to_read(device, dtype, device_map, trust_remote_code, allow_pickle, revision, cache_dtype)
    how = at_its_commit(model, read)
    from kvpatch.cli.planning import planned_summary
    from kvpatch.cli.tables import print_plan
    from kvpatch.planned import clocked
    from kvpatch.planning.listener import ProgressListener
    from kvpatch.verdicts.deviations import stated

    loaded = load_all(chosen, model, phase_names(phases), other_model, **how)
    warn_of_clocks(clocked(loaded, ProgressListener()))
    names = phase_names(phases)
    summary = planned_summary(chosen, loaded, seed=seed, n=n, phases=names, is_timed=timing)
    summary |= stated(chosen, n, names)
    show(summary, as_json, lambda: print_plan(summary), is_all)


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
    seed: Annotated[int, typer.Option(min=0, help="Decides the simulated runs.")] = 0,
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
    from kvpatch.verdicts.power_of_rule import read_assumptions

    chosen = load_protocol(protocol)
    if assume is not None:
        read_assumptions(assume)  # what is wrong with them is told before anything is computed
    rows = None if pilot is None else Store(pilot).read().to_pandas()
    found = power_of(chosen, n=n, phases=phase_names(phases), wanted_dz=effect, pilot=rows)
    whole = simulated(chosen, rows, assume, n, effect, draws, seed) if draws else []
    asked = [entry.id for entry in found]
    rule = {name: [p.model_dump(exclude={"id"}) for p in whole if p.id == name] for name in asked}

    def pretty() -> None:
        print_power(found)
        print_rule(chosen, [p for p in whole if p.id in rule], draws)

    show([entry.model_dump() | {"rule": rule[entry.id]} for entry in found], as_json, pretty, is_all)
