"""The options of the command line that say how a model is read."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvpatch.errors import is_installed

Device = Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if available.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Split the model over GPUs, memory and disk, in place of --device: auto, balanced, sequential, or JSON (a "
        "file, or text) of modules and devices."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16, auto, fp8 (Ada, Hopper and later), or int8 or int4 (bitsandbytes). Default: "
        "float32 on a CPU, bfloat16 on a GPU."
    ),
]
CacheDtype = Annotated[
    str | None,
    typer.Option(
        help="fp8: decoding holds keys and values in one byte each, with --dtype bfloat16 or fp8. Default: the type of "
        "the model."
    ),
]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run modelling code that comes with the model.")]
AllowPickle = Annotated[bool, typer.Option(help="Also read pickled weights, which can run code when read.")]
Revision = Annotated[
    str | None, typer.Option(help="The version of a model from the hub: a branch, a tag or a commit. Default: main.")
]


def how_to_read(
    device: str | None,
    dtype: str | None,
    device_map: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    revision: str | None,
    cache_dtype: str | None = None,
) -> dict[str, Any]:
    """The options that every command with a model takes, and the type of what decoding holds, as `load` takes them."""
    return {
        "device": device,
        "dtype": dtype,
        "device_map": device_map,
        "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle,
        "revision": revision,
        "cache_dtype": cache_dtype,
    }


def at_its_commit(name: str, how: dict[str, Any]) -> dict[str, Any]:
    """How a model is read, the commit fixed of one that comes from the hub.

    It is fetched here, before torch is imported, which takes seconds: whoever has no network hears of it at once.

    Raises:
        ModelError: where the hub can't be reached or has no such model.
    """
    from kvpatch.models.named import hub_repository

    repository = hub_repository(name)
    if repository is None or not is_installed("huggingface_hub"):
        return how
    from kvpatch.cli.progress import loading
    from kvpatch.models.hub import fetch_from_hub

    given = {key: how[key] for key in ("revision", "allow_pickle", "trust_remote_code")}
    with loading() as report:
        return {**how, "revision": fetch_from_hub(repository, report, **given).name}
