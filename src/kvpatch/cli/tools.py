"""Commands about models, banks and protocols: check, validate, bank, schema, models, pull."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpatch.cli.app import (
    All,
    Json,
    app,
    refuse_unwritable,
    show,
)
from kvpatch.cli.console import say, say_json
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
from kvpatch.errors import KvpatchError, is_installed

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvpatch.prompts.bank import Bank


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="A named model, a hub id, a directory or a .gguf file.")],
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
    cache_dtype: CacheDtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    revision: Revision = None,
    is_all: All = False,
) -> None:
    """Measure whether a model is patched correctly; exit code 1 where an identity fails.

    Example: kvpatch check smollm2-135m
    """
    read = how_to_read(device, dtype, device_map, trust_remote_code, allow_pickle, revision, cache_dtype)
    how = at_its_commit(model, read)
    from kvpatch.checks.identities import check as check_model
    from kvpatch.cli.progress import loading
    from kvpatch.cli.tables import print_check
    from kvpatch.engine.loading import load

    with loading() as report:
        loaded = load(model, progress=report, **how)
    found = check_model(loaded)
    summary = {
        "model": model,
        "passed": all(i.holds is not False for i in found),
        "identities": [i.model_dump() for i in found],
    }
    show(summary, as_json, lambda: print_check(found), is_all)
    if not summary["passed"]:
        raise typer.Exit(1)


@app.command()
def validate(
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed per organism and few runs. Takes a few minutes.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write validation.json, and retrained weights, into this directory.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="Organisms, separated by commas. A partial validation does not count as evidence."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides the random prompts, pairs and noise.")] = 0,
    jobs: Annotated[int | None, typer.Option(help="Number of processes. Default: one per core.")] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="First train the trained organisms again. Needs --out.")
    ] = False,
    as_json: Json = False,
    is_all: All = False,
) -> None:
    """Run the whole pipeline on models whose mode is known; exit code 1 where something planted is not recovered.

    Later runs of this version show the result. Example: kvpatch validate --quick
    """
    if out is not None:
        refuse_unwritable(out)
    if retrain and out is None:
        raise KvpatchError("--retrain needs --out, where the new weights go")
    from kvpatch.organisms.directories import WEIGHTS
    from kvpatch.specs.organisms import ORGANISMS

    names = None if only is None else [name.strip() for name in only.split(",") if name.strip()]
    if names is not None and (not names or set(names) - set(ORGANISMS)):
        unknown = next(iter(set(names) - set(ORGANISMS)), only)
        raise KvpatchError(f"no organism {unknown!r}; there are {', '.join(ORGANISMS)}")
    from kvpatch.cli.progress import retraining, validating
    from kvpatch.cli.tables import print_validation
    from kvpatch.files import cache_directory
    from kvpatch.store.validation import place_in, write_validation
    from kvpatch.validation.pipeline import FULL, QUICK
    from kvpatch.validation.pipeline import validate as run_validation

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
    show({"passed": found.passed, **found.model_dump()}, as_json, lambda: print_validation(found), is_all)
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def bank(
    name: Annotated[
        str, typer.Argument(help="The name of a shipped bank, or a directory of YAML files.")
    ] = "recursion",
    model: Annotated[
        str, typer.Option("--model", help="The model whose tokenizer counts the tokens.")
    ] = "smollm2-135m",
    group: Annotated[str | None, typer.Option(help="Show only this group.")] = None,
    balance: Annotated[
        bool,
        typer.Option("--balance", help="Compare the groups: person, speech act, length, word frequency, lexicon hits."),
    ] = False,
    lexicon: Annotated[
        str, typer.Option(help="With --balance: the lexicon whose hits are counted, a shipped name or a YAML file.")
    ] = "recursion",
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    revision: Revision = None,
    as_json: Json = False,
    is_all: All = False,
) -> None:
    """Print a prompt bank with token lengths for a model, or what else differs between its groups.

    Exit code 1 where --balance finds groups further apart than 5 percentage points or 5%. Example: kvpatch bank
    recursion --balance
    """
    from kvpatch.prompts.bank import load_bank

    found = load_bank(name)
    how = at_its_commit(model, how_to_read(device, dtype, device_map, trust_remote_code, allow_pickle, revision))
    from kvpatch.cli.progress import loading
    from kvpatch.cli.tables import bank_summary, print_bank
    from kvpatch.engine.loading import load

    with loading() as report:
        loaded = load(model, progress=report, **how)
    if balance:
        _show_balance(found, lexicon, lambda text: loaded.encode(text).body_length, as_json, is_all)
        return
    summary = bank_summary(found, lambda text: loaded.encode(text).body_length, group)
    show(summary, as_json, lambda: print_bank(summary), is_all)


def _show_balance(bank: Bank, lexicon: str, tokens: Callable[[str], int], as_json: bool, is_all: bool) -> None:
    from kvpatch.cli.balance import balance_summary, print_balance
    from kvpatch.planning.balance import balance
    from kvpatch.readouts.behavior import Lexicon

    found = balance(bank, Lexicon.load(lexicon), tokens)
    show(balance_summary(found), as_json, lambda: print_balance(found), is_all)
    if any(one.over for one in found):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of protocol files, for editors.

    Example: kvpatch schema > protocol.schema.json
    """
    from kvpatch.protocols.schema import Protocol

    say_json(json.dumps(Protocol.model_json_schema(), indent=1) + "\n")


@app.command()
def models(as_json: Json = False, is_all: All = False) -> None:
    """List the named models: those that need no account, and models of the Hugging Face hub.

    Example: kvpatch models
    """
    from kvpatch.cli.tables import print_models
    from kvpatch.models.named import hub_models, is_pulled, named_models
    from kvpatch.specs.organisms import ORGANISMS, PREFIX

    listed = [
        {
            "name": k,
            "about": m.about,
            "licence": m.licence,
            "terms": m.terms,
            "megabytes": sum(w.bytes for w in m.wheels) // 10**6,
            "pulled": is_pulled(k),
            "gated": False,
            "repository": None,
            "memory_gb": None,
            "layers": {},
        }
        for k, m in named_models().items()
    ] + [
        {
            "name": k,
            "about": m.about,
            "licence": m.licence,
            "terms": f"https://huggingface.co/{m.repository}" if m.gated else None,
            "megabytes": m.megabytes,
            "pulled": m.is_here,
            "gated": m.gated,
            "repository": m.repository,
            "memory_gb": round(m.megabytes / 1000, 1),
            "layers": m.layers,
        }
        for k, m in hub_models().items()
    ]
    show(listed, as_json, lambda: print_models(listed, [PREFIX + name for name in ORGANISMS]), is_all)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="A name from `kvpatch models`.")],
    again: Annotated[
        bool, typer.Option("--again", help="Also where it is there already: a damaged one is replaced.")
    ] = False,
) -> None:
    """Fetch a named model and convert it once. Without torch it is fetched now and converted when it is first loaded.

    Example: kvpatch pull smollm2-135m
    """
    from kvpatch.cli.progress import loading
    from kvpatch.models.named import hub_models

    if name in hub_models():
        from kvpatch.models.hub import fetch_from_hub

        with loading() as report:
            where = fetch_from_hub(hub_models()[name].repository, report)
        say(f"{name}: {where}")
        return
    has_torch = is_installed("torch") and is_installed("transformers")
    if has_torch:
        from kvpatch.models.load import pull as pull_model
    else:
        from kvpatch.models.named import pull_unconverted as pull_model

    with loading() as report:
        where = pull_model(name, report, again=again)
    if where.is_file():
        say("fetched; to convert it and run it, kvpatch needs torch: pip install 'kvpatch[run]'", err=True)
    say(f"{name}: {where}")
