"""Buckets of object stores: what is asked of one, by obstore where it is written, and by fsspec where it is only read.

Credentials are found by the cloud's own chain and stored nowhere. For S3 that is boto3's: environment, profile, SSO,
the machine's role. `AWS_ENDPOINT_URL` names another server than Amazon's.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from kvpatch.errors import StoreError, missing_extra

RETRIES = 8
"""Times that a request is sent again where the store does not answer."""
WRITTEN = ("s3", "gs", "az")
"""Schemes whose stores have conditional writes."""


class Changed(OSError):
    """A conditional write found another version than the one it was to replace."""


@dataclass(frozen=True)
class Found:
    """An object's version, size in bytes, and when it was last written, in seconds since 1970 by the store's clock."""

    tag: str
    size: int
    modified: float
    version: str | None = None

    @property
    def st_mtime(self) -> float:
        return self.modified

    @property
    def st_mtime_ns(self) -> int:
        return int(self.modified * 1e9)

    st_ctime_ns = st_mtime_ns

    @property
    def st_size(self) -> int:
        return self.size

    @property
    def st_ino(self) -> int:
        """Stands for the version, so that a stamp of the object differs wherever its version does."""
        return hash(self.tag)

    st_dev = 0


class Bucket(Protocol):
    """One bucket. Every method raises FileNotFoundError where there is no such object, and OSError for all else."""

    def get(self, key: str) -> tuple[bytes, Found]: ...

    def head(self, key: str) -> Found: ...

    def list(self, prefix: str) -> dict[str, Found]: ...

    def inside(self, prefix: str) -> tuple[list[str], list[str]]:
        """(folders, objects) that a folder holds itself."""
        ...

    def put(self, key: str, data: bytes) -> None: ...

    def put_new(self, key: str, data: bytes) -> Found: ...

    def put_over(self, key: str, data: bytes, known: Found) -> Found: ...

    def delete(self, key: str) -> None: ...


class _ObstoreBucket:
    """A bucket by obstore."""

    def __init__(self, scheme: str, name: str) -> None:
        try:
            self._api: Any = importlib.import_module("obstore")
            self._store = _opened(scheme, name)
        except ImportError as error:
            raise (missing_extra(error) or error) from error
        except Exception as error:
            raise StoreError(f"{scheme}://{name} can't be used: {_reason(error)}") from error

    def get(self, key: str) -> tuple[bytes, Found]:
        found = self._asked(self._api.get, key)
        return bytes(found.bytes()), _found(found.meta)

    def head(self, key: str) -> Found:
        return _found(self._asked(self._api.head, key))

    def list(self, prefix: str) -> dict[str, Found]:
        return {each["path"]: _found(each) for each in self._asked(self._api.list, prefix or None).collect()}

    def inside(self, prefix: str) -> tuple[list[str], list[str]]:
        found = self._asked(self._api.list_with_delimiter, prefix or None)
        return list(found["common_prefixes"]), [each["path"] for each in found["objects"]]

    def put(self, key: str, data: bytes) -> None:
        self._asked(self._api.put, key, data, use_multipart=False)

    def put_new(self, key: str, data: bytes) -> Found:
        return self._put_if(key, data, "create")

    def put_over(self, key: str, data: bytes, known: Found) -> Found:
        version = {"e_tag": known.tag} | ({} if known.version is None else {"version": known.version})
        return self._put_if(key, data, version)

    def delete(self, key: str) -> None:
        self._asked(self._api.delete, key)

    def _put_if(self, key: str, data: bytes, mode: object) -> Found:
        try:
            done = self._asked(self._api.put, key, data, mode=mode, use_multipart=False)
        except Changed:
            # An answer that was lost on its way is asked for again, and then finds what it wrote itself.
            content, found = self.get(key)
            if content != data:
                raise
            return found
        return Found(done["e_tag"] or "", len(data), time.time(), done["version"])

    def _asked(self, call: Any, *args: Any, **settings: Any) -> Any:
        try:
            return call(self._store, *args, **settings)
        except Exception as error:
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(_reason(error)) from error
            name = type(error).__name__
            if name in ("AlreadyExistsError", "PreconditionError"):
                raise Changed(_reason(error)) from error
            raise OSError(_reason(error)) from error


def _opened(scheme: str, name: str) -> Any:
    stores: Any = importlib.import_module("obstore.store")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme != "s3":
        return stores.from_url(f"{scheme}://{name}")
    credentials: Any = importlib.import_module("obstore.auth.boto3")
    patience = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=30)}  # well within the time of a lease
    settings: dict[str, Any] = {"retry_config": patience}
    if endpoint:
        settings["endpoint"] = endpoint
        settings["client_options"] = {"allow_http": endpoint.startswith("http://")}
    try:
        provider = credentials.Boto3CredentialProvider()
    except ValueError:  # none are found: a public bucket can be read
        return stores.S3Store(name, skip_signature=True, **settings)
    return stores.S3Store(name, credential_provider=provider, **settings)


def _found(meta: Any) -> Found:
    return Found(meta["e_tag"] or "", meta["size"], meta["last_modified"].timestamp(), meta["version"])


class _ReadBucket:
    """What fsspec reads, such as datasets of the Hugging Face hub. It writes nothing."""

    def __init__(self, scheme: str, name: str) -> None:
        self.scheme, self.name = scheme, name
        try:
            fsspec: Any = importlib.import_module("fsspec")
            self._files = fsspec.filesystem(scheme)
        except ImportError as error:
            raise (missing_extra(error) or StoreError(f"{scheme}:// can't be read: {_reason(error)}")) from error

    def get(self, key: str) -> tuple[bytes, Found]:
        found = self.head(key)
        return self._asked(self._files.cat_file, key), found

    def head(self, key: str) -> Found:
        return self._known(self._asked(self._files.info, key))

    def list(self, prefix: str) -> dict[str, Found]:
        self._files.invalidate_cache()
        try:
            found = self._asked(self._files.find, prefix, detail=True)
        except FileNotFoundError:
            return {}
        return {path.removeprefix(f"{self.name}/"): self._known(info) for path, info in found.items()}

    def inside(self, prefix: str) -> tuple[list[str], list[str]]:
        try:
            found = self._asked(self._files.ls, prefix, detail=True)
        except FileNotFoundError:
            return [], []
        named = [(each["type"], each["name"].removeprefix(f"{self.name}/")) for each in found]
        return [n for kind, n in named if kind == "directory"], [n for kind, n in named if kind != "directory"]

    def put(self, key: str, data: bytes) -> None:
        raise self._refusal()

    def put_new(self, key: str, data: bytes) -> Found:
        raise self._refusal()

    def put_over(self, key: str, data: bytes, known: Found) -> Found:
        raise self._refusal()

    def delete(self, key: str) -> None:
        raise self._refusal()

    def _refusal(self) -> OSError:
        return OSError(
            f"{self.scheme}:// has no conditional writes, without which two processes could write there at once; run "
            f"in a local directory, {', '.join(f'{scheme}://' for scheme in WRITTEN)}, and upload the finished run"
        )

    def _known(self, info: dict[str, Any]) -> Found:
        tag = next((str(info[key]) for key in ("blob_id", "ETag", "etag", "mtime", "created") if info.get(key)), "")
        modified: Any = info.get("created") or getattr(info.get("last_commit"), "date", None) or 0.0
        return Found(
            tag, info.get("size") or 0, float(modified.timestamp() if hasattr(modified, "timestamp") else modified)
        )

    def _asked(self, call: Any, key: str, **settings: Any) -> Any:
        try:
            return call(f"{self.name}/{key}", **settings)
        except OSError:
            raise
        except Exception as error:
            raise OSError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """What a library says went wrong, in a few words; the rest holds addresses and markup."""
    told = " ".join(str(error).partition("Debug source")[0].split()) or type(error).__name__
    first, _, rest = told.partition(": Error performing")
    code = re.search(r"<Code>(\w+)</Code>", rest)
    why = code[1] if code else re.split(r"<\?xml|: <", rest.rpartition(" - ")[2])[0]
    return first[:200] + (f" ({why.strip()[:200]})" if why.strip() else "")


@functools.cache
def bucket(scheme: str, name: str) -> Bucket:
    """The bucket of a name, opened once in a process."""
    return (_ObstoreBucket if scheme in WRITTEN else _ReadBucket)(scheme, name)
