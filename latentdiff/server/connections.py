"""Connections that must say in time what they want: uvicorn waits for headers without end."""

import asyncio

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol


class PatientProtocol(H11Protocol):
    """uvicorn's connection, which ends where the headers of a request have not come in time.

    The time begins with the connection, and for a further request with its first byte; before that
    `timeout_keep_alive` counts. Of bodies the time is the guard's.
    """

    patience = 30.0  # seconds
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # the headers are there
            self._rest()
        elif self._late is None:
            self._late = self.loop.call_later(self.patience, self.timeout_keep_alive_handler)

    def _rest(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def server_of(app: FastAPI, patience: float = 30.0) -> uvicorn.Server:
    """A server of the app, to be run on a listening socket.

    Args:
        app: the app.
        patience: seconds until the headers of a request must have come.
    """
    protocol = type("Patient", (PatientProtocol,), {"patience": patience})
    return uvicorn.Server(
        uvicorn.Config(
            app, http=protocol, access_log=False, log_level="warning", timeout_keep_alive=10
        )
    )
