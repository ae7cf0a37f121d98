"""Who writes a run on an object store: a lease, an object that is renewed while its holder lives.

The object is `.lock` in the run's folder. It is made by a write that is refused where there is one already, and renewed
by writes that are refused where it is no longer the version that this process wrote. A holder that does not renew it
for `EXPIRES` seconds has lost it to whoever asks next; so has one of this machine whose process is no more, at once.
Ages are told by the store's clock alone. A holder that was stopped and wakes up finds its next renewal refused, and
what it then writes is refused as well (`session.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from kvpatch.errors import StoreError
from kvpatch.files import parse_json
from kvpatch.store.buckets import Changed, Found
from kvpatch.store.objects import ObjectPath

EXPIRES = 60.0
"""Seconds without a renewal after which a lease may be taken over."""
BEATS = 4
"""Renewals within that time."""


class Lease:
    """The lease of one run's folder, held by this process from `acquire` to `release`."""

    def __init__(self, folder: ObjectPath) -> None:
        self.folder, self.place = folder, folder / ".lock"
        self.took_over = False
        self._expires = EXPIRES
        self._told: dict[str, Any] = {}
        self._known: Found | None = None
        self._renewed = 0.0
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease, where it is free, expired, or its holder's process is no more.

        Raises:
            StoreError: naming the holder, and when it last renewed the lease.
            OSError: where the store can't be asked.
        """
        self._told = {**_this_process(), "token": secrets.token_hex(8), "expires_after": self._expires, "renewals": 0}
        for _ in range(5):
            start = time.monotonic()
            try:
                self._known = self.place.bucket.put_new(self.place.key, self._written())
            except Changed:
                try:
                    content, found = self.place.bucket.get(self.place.key)
                except FileNotFoundError:
                    continue
                holder = _holder(content)
                if holder is not None and not _is_gone(holder):
                    self._refuse_unless_expired(holder, found)
                try:
                    self._known = self.place.bucket.put_over(self.place.key, self._written(), found)
                except Changed:
                    continue  # another process was quicker; the next look names it
                self.took_over = holder is not None
            self._renewed = start
            self._thread = threading.Thread(target=self._beat, name="kvpatch-lease", daemon=True)
            self._thread.start()
            return
        raise StoreError(f"{self.folder} is being taken by several kvpatch processes at once; try again")

    def _refuse_unless_expired(self, holder: dict[str, Any], found: Found) -> None:
        age, expires = self._age(found), float(holder.get("expires_after") or EXPIRES)
        if age <= expires:
            raise StoreError(
                f"{self.folder} is in use by {_named(holder)}, which renewed its lease {max(age, 0):.0f} s ago; if "
                f"that process is no more, the lease can be taken over in {max(expires - age, 0) + 1:.0f} s"
            )

    def _age(self, found: Found) -> float:
        """Seconds since an object was written, by the store's clock, which a small object is written to read."""
        probe = self.folder / f".clock-{secrets.token_hex(4)}.tmp"
        probe.bucket.put(probe.key, b"")
        try:
            return probe.bucket.head(probe.key).modified - found.modified
        finally:
            probe.bucket.delete(probe.key)

    def _written(self) -> bytes:
        return json.dumps(self._told).encode()

    def _beat(self) -> None:
        while not self._stop.wait(self._expires / BEATS):
            try:
                self._renew()
            except StoreError:
                return
            except OSError:
                continue  # the store can't be asked just now; `require` tells once the lease has expired

    def _renew(self) -> None:
        with self._lock:
            if self._lost is not None or self._known is None:
                raise StoreError(self._lost or f"{self.folder} is not held")
            start = time.monotonic()
            self._told["renewals"] += 1
            try:
                self._known = self.place.bucket.put_over(self.place.key, self._written(), self._known)
            except (Changed, FileNotFoundError):
                self._lost = self._told_of_loss()
                raise StoreError(self._lost) from None
            self._renewed = start

    def _told_of_loss(self) -> str:
        try:
            holder = _holder(self.place.read_bytes())
        except OSError:
            holder = None
        whom = "another kvpatch process" if holder is None else _named(holder)
        return (
            f"{self.folder} was taken over by {whom}, because this process had not renewed its lease in time; this "
            "process stops and writes nothing more, and what it had stored is kept"
        )

    def require(self, *, is_certain: bool = False) -> None:
        """Make sure that the lease is still held, asking the store where it was not renewed lately, or to be certain.

        Raises:
            StoreError: where another process has taken it over.
            OSError: where the store can't be asked.
        """
        if self._lost is not None:
            raise StoreError(self._lost)
        if is_certain or time.monotonic() - self._renewed > 2 * self._expires / BEATS:
            self._renew()

    def release(self) -> None:
        """Let go of the lease: the object stays, and says that nobody holds it, as a lock file stays that is free."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        with self._lock:
            if self._lost is None and self._known is not None:
                try:
                    self.place.bucket.put_over(self.place.key, b'{"process": null}', self._known)
                except OSError:
                    pass  # it was taken over, or the store can't be asked: then it expires


def is_leased(place: ObjectPath) -> bool:
    """Whether a process holds a lease, as far as this machine's clock tells."""
    try:
        content, found = place.bucket.get(place.key)
    except OSError:
        return False
    holder = _holder(content)
    if holder is None or _is_gone(holder):
        return False
    return time.time() - found.modified < 2 * float(holder.get("expires_after") or EXPIRES)


def _this_process() -> dict[str, Any]:
    return {"process": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "started": _start(os.getpid())}


def _holder(content: bytes) -> dict[str, Any] | None:
    """What a lease says of its holder; None where it is free, or says nothing that can be read."""
    try:
        told = parse_json(content)
    except ValueError:
        return None
    return told if isinstance(told, dict) and told.get("process") else None


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process')} on {holder.get('host')}"


def _machine() -> str | None:
    """What tells this machine, since it was started, from others: within it processes have numbers."""
    try:
        told = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _start(process: int) -> str | None:
    """When a process began, in ticks; None where there is none of this number, or it has ended."""
    try:
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if words[0] in "ZX" else words[19]


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder ran on this machine and is known to have ended."""
    here = _machine()
    return here is not None and holder.get("machine") == here and _start(int(holder["process"])) != holder["started"]
