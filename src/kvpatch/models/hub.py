"""Fetch a model by its hub id (owner/name): the files that are needed, at one commit, into the hub's own cache.

The hub is asked one question first, with a deadline, so that a person without a network hears of it at once. What is on
this machine already is taken where the hub can't be reached. A download that was broken off goes on where it stopped.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kvpatch.errors import ModelError

DEADLINE = 4.0
"""Seconds that the hub may take to answer."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
T = TypeVar("T")


class _UnansweredError(Exception):
    """The hub did not answer in time, or can't be reached."""


def fetch_from_hub(
    name: str,
    report: Callable[[str, int, int], None],
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """The directory that holds a hub model's files; its name is the commit.

    Args:
        revision: a branch, a tag or a commit; the main branch if None. A commit that is here already asks no network.
        allow_pickle, trust_remote_code: also fetch pickled weights, and modelling code.
    Raises:
        ModelError: where there is no such model or revision, it is gated, or the hub can't be reached and the model is
            not on this machine.
    """
    if revision is not None and _COMMIT.fullmatch(revision) and (here := _on_this_machine(name, revision)):
        return here
    try:
        info = _in_time(lambda: HfApi().model_info(name, revision=revision, timeout=DEADLINE))
        files = [sibling.rfilename for sibling in info.siblings or ()]
        wanted = _wanted(files, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        report(f"fetching {name} from {constants.ENDPOINT}", 0, len(wanted))
        # By the name that was asked for, which the cache then knows without a network.
        where = snapshot_download(name, revision=revision, allow_patterns=wanted, etag_timeout=DEADLINE)
        report(f"fetching {name} from {constants.ENDPOINT}", len(wanted), len(wanted))
        return Path(where)
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms at {constants.ENDPOINT}/{name}, then log in with `hf auth login` or "
            "set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision!r}; give a branch, a tag or a commit of it") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no model {name!r} at {constants.ENDPOINT}, or it is private: check its spelling, or log in with "
            "`hf auth login`"
        ) from error
    except HFValidationError as error:
        raise ModelError(f"{name!r} can't be a hub id: {' '.join(str(error).split())}") from error
    except (_UnansweredError, OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if here := _on_this_machine(name, revision):
            return here
        raise ModelError(_unreachable(name, error)) from error
    except Exception as error:
        if not _is_of_network(error):
            raise
        if here := _on_this_machine(name, revision):
            return here
        raise ModelError(_unreachable(name, error)) from error


def _unreachable(name: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == 28:
        return f"{name}: no room left for its files; free some, or set HF_HOME to a directory with room"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    elif status:
        why = f"{constants.ENDPOINT} answers with HTTP status {status}"
    else:
        why = f"{constants.ENDPOINT} can't be reached"
    return (
        f"{name} is not on this machine (or not whole), and {why}; connect and run the same again, which goes on where "
        "a download stopped, or fetch it elsewhere and give its directory (`kvpatch models` lists models that need no "
        "hub)"
    )


def _is_of_network(error: BaseException | None) -> bool:
    """Whether an error is the network's; the hub's client library may change, and has its own kinds."""
    kinds = {base.__name__ for base in type(error).__mro__} if error is not None else set()
    return bool(kinds & {"TransportError", "RequestError", "ConnectionError", "Timeout", "TimeoutException"})


def _in_time(ask: Callable[[], T]) -> T:
    """An answer within the deadline: a resolver or a proxy may hang for longer than any timeout of the request."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((ask(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    if not found:
        raise _UnansweredError
    answer, error = found[0]
    if error is not None:
        raise error
    return answer


def _wanted(files: Sequence[str], *, allow_pickle: bool, trust_remote_code: bool) -> list[str]:
    """The files of a repository that are needed: settings, tokenizer and one set of weights, all at its top."""
    top = [file for file in files if "/" not in file]
    wanted = [file for file in top if any(Path(file).match(pattern) for pattern in _SETTINGS)]
    tensors = [file for file in top if file.endswith(".safetensors")]
    own = [file for file in tensors if file.startswith("model")]
    wanted += own or tensors
    if allow_pickle and not tensors:
        wanted += [file for file in top if file.endswith(".bin")]
    if trust_remote_code:
        wanted += [file for file in top if file.endswith(".py")]
    return wanted


def _on_this_machine(name: str, revision: str | None) -> Path | None:
    """A snapshot that the hub's cache holds, with a configuration and weights; None where it holds none."""
    try:
        where = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:
        return None
    has_weights = any(where.glob("*.safetensors")) or any(where.glob("*.bin"))
    return where if (where / "config.json").exists() and has_weights else None
