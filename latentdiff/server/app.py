"""The application: routes, errors in their clients' forms, and the page."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from importlib.resources import files

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from latentdiff.server import a1111, openai, own
from latentdiff.server.guard import Guard, error_body
from latentdiff.server.studio import Refused, Studio
from latentdiff.version import __version__

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/canvas.js": ("canvas.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def create_app(studio: Studio, hosts: Iterable[str], token: str | None = None) -> FastAPI:
    """The application of a studio.

    Args:
        studio: the model and its queue; closed with the application.
        hosts: names by which the server may be called, see `Guard`.
        token: what clients must know; None for none.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        studio.queue.close()

    app = FastAPI(
        title="latentdiff", version=__version__, docs_url=None, redoc_url=None, lifespan=life
    )
    for routes in (openai.routes, a1111.routes, own.routes):
        app.include_router(routes(studio))
    for path, (name, kind) in PAGE.items():
        content = (files("latentdiff.server") / "page" / name).read_bytes()
        app.add_api_route(path, _static(content, kind), include_in_schema=False)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_middleware(
        Guard, hosts=hosts, token=token, open_paths=PAGE, most_bytes=studio.limits.body
    )
    return app


def _static(content: bytes, kind: str):
    async def page() -> Response:
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    return page


async def _refused(_: HTTPRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    kind = "rate_limit_error" if error.status == 429 else "invalid_request_error"
    headers = {"retry-after": "1"} if error.status == 429 else None
    return JSONResponse(error_body(f"{error}", error.param, kind), error.status, headers)


async def _failed(_: HTTPRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(f"{error.detail}"), error.status_code, error.headers)


async def _invalid(_: HTTPRequest, error: Exception) -> JSONResponse:
    """What pydantic found first, without the value: it may be a picture, or NaN."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(f"{part}" for part in first["loc"][1:]) or None
    return JSONResponse(error_body(f"{param or 'the body'}: {first['msg']}", param), 400)
