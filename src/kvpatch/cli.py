"""The command line: parses, calls, prints. Importing it loads no torch, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpatch.errors import KvpatchError, ProtocolMistakes

if TYPE_CHECKING:
    from kvpatch.model import Model
    from kvpatch.protocols.schema import Protocol

app = typer.Typer(
    name="kvpatch",
    help="Causal experiments on the KV cache of language models.\n\n"
    "Example: kvpatch run dec7 --model smollm2-135m --n 20 --out results",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelName = Annotated[str, typer.Option("--model", help="Named model, hub id, directory or .gguf file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Directory = Annotated[Path, typer.Argument(help="A run directory.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; what is there if not given.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto; float32 on a CPU if not given.")]
OtherModels = Annotated[
    list[str] | None,
    typer.Option("--other-model", help="KEY=MODEL, in place of what the protocol's 'models' names; may be repeated."),
]
AllowCode = Annotated[bool, typer.Option(help="Run the scoring function that the protocol names.")]
Phases = Annotated[str | None, typer.Option(help="Phases to run, with commas; all if not given.")]


@app.command()
def run(
    protocol: Annotated[str, typer.Argument(help="Shipped name (dec7) or YAML file.")],
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Run directory; running again resumes it.")],
    n: Annotated[int | None, typer.Option(help="Pairs per condition, in place of each phase's own.")] = None,
    phases: Phases = None,
    seed: Annotated[int, typer.Option(help="Orders the pairs and seeds the trials.")] = 0,
    other_model: OtherModels = None,
    on: Annotated[str, typer.Option(help="Where to run: local.")] = "local",
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run modelling code that comes with the model.")] = False,
    allow_pickle: Annotated[bool, typer.Option(help="Also read pickled weights.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Run a protocol on a model, or what is left of it, and write verdicts and report.

    Example: kvpatch run dec7 --model smollm2-135m --phases 1 --n 20 --out results
    """
    if on != "local":
        raise KvpatchError(f"no executor {on!r}: there is 'local'")
    from kvpatch.protocols.load import load_protocol

    chosen = load_protocol(protocol, needs_files=True)
    _refuse_code(chosen, allow_code)
    _writable(out)
    _warn_of_too_few(chosen, n, _names(phases))
    from kvpatch.progress import run_progress
    from kvpatch.run import run as run_protocol

    loaded = _load_all(
        chosen,
        model,
        _names(phases),
        other_model,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    _warn_of_clocks(loaded)
    with run_progress() as watcher:
        outcome = run_protocol(
            chosen, loaded, out, seed=seed, n=n, phases=_names(phases), command=sys.argv, watcher=watcher
        )
    from kvpatch.statistics.headline import few_pairs
    from kvpatch.summaries import print_criteria, print_effects

    # The table of one phase is looked at; those of ten scroll away.
    if len({effect.phase for effect in outcome.effects}) == 1:
        print_effects(outcome.effects)
    else:
        print_criteria(outcome.verdicts)
    typer.echo(outcome.answer)
    if told := few_pairs(outcome.verdicts):
        typer.echo(told)
    typer.echo(f"effects: kvpatch effects {out}")
    typer.echo(f"verdicts: kvpatch verdicts {out}")
    typer.echo(f"report: {(out / 'report.html').resolve()}")


@app.command()
def plan(
    protocol: Annotated[str, typer.Argument(help="Shipped name (dec7) or YAML file.")],
    model: ModelName,
    n: Annotated[int | None, typer.Option(help="Pairs per condition, in place of each phase's own.")] = None,
    phases: Phases = None,
    seed: Annotated[int, typer.Option(help="Orders the pairs and seeds the trials.")] = 0,
    other_model: OtherModels = None,
    timing: Annotated[
        bool, typer.Option("--timing/--no-timing", help="Estimate time and memory; runs some trials for about 10 s.")
    ] = True,
    device: Device = None,
    dtype: Dtype = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Say what a run would do, without running it.

    Example: kvpatch plan dec7 --model smollm2-135m
    """
    from kvpatch.protocols.load import load_protocol

    chosen = load_protocol(protocol, needs_files=True)
    _refuse_code(chosen, allow_code)
    from kvpatch.prompts.bank import load_bank
    from kvpatch.run import plan_for
    from kvpatch.summaries import plan_summary, print_plan

    loaded = _load_all(chosen, model, _names(phases), other_model, device=device, dtype=dtype)
    _warn_of_clocks(loaded)
    made, _ = plan_for(loaded, chosen, load_bank(chosen.bank, chosen.folder), seed=seed, n=n, phases=_names(phases))
    cost = None
    if timing:
        from kvpatch.estimate import estimate

        cost = estimate(made, loaded)
    summary = plan_summary(
        made, chosen, lambda key, text: len(loaded[key].encode(text, may_be_empty=True).token_ids), cost
    )
    _print(summary, as_json, lambda: print_plan(summary))


@app.command()
def status(directory: Directory, as_json: Json = False) -> None:
    """Say how far a run is: done, left, failed.

    Example: kvpatch status results
    """
    from kvpatch.store import Store
    from kvpatch.summaries import print_status, status_summary

    summary = status_summary(Store(directory))
    _print(summary, as_json, lambda: print_status(summary))


@app.command()
def verdicts(
    directory: Directory,
    protocol: Annotated[
        str | None, typer.Option(help="Decide by another protocol than the run's; needs --exploratory.")
    ] = None,
    exploratory: Annotated[
        bool, typer.Option("--exploratory", help="Take a changed protocol, and mark every verdict exploratory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the success criteria and the verdict table, recomputed from the stored trials.

    Exploratory verdicts are printed, not stored. Example: kvpatch verdicts results
    """
    from kvpatch.organisms.record import gate_zero
    from kvpatch.outcome import outcome_of, write_verdicts
    from kvpatch.statistics.verdicts import verdicts_json
    from kvpatch.store import Store
    from kvpatch.summaries import print_verdicts

    store = Store(directory)
    other = None
    if protocol is not None:
        from kvpatch.protocols.load import load_protocol

        other = load_protocol(protocol)
    outcome = outcome_of(store, is_exploratory=exploratory, protocol=other)
    if not exploratory:
        write_verdicts(store, outcome)
    if as_json:
        typer.echo(verdicts_json(outcome.verdicts), nl=False)
    else:
        typer.echo(gate_zero(outcome.record.validation))
        print_verdicts(outcome.verdicts)


@app.command()
def effects(
    directory: Directory,
    phase: Annotated[str | None, typer.Option(help="One phase; all that have trials if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Print every condition's difference from its natural run, on one scale.

    Example: kvpatch effects results --phase interventions
    """
    from kvpatch.outcome import phase_effects
    from kvpatch.store import Store
    from kvpatch.summaries import print_effects

    found = phase_effects(Store(directory), phase)
    _print([effect.model_dump() for effect in found], as_json, lambda: print_effects(found))


@app.command()
def power(
    protocol: Annotated[str, typer.Argument(help="Shipped name (dec7) or YAML file.")],
    n: Annotated[int | None, typer.Option(help="Pairs per condition, in place of each phase's own.")] = None,
    effect: Annotated[float, typer.Option(help="The effect that should be seen, in dz.")] = 0.5,
    pilot: Annotated[Path | None, typer.Option(help="A run directory whose pair differences to simulate from.")] = None,
    phases: Phases = None,
    as_json: Json = False,
) -> None:
    """Say the smallest effect each hypothesis can see at its n, and the n that a wanted effect needs.

    Example: kvpatch power dec7 --n 20
    """
    from kvpatch.protocols.load import load_protocol
    from kvpatch.statistics.power import power as power_of
    from kvpatch.store import Store
    from kvpatch.summaries import print_power

    chosen = load_protocol(protocol)
    rows = None if pilot is None else Store(pilot).read().to_pandas()
    found = power_of(chosen, n=n, phases=_names(phases), wanted_dz=effect, pilot=rows)
    _print([entry.model_dump() for entry in found], as_json, lambda: print_power(found))


@app.command()
def report(
    directory: Directory,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write it; DIR/report.html if not given.")
    ] = None,
) -> None:
    """Write the report: one HTML file that needs nothing else.

    Example: kvpatch report results -o report.html
    """
    from kvpatch.outcome import outcome_of, write_report
    from kvpatch.store import Store

    store = Store(directory)
    outcome = outcome_of(store)
    try:
        where = write_report(store, outcome, out)
    except OSError as error:
        raise KvpatchError(f"{out} can't be written: {error.strerror or error}") from error
    typer.echo(f"report: {where.resolve()}")


@app.command()
def view(
    directories: Annotated[list[Path], typer.Argument(help="Run directories, or directories that hold some.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 0,
    token: Annotated[
        bool, typer.Option("--token/--no-token", help="Ask for a random token, which the printed address holds.")
    ] = True,
    browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the address in a browser.")] = False,
) -> None:
    """Show runs in a browser while they go on: progress, estimates, every trial. On this machine only; Ctrl-C ends it.

    Example: kvpatch view results
    """
    for directory in directories:
        if not directory.is_dir():
            raise KvpatchError(f"{directory} is not a directory")
    from kvpatch.view.server import new_token, serve

    def ready(address: str) -> None:
        typer.echo(f"view: {address}")
        sys.stdout.flush()
        if browser:
            import webbrowser

            webbrowser.open(address)

    serve(directories, port=port, token=new_token() if token else None, on_ready=ready)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Named model, hub id, directory or .gguf file.")],
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure whether a model is patched correctly; exit code 1 where an identity fails.

    Example: kvpatch check smollm2-135m
    """
    from kvpatch.check import check as check_model
    from kvpatch.model import load
    from kvpatch.progress import loading
    from kvpatch.summaries import print_check

    with loading() as report:
        loaded = load(model, device=device, dtype=dtype, progress=report)
    found = check_model(loaded)
    summary = {
        "model": model,
        "passed": all(i.holds is not False for i in found),
        "identities": [i.model_dump() for i in found],
    }
    _print(summary, as_json, lambda: print_check(found))
    if not summary["passed"]:
        raise typer.Exit(1)


@app.command()
def validate(
    quick: Annotated[bool, typer.Option("--quick", help="One seed an organism and few runs; a few minutes.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write validation.json here too, and retrained weights.")] = None,
    only: Annotated[
        str | None, typer.Option(help="Organisms, with commas; such a validation vouches for nothing.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws prompts, pairs and noise.")] = 0,
    jobs: Annotated[int | None, typer.Option(help="Processes; one a core if not given.")] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train the trained organisms again first; needs --out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline on models whose mode is known; exit code 1 where something planted is not recovered.

    Later runs of this version show the result. Example: kvpatch validate --quick
    """
    if out is not None:
        _writable(out)
    if retrain and out is None:
        raise KvpatchError("--retrain needs --out, where the new weights go")
    from kvpatch.organisms.directories import ORGANISMS, WEIGHTS

    names = None if only is None else [name.strip() for name in only.split(",") if name.strip()]
    if names is not None and (not names or set(names) - set(ORGANISMS)):
        unknown = next(iter(set(names) - set(ORGANISMS)), only)
        raise KvpatchError(f"no organism {unknown!r}; there are {', '.join(ORGANISMS)}")
    from kvpatch.models.load import cache_directory
    from kvpatch.organisms.record import place_in, write_validation
    from kvpatch.organisms.validation import FULL, QUICK
    from kvpatch.organisms.validation import validate as run_validation
    from kvpatch.progress import retraining, validating
    from kvpatch.summaries import print_validation

    weights = WEIGHTS
    if retrain and out is not None:
        from kvpatch.organisms.weights import retrain as train_again

        weights = out / "weights"
        with retraining() as report:
            train_again(weights, report)
    with validating() as on_job:
        found = run_validation(
            QUICK if quick else FULL, seed=seed, names=names, processes=jobs, weights=weights, on_job=on_job
        )
    if names is None and not retrain:
        write_validation(found, place_in(cache_directory(), found))
    if out is not None:
        write_validation(found, out)
    _print({"passed": found.passed, **found.model_dump()}, as_json, lambda: print_validation(found))
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def bank(
    name: Annotated[str, typer.Argument(help="Shipped bank, or a directory of YAML files.")] = "recursion",
    model: Annotated[str, typer.Option("--model", help="Whose tokenizer counts the tokens.")] = "smollm2-135m",
    group: Annotated[str | None, typer.Option(help="Only this group.")] = None,
    as_json: Json = False,
) -> None:
    """Print a prompt bank with token lengths for a model.

    Example: kvpatch bank recursion --model smollm2-135m --group recursive
    """
    from kvpatch.model import load
    from kvpatch.progress import loading
    from kvpatch.prompts.bank import load_bank
    from kvpatch.summaries import bank_summary, print_bank

    found = load_bank(name)
    with loading() as report:
        loaded = load(model, progress=report)
    summary = bank_summary(found, lambda text: loaded.encode(text).body_length, group)
    _print(summary, as_json, lambda: print_bank(summary))


@app.command()
def schema() -> None:
    """Print the JSON Schema of protocol files, for editors.

    Example: kvpatch schema > protocol.schema.json
    """
    from kvpatch.protocols.schema import Protocol

    typer.echo(json.dumps(Protocol.model_json_schema(), indent=1))


@app.command()
def models(as_json: Json = False) -> None:
    """List the named models: real ones that need no account.

    Example: kvpatch models
    """
    from kvpatch.models.load import is_pulled
    from kvpatch.models.named import named_models
    from kvpatch.organisms.directories import ORGANISMS, PREFIX
    from kvpatch.summaries import print_models

    listed = [
        {
            "name": k,
            "about": m.about,
            "licence": m.licence,
            "terms": m.terms,
            "megabytes": sum(w.bytes for w in m.wheels) // 10**6,
            "pulled": is_pulled(k),
        }
        for k, m in named_models().items()
    ]
    _print(listed, as_json, lambda: print_models(listed, [PREFIX + name for name in ORGANISMS]))


@app.command()
def pull(name: Annotated[str, typer.Argument(help="A name from `kvpatch models`.")]) -> None:
    """Fetch a named model and convert it once.

    Example: kvpatch pull smollm2-135m
    """
    from kvpatch.models.load import pull as pull_model
    from kvpatch.progress import loading

    with loading() as report:
        where = pull_model(name, report)
    typer.echo(f"{name}: {where}")


def _refuse_code(protocol: Protocol, is_allowed: bool) -> None:
    """A protocol is data; the function it may name is not, and runs only if asked for."""
    from kvpatch.readouts.scorer import names_code

    name = protocol.readouts.lexicon
    if names_code(name) and not is_allowed:
        raise KvpatchError(
            f"{protocol.protocol} scores with the function {name}: --allow-code runs it, if you trust it"
        )


def _warn_of_too_few(protocol: Protocol, n: int | None, phases: list[str] | None) -> None:
    """Say what a run of so many pairs could not see, before it costs anything.

    Raises:
        ProtocolError: for a phase the protocol does not have, or an n below 1.
    """
    from kvpatch.protocols.plan import chosen_phases
    from kvpatch.statistics.power import warnings_before

    chosen_phases(protocol, phases, n)
    for line in warnings_before(protocol, n, phases):
        typer.echo(f"warning: {line}", err=True)


def _warn_of_clocks(loaded: dict[str | None, Model]) -> None:
    """Say which models' prompts hold the date, since a run of theirs can't be resumed when it has changed."""
    for model in loaded.values():
        if model.scaffold is not None and model.scaffold.depends_on_clock:
            typer.echo(
                f"warning: the chat template of {model.loaded.name} writes the date or time into every prompt; a run "
                "can be resumed only while the template writes the same",
                err=True,
            )


def _load_all(
    protocol: Protocol, model: str, phases: list[str] | None, replaced: list[str] | None, **settings: Any
) -> dict[str | None, Model]:
    """The run's own model, and the further ones that its phases need."""
    from kvpatch.model import load
    from kvpatch.progress import loading
    from kvpatch.run import other_models

    names: dict[str | None, str] = {None: model, **other_models(protocol, phases)}
    for text in replaced or []:
        key, _, name = text.partition("=")
        if key not in protocol.models or not name:
            known = ", ".join(protocol.models) or "none"
            raise KvpatchError(f"--other-model {text!r} must read KEY=MODEL; the protocol's keys: {known}")
        if key in names:
            names[key] = name
    with loading() as report:
        return {key: load(name, progress=report, **settings) for key, name in names.items()}


def _names(phases: str | None) -> list[str] | None:
    if phases is None:
        return None
    names = [name.strip() for name in phases.split(",") if name.strip()]
    if not names:
        raise KvpatchError(f"--phases {phases!r} names no phase; leave it out for all")
    return names


def _print(summary: Any, as_json: bool, pretty: Callable[[], None]) -> None:
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
    else:
        pretty()


def _writable(out: Path) -> None:
    """Say at once, before minutes are spent, that a directory can't be written."""
    existing = out
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise KvpatchError(f"{out} can't be written: {existing} is {'read-only' if existing.is_dir() else 'a file'}")


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors meant for a person go out in one line (each mistake of a protocol in its own) with exit code 2; --debug
    shows where they came from."""
    try:
        yield
    except KvpatchError as error:
        if os.environ.get("KVPATCH_DEBUG"):
            raise
        for line in error.lines if isinstance(error, ProtocolMistakes) else (str(error),):
            sys.stderr.write(f"kvpatch: {' '.join(line.split())}\n")
        sys.exit(2)
    except SystemExit as stop:
        # typer turns Ctrl-C into this exit code.
        if stop.code == 130:
            sys.stderr.write("kvpatch: stopped; what was stored is kept, and the same command goes on from there\n")
        raise


def main() -> None:
    """Entry point."""
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        os.environ["KVPATCH_DEBUG"] = "1"
    with _one_line_errors():
        app()


if __name__ == "__main__":
    main()
