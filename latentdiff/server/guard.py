"""The door of the server: who may ask for what, checked before anything of a request is read."""

import asyncio
import base64
import binascii
import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FORMS = ("/v1/images/edits",)  # the paths that take multipart/form-data; the others take JSON
_BODIES = 8  # as many of the largest may be in memory at a time
SAFETY = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; "
        "base-uri 'none'; form-action 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a server that is bound to `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuse requests of other sites, other names, without the token, too large or too slow.

    A page of another site can reach a server of this machine through its reader's browser: by its
    own name that it points here (the Host header tells), or across origins (Origin tells).

    Args:
        app: what is behind the door.
        hosts: names by which the server may be called, without ports.
        token: what `Authorization: Bearer` (or the password of Basic) must be; None asks for none.
        open_paths: what needs no token: the page itself, which holds nothing of anyone's.
        most_bytes: of a body; the bodies of all requests together may have `_BODIES` times as many.
        patience: seconds until a body must have come.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Iterable[str],
        token: str | None,
        open_paths: Iterable[str],
        most_bytes: int,
        patience: float = 30.0,
    ) -> None:
        self.app = app
        self.hosts = {host.lower() for host in hosts}
        self.token = token
        self.open_paths = frozenset(open_paths)
        self.most_bytes = most_bytes
        self.patience = patience
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                safety = [(name.encode(), value.encode()) for name, value in SAFETY.items()]
                message["headers"] = [*message.get("headers", []), *safety]
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            status, message = refusal
            refused = JSONResponse(error_body(message), status, {"connection": "close"})
            await refused(scope, receive, sent)
            return
        body = _Body(self, receive)
        try:
            await self.app(scope, body.received, sent)
        finally:
            self.held -= body.size

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """The status and the words for a request that must not pass; None for one that may."""
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        try:
            host = urlsplit(f"//{hosts[0]}").hostname if len(hosts) == 1 else None
            sites = [urlsplit(origin).netloc.lower() for origin in origins]
        except ValueError:  # brackets that are no address
            return 403, "its Host or Origin is none"
        if host not in self.hosts:
            return 403, "this server does not go by that name; --allow-host adds one"
        if any(site != hosts[0].lower() for site in sites):
            return 403, "requests of other sites are not answered"
        closed = self.token is not None and scope["path"] not in self.open_paths
        if closed and not self._knows_token(headers.get("authorization", "")):
            return 401, "the server's token is needed: Authorization: Bearer TOKEN"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self.most_bytes:
            return 413, f"a body may have {self.most_bytes:,} bytes"
        has_body = length != "0" or "transfer-encoding" in headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        wanted = "multipart/form-data" if scope["path"] in FORMS else "application/json"
        if has_body and kind != wanted:
            return 415, f"the content type must be {wanted}"
        return None

    def _knows_token(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.encode(), (self.token or "").encode())


class _Body:
    """The messages of a request, as long as its body is neither too long nor too slow.

    Attributes:
        size: bytes of it that have come.
    """

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self.size = 0
        self._guard, self._receive = guard, receive
        self._complete = False
        self._deadline = asyncio.get_running_loop().time() + guard.patience

    async def received(self) -> Message:
        """The next message.

        Raises:
            HTTPException: the body is too slow, too long, or too much beside those of others.
        """
        if self._complete:  # what follows is the end of the connection, for which one may wait
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the body did not come in time") from None
        self._complete = not message.get("more_body", False)
        count, most = len(message.get("body", b"")), self._guard.most_bytes
        self.size += count
        self._guard.held += count
        if self.size > most:
            raise HTTPException(413, f"a body may have {most:,} bytes")
        if self._guard.held > _BODIES * most:
            told = "too much is being sent: try again in a moment"
            raise HTTPException(429, told, {"retry-after": "1"})
        return message


def error_body(message: str, param: str | None = None, kind: str = "invalid_request_error") -> dict:
    """An error as OpenAI's clients read it; `detail` is where others look."""
    return {
        "error": {"message": message, "type": kind, "param": param, "code": None},
        "detail": message,
    }
