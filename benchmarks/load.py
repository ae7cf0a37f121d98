"""The view under load: 200,000 trials, 100 clients for some minutes, and 50 streams of events that stand idle.

    python benchmarks/load.py [--trials 200000] [--clients 100] [--streams 50] [--minutes 10]

The trials are synthetic and stored as a run stores them. `kvpatch view` serves them on the loopback interface from a
process of its own. A client asks for a page or a query, reads the answer, waits up to two seconds and goes on. Printed
are answers by kind with their median and slowest time, errors, the server's memory before, at most and after, and the
share of a core that the idle streams cost. Needs no model. The memory before is that after every kind of page was made
once.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from kvpatch.store import directory as store_room
from kvpatch.store.columns import trial_schema
from kvpatch.store.directory import Store
from kvpatch.store.parts import Part
from synthetic import dec7, record_of, run_parts

PHASES = ["1", "4"]
WORDS = ("itself", "attention", "bread", '"turns back"', "nowhere", "awareness")
SHARES = {"home": 2, "run": 3, "trials": 4, "search": 3, "trial": 4, "estimates": 2, "report": 1}
"""What is asked for, and how often beside one another."""
GROWTH = 1.2
"""Most that the server's memory may grow."""
IDLE = 0.05
"""Share of a core that the idle streams may cost."""


def write_run(directory: Path, trials: int) -> list[str]:
    """A run of so many trials; returns some of their ids."""
    protocol, store, parts, planned = dec7(), Store(directory), [], Counter()
    base = [row for _, rows in run_parts(protocol, 12, 1, 2, phases=PHASES) for row in rows]
    table = pa.Table.from_pylist(base, schema=trial_schema())
    ids: list[str] = []
    with store.locked():
        store.trials.mkdir()
        for copy in range(-(-trials // len(table))):
            part = table.slice(0, min(len(table), trials - copy * len(table)))
            names = [f"{name}-{copy}" for name in part["trial_id"].to_pylist()]
            for column, values in (("trial_id", names), ("sample", [copy] * len(part))):
                place = part.schema.get_field_index(column)
                part = part.set_column(place, part.schema.field(place), pa.array(values, part.schema.field(place).type))
            data, name = store_room._parquet(part), f"1-{copy:04d}-{copy:012x}.parquet"
            store_room._stored(store.trials / name, data)
            parts.append(Part(part=name, rows=len(part), sha256=hashlib.sha256(data).hexdigest()))
            planned.update(part["phase"].to_pylist())
            ids += names[:20]
        store.write_index(parts)
        store.write_record(record_of(protocol, dict(planned), phases=PHASES))
    return ids


class Clients:
    """Asks the server, and keeps what came."""

    def __init__(self, address: str, ids: list[str], rng: random.Random) -> None:
        place = urlsplit(address)
        self.host, self.port, self.base = str(place.hostname), int(place.port or 0), place.path.rstrip("/")
        self.ids, self.rng = ids, rng
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.errors: Counter[str] = Counter()

    def path(self) -> tuple[str, str]:
        """(kind, path) of something that a person would ask for."""
        rng = self.rng
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        filters = f"page={rng.randint(1, 4000)}&condition={rng.choice('ABC')}&sort=-recursive_score"
        return kind, {
            "home": "/",
            "run": "/run/run/",
            "trials": f"/run/run/trials?{filters}",
            "search": f"/run/run/trials?as=json&q={rng.choice(WORDS).replace(' ', '+')}",
            "trial": f"/run/run/trial/{rng.choice(self.ids)}",
            "estimates": "/run/run/estimates",
            "report": "/run/run/report",
        }[kind]

    async def ask(self, kind: str, path: str) -> None:
        """Ask once, and read the whole answer."""
        start = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            request = f"GET {self.base}{path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nConnection: close\r\n\r\n"
            writer.write(request.encode())
            answer = await reader.read()
            writer.close()
            status = answer[9:12].decode()
            if status != "200":
                self.errors[f"{kind}: {status} {answer[-120:]!r}"] += 1
        except OSError as error:
            self.errors[f"{kind}: {error}"] += 1
        self.seconds[kind].append(time.monotonic() - start)

    async def client(self, until: float) -> None:
        """Go on asking."""
        while time.monotonic() < until:
            await self.ask(*self.path())
            await asyncio.sleep(self.rng.random() * 2)

    async def stream(self, until: float) -> None:
        """Hold a stream of events open and read what comes."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(f"GET {self.base}/events?run=run HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n\r\n".encode())
        read = 0
        while (left := until - time.monotonic()) > 0:
            try:
                read += len(await asyncio.wait_for(reader.read(1 << 16), left))
            except TimeoutError:
                break
        writer.close()
        if not read:
            self.errors["stream: nothing came"] += 1


async def measured(server: psutil.Process, clients: Clients, options: argparse.Namespace) -> bool:
    """Carry it out and print it; whether the bars hold."""
    for kind, path in {clients.path() for _ in range(300)} | {("report", "/run/run/report")}:
        if not clients.seconds[kind]:
            await clients.ask(kind, path)
    first = ", ".join(f"{kind} {times[0]:.1f} s" for kind, times in clients.seconds.items())
    print(f"first answers: {first}", flush=True)
    await asyncio.sleep(2)
    clients.seconds.clear()

    def used() -> float:
        times = server.cpu_times()
        return times.user + times.system

    before = used()
    start = time.monotonic()
    await asyncio.sleep(options.idle)
    alone = (used() - before) / (time.monotonic() - start)
    until = time.monotonic() + options.idle + 5
    streams = [asyncio.create_task(clients.stream(until)) for _ in range(options.streams)]
    await asyncio.sleep(4)
    before, start = used(), time.monotonic()
    await asyncio.sleep(options.idle)
    share = (used() - before) / (time.monotonic() - start)
    await asyncio.gather(*streams)
    print(f"without streams {alone:.1%} of a core, with {options.streams} idle ones {share:.1%}", flush=True)

    at_start = most = server.memory_info().rss
    until = time.monotonic() + 60 * options.minutes
    going = [asyncio.create_task(clients.client(until)) for _ in range(options.clients)]
    while time.monotonic() < until:
        await asyncio.sleep(1)
        most = max(most, server.memory_info().rss)
    await asyncio.gather(*going)
    await asyncio.sleep(5)
    at_end = server.memory_info().rss
    for kind, times in sorted(clients.seconds.items()):
        print(f"{kind:10}{len(times):8} answers, median {statistics.median(times):7.2f} s, slowest {max(times):7.2f} s")
    print(f"memory: {at_start >> 20} MiB before, {most >> 20} at most, {at_end >> 20} after")
    print(f"errors: {sum(clients.errors.values())}")
    for told, count in clients.errors.most_common(10):
        print(f"  {count} of {told}")
    return not clients.errors and at_end <= GROWTH * at_start and share < IDLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=200_000)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--idle", type=float, default=30, help="seconds for which idle streams are watched")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        start = time.monotonic()
        ids = write_run(Path(name) / "run", options.trials)
        print(f"{options.trials} trials written in {time.monotonic() - start:.0f} s", flush=True)
        command = [sys.executable, "-m", "kvpatch", "view", str(Path(name) / "run")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            start = time.monotonic()
            address = server.stdout.readline().removeprefix("view: ").strip()
            print(f"served after {time.monotonic() - start:.0f} s", flush=True)
            try:
                clients = Clients(address, ids, random.Random(0))
                holds = asyncio.run(measured(psutil.Process(server.pid), clients, options))
            finally:
                server.terminate()
    sys.exit(not holds)


if __name__ == "__main__":
    main()
