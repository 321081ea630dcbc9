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
        most_bytes: of a body.
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
        await self.app(scope, self._bounded(receive), sent)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """The status and the words for a request that must not pass; None for one that may."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or (urlsplit(f"//{hosts[0]}").hostname or "") not in self.hosts:
            return 403, "this server does not go by that name; --allow-host adds one"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != hosts[0].lower():
            return 403, "requests of other sites are not answered"
        closed = self.token is not None and scope["path"] not in self.open_paths
        if closed and not self._knows_token(headers.get("authorization", "")):
            return 401, "the server's token is needed: Authorization: Bearer TOKEN"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.most_bytes:
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

    def _bounded(self, receive: Receive) -> Receive:
        """The same messages, as long as the body is neither too long nor too slow."""
        left, complete = self.most_bytes, False
        deadline = asyncio.get_running_loop().time() + self.patience

        async def received() -> Message:
            nonlocal left, complete
            if complete:  # what follows is the end of the connection, for which one may wait
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not come in time") from None
            left -= len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if left < 0:
                raise HTTPException(413, f"a body may have {self.most_bytes:,} bytes")
            return message

        return received


def error_body(message: str, param: str | None = None, kind: str = "invalid_request_error") -> dict:
    """An error as OpenAI's clients read it; `detail` is where others look."""
    return {
        "error": {"message": message, "type": kind, "param": param, "code": None},
        "detail": message,
    }
