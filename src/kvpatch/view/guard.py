"""Who may ask: this machine, under a name that means this machine, with the token that was printed."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAMES = ("127.0.0.1", "localhost", "[::1]")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data: blob:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """ASGI middleware: refuses a foreign Host (a page elsewhere that had its name point here), another method than GET
    or HEAD, and a path that does not begin with the token; sets the headers that keep a
    page to itself.

    token: None asks for none.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, hosts: Iterable[str] = NAMES) -> None:
        self.app, self.token, self.hosts = app, token, tuple(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no other protocol is spoken here; the server closes the connection
        refused = self._refused(scope, await self._is_here(scope))
        if refused is not None:
            await refused(scope, receive, _with_headers(send))
            return
        await self.app(scope, receive, _with_headers(send))

    def _refused(self, scope: Scope, is_here: bool) -> PlainTextResponse | None:
        if not is_here:
            return PlainTextResponse("This view answers to 127.0.0.1 and localhost only.", 421)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("This view only reads.", 405)
        if self.token is not None:
            first = scope["path"].lstrip("/").split("/", 1)[0]
            if not hmac.compare_digest(first.encode(), self.token.encode()):
                return PlainTextResponse("The address needs the token that `kvpatch view` printed.", 403)
        return None

    async def _is_here(self, scope: Scope) -> bool:
        """Whether the request names this machine, once. Starlette decides; the refusal is worded here."""
        let_through: list[bool] = []

        async def noted(*_: object) -> None:
            let_through.append(True)

        async def unsent(_: Message) -> None:
            return

        check = TrustedHostMiddleware(noted, allowed_hosts=self.hosts, www_redirect=False)
        await check(scope, _nothing, unsent)
        return bool(let_through) and sum(name == b"host" for name, _ in scope["headers"]) == 1


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _with_headers(send: Send) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message.get("headers", [])}
            extra = {**HEADERS, "content-security-policy": POLICY}
            headers = [*message.get("headers", [])]
            headers += [(k.encode(), v.encode()) for k, v in extra.items() if k.encode() not in own]
            message = {**message, "headers": headers}
        await send(message)

    return guarded
