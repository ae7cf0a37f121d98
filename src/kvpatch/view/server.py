"""`kvpatch view`: pages that follow runs as they go on. Loopback only; nothing is written."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import resources
from typing import Any
from urllib.parse import quote

import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from kvpatch.errors import KvpatchError, StoreError, all_visible
from kvpatch.report import charts, page, text
from kvpatch.report.build import mark, report_page
from kvpatch.report.library import chart_library
from kvpatch.store.objects import ObjectPath, Place
from kvpatch.verdicts.chosen_heads import with_heads
from kvpatch.verdicts.outcome import light_rows, outcome_of
from kvpatch.view import estimates, query, trial
from kvpatch.view.guard import Guard
from kvpatch.view.memory import Rest, give_back
from kvpatch.view.runs import LiveRun, Progress, Runs, State, dumps

STATUS = "status"
LOOK_EVERY = 1.0
"""Seconds between two looks at the run directories."""
THREADS = 8
"""In which pages are made at once. More make none sooner, and each keeps memory of its own."""
NOT_FINAL = "Not final: looking is not testing. Estimates and intervals change until the last trial is stored."
FILES = ("run.json", "verdicts.json", "parts.jsonl")
NO_FILE = "There is no such file of this run."


@dataclass
class _Made:
    """What was made of one version of a run, so that it is made once; `lock` keeps two from making it at a time."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    version: tuple[int, State | None] | None = None
    value: Any = None


class View:
    """The pages of some runs."""

    def __init__(self, directories: Sequence[Place]) -> None:
        self.runs = Runs(directories)
        self._made: dict[tuple[str, str], _Made] = {}
        self._pages = _environment()
        self.is_stopping: Callable[[], bool] = lambda: False

    def app(self, token: str | None) -> Guard:
        """The application, behind its guard."""
        routes = [
            Route("/", self.home),
            Route("/events", self.events),
            Route("/static/{name}", self.static),
            Route("/run/{key}/", self.run_page),
            Route("/run/{key}/estimates", self.estimates),
            Route("/run/{key}/report", self.report),
            Route("/run/{key}/trials", self.trials),
            Route("/run/{key}/trial/{trial_id:path}", self.trial),
            Route("/run/{key}/file/{path:path}", self.file),
        ]
        if token is not None:
            # The guard has checked the first part of the path; routes are told of it.
            routes = [Route(f"/{token}{route.path}", route.endpoint) for route in routes]
        self.base = "" if token is None else f"/{token}"
        handlers = {KvpatchError: _as_text, HTTPException: _as_text}
        pages = Starlette(routes=routes, lifespan=self._following, exception_handlers=handlers)
        self.rest = Rest(pages, give_back)
        return Guard(self.rest, token=token)

    @contextlib.asynccontextmanager
    async def _following(self, _: Starlette) -> AsyncIterator[None]:
        import anyio.to_thread

        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        await run_in_threadpool(self.runs.refresh)
        task = asyncio.create_task(self._follow())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            await run_in_threadpool(self.runs.refresh)
            await run_in_threadpool(self.rest.look)

    def _run(self, request: Request) -> LiveRun:
        run = self.runs.by_key.get(request.path_params["key"])
        if run is None:
            raise HTTPException(404, "There is no such run.")
        return run

    def _page(self, name: str, **values: Any) -> HTMLResponse:
        shared = {"base": self.base, "not_final": NOT_FINAL, "runs": list(self.runs.by_key.values())}
        return HTMLResponse(self._pages.get_template(name).render(shared | values))

    def _made_of(self, run: LiveRun, what: str, make: Any) -> Any:
        """What `make` gives for the run as it now stands; made once a version, by one thread at a time. What is said of
        the run's state is made anew when that changes, which no new part tells of."""
        made = self._made.setdefault((run.key, what), _Made())
        with made.lock:
            version = run.version, run.state() if what == STATUS else None
            if made.version != version:
                made.value, made.version = make(), version
            return made.value

    async def home(self, request: Request) -> Response:
        """All runs beside one another."""
        progress = {key: await run_in_threadpool(run.progress) for key, run in self.runs.by_key.items()}
        return self._page("home.html.j2", progress=progress)

    async def run_page(self, request: Request) -> Response:
        """One run: how far it is, what it measures so far, its newest trials."""
        run = self._run(request)
        progress = await run_in_threadpool(run.progress)
        newest = await run_in_threadpool(query.trials, run, {})
        shown = {"newest": newest["rows"][:12], "readouts": query.shown_in("newest", run)}
        return self._page("run.html.j2", run=run, progress=progress, **shown)

    async def events(self, request: Request) -> Response:
        """Server-sent events: the state of every run (or of `?run=`), now and whenever it changes."""
        only = request.query_params.get("run")

        async def stream() -> AsyncIterator[str]:
            said: dict[str, str] = {}
            silent = 0.0
            while not self.is_stopping() and not await request.is_disconnected():
                for key, run in list(self.runs.by_key.items()):
                    if only is None or key == only:
                        made = functools.partial(_status, run)
                        data = await run_in_threadpool(self._made_of, run, STATUS, made)
                        if said.get(key) != data:
                            said[key], silent = data, 0.0
                            yield f"event: status\ndata: {data}\n\n"
                if silent >= 10:
                    silent = 0.0
                    yield ": still here\n\n"
                silent += LOOK_EVERY
                await asyncio.sleep(LOOK_EVERY)

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def estimates(self, request: Request) -> Response:
        """What every hypothesis measures so far, as JSON, each with the chart of how its interval narrows."""
        run = self._run(request)
        found = await run_in_threadpool(self._made_of, run, "estimates", functools.partial(_estimates, run))
        return Response(dumps(found), media_type="application/json")

    async def report(self, request: Request) -> Response:
        """The report of what is stored so far."""
        run = self._run(request)
        html, policy = await run_in_threadpool(self._made_of, run, "report", functools.partial(self._report, run))
        return HTMLResponse(html, headers={"content-security-policy": policy})

    def _report(self, run: LiveRun) -> tuple[str, str]:
        outcome = outcome_of(run.store)
        done, planned = len(outcome.rows), outcome.record.planned
        is_final = bool(outcome.record.finished) and done >= planned
        says = "" if is_final else f"{done:,} of {planned:,} trials. {NOT_FINAL} No verdict below holds before the end."
        home = f"{self.base}/run/{quote(run.key)}/"
        live = page.Live(says, home, f"{self.base}/events?run={quote(run.key)}")
        return report_page(run.store, outcome, live=live), page.policy(is_live=True)

    async def trials(self, request: Request) -> Response:
        """Trials that pass a filter, as a page, or as JSON with `?as=json`."""
        run = self._run(request)
        asked = dict(request.query_params)
        found = await run_in_threadpool(query.trials, run, asked)
        if asked.get("as") == "json":
            return Response(dumps(found), media_type="application/json")
        choices = await run_in_threadpool(query.choices, run)
        kept = {k: v for k, v in asked.items() if k not in ("page", "as")}
        numbers, readouts = query.numbers_of(run), query.shown_in("trials", run)
        has_range = any(asked.get(f"{edge}_{name}") for name in numbers for edge in ("min", "max"))
        shown = {"found": found, "asked": _Asked(asked), "kept": kept, "choices": choices, "has_range": has_range}
        return self._page("trials.html.j2", run=run, numbers=numbers, readouts=readouts, **shown)

    async def trial(self, request: Request) -> Response:
        """One trial."""
        run = self._run(request)
        row = await run_in_threadpool(trial.stored_row, run, request.path_params["trial_id"])
        if row is None:
            raise HTTPException(404, "There is no such trial.")
        asked = request.query_params.get("beside")
        beside = None if not asked else await run_in_threadpool(trial.stored_row, run, asked)
        if asked and (beside is None or beside.get("pair_id") != row.get("pair_id")):
            raise HTTPException(404, "There is no such trial of this pair to stand beside it.")
        head = request.query_params.get("head")
        shown = await run_in_threadpool(trial.page, run, row, mark, beside, head)
        if head and (shown["slots"] is None or head not in shown["slots"]["heads"]):
            raise HTTPException(404, "There is no such head whose attention by slot is stored of this trial.")
        return self._page("trial.html.j2", run=run, **shown)

    async def file(self, request: Request) -> Response:
        """A file of the run directory: one of FILES as it stands, or a part that is still what was stored."""
        run = self._run(request)
        asked = request.path_params["path"]
        part = run.parts.get(asked.removeprefix("trials/")) if asked.startswith("trials/") else None
        if part is not None:
            await run_in_threadpool(run.store.check, part)
        elif asked not in FILES:
            raise HTTPException(404, NO_FILE)
        if isinstance(run.directory, ObjectPath):
            return await run_in_threadpool(_object, run.directory / asked)
        place = (run.directory / asked).resolve()
        if not place.is_relative_to(run.directory.resolve()) or not place.is_file():
            raise HTTPException(404, NO_FILE)
        return FileResponse(place, filename=place.name, content_disposition_type="attachment")

    async def static(self, request: Request) -> Response:
        """Scripts and style sheets."""
        found = _static().get(request.path_params["name"])
        if found is None:
            raise HTTPException(404, "There is no such file.")
        content, kind = found
        return Response(content, media_type=kind)


def _object(place: ObjectPath) -> Response:
    try:
        content = place.read_bytes()
    except FileNotFoundError:
        raise HTTPException(404, NO_FILE) from None
    return Response(content, headers={"content-disposition": f'attachment; filename="{place.name}"'})


class _Asked(dict[str, str]):
    """What was asked for; nothing where a name is missing."""

    def __missing__(self, key: str) -> str:
        return ""


def _status(run: LiveRun) -> str:
    """What a stream of events says of a run, as JSON. All streams share it: it is asked for by each, once a second."""
    progress = run.progress()
    readouts = [readout.name for readout in query.shown_in("newest", run)]
    columns = ", ".join(f'"{name}"' for name in readouts)
    newest = run.ask(
        f"select trial_id, phase, condition, pair_id, {columns}, left(text, 160) as text, error "
        "from trials order by place desc limit 12"
    )
    for row in newest:
        row |= {name: text.number(row[name]) for name in readouts}
        row |= {name: all_visible(row[name]) for name in ("phase", "condition", "pair_id", "text", "error")}
    shown = {"speed": speed(progress), "left_text": duration(progress.left), "newest_text": clock(progress.newest)}
    known = {"run": run.key, "version": run.version, "trouble": all_visible(run.trouble)}
    progressed = all_visible(progress.to_dict())
    return dumps({**known, **progressed, **shown, "newest_trials": newest, "newest_readouts": readouts})


def _estimates(run: LiveRun) -> list[dict[str, Any]]:
    protocol = run.protocol
    if protocol is None:
        return []
    try:
        rows = with_heads(light_rows(run.store), run.store, protocol)
    except StoreError:
        return []
    out = estimates.estimates(protocol, rows)
    with charts.unchecked():
        for found in out:
            found["shown"] = {key: text.number(found[key]) for key in ("estimate", "low", "high")}
            unit = f"{'log ' if found['transform'] == 'log' else ''}{found['readout']}"
            title = "r" if found["is_correlation"] else unit
            path = found.pop("path")
            found["chart"] = charts.packed(estimates.narrowing_chart(path, title, found["counts"])) if path else None
    return all_visible(out)


async def _as_text(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 409
    says = error.detail if isinstance(error, HTTPException) else str(error)
    return PlainTextResponse(says, status)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvpatch.view", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=page.shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": text.number, "plain": text.plain, "duration": duration, "clock": clock}
    environment.filters["speed"] = speed
    environment.filters["segment"] = lambda value: quote(str(value), safe="")
    return environment


def duration(seconds: Any) -> str:
    """Return a time span in words of two units at most.

    >>> duration(42), duration(3725), duration(None)
    ('42 s', '1 h 2 min', '–')
    """
    value = text.as_float(seconds)
    if value is None:
        return text.DASH
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def speed(progress: Progress) -> str:
    """Return how fast a run goes, in words."""
    if not progress.trials_per_second:
        return text.DASH
    return f"{text.number(progress.trials_per_second)} trials/s, {text.number(progress.tokens_per_second)} tokens/s"


def clock(moment: Any) -> str:
    """Return a moment, in seconds since the epoch, as local date and time."""
    value = text.as_float(moment)
    return text.DASH if value is None else datetime.fromtimestamp(value).strftime("%Y-%m-%d %H:%M:%S")


@functools.cache
def _static() -> dict[str, tuple[str, str]]:
    own, shared = resources.files("kvpatch.view") / "templates", resources.files("kvpatch.report") / "templates"
    style = shared.joinpath("report.css").read_text("utf-8") + own.joinpath("view.css").read_text("utf-8")
    library = chart_library()
    return {
        "view.css": (style, "text/css"),
        "view.js": (own.joinpath("view.js").read_text("utf-8"), "text/javascript"),
        "vega.js": (library, "text/javascript"),
    }


class _Server(uvicorn.Server):
    """Says when it answers."""

    def __init__(self, config: uvicorn.Config, *, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def serve(directories: Sequence[Place], *, port: int, token: str | None, on_ready: Any) -> None:
    """Serve until stopped. port: 0 takes a free one. on_ready: called with the address.

    Raises:
        KvpatchError: where the port can't be had.
    """
    view = View(directories)
    config = uvicorn.Config(
        view.app(token), host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=4
    )
    server = _Server(config, on_ready=lambda: on_ready(address))
    view.is_stopping = lambda: server.should_exit  # streams of events would keep a stopped server waiting
    try:
        socket = config.bind_socket()
    except SystemExit:
        raise KvpatchError(f"port {port} is in use; give another --port, or 0 for a free one") from None
    address = f"http://127.0.0.1:{socket.getsockname()[1]}/{f'{token}/' if token else ''}"
    server.run(sockets=[socket])


def new_token() -> str:
    """Return a token that can't be guessed."""
    return secrets.token_urlsafe(24)
