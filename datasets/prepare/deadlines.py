"""Connections under a deadline.

A timeout of the socket is for one recv: a server that sends a byte now and then would hold a thread for days. So a
timer shuts the attempt's socket down, whatever is being read: the TLS handshake, headers, chunk sizes or the body.
"""

import os
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from urllib3.connection import HTTPConnection as Connection
else:
    Connection = object  # urllib3 waits until something is fetched

watched = threading.local()  # deadline: of the attempt that this thread makes


class Deadline:
    """The seconds that one attempt has."""

    def __init__(self) -> None:
        self.expired, self._lock = False, threading.Lock()
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(0, self._expire)

    def restart(self, seconds: float) -> None:
        self._timer.cancel()
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def watch(self, connected: socket.socket) -> None:
        """Of this socket. A duplicate is kept, since the libraries wrap and close theirs."""
        twin = socket.socket(fileno=os.dup(connected.fileno()))
        with self._lock:
            old, self._socket = self._socket, twin
        if old is not None:
            old.close()
        if self.expired:
            self._expire()

    def _expire(self) -> None:
        with self._lock:
            self.expired = True
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        self._timer.cancel()
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


class Watched(Connection):
    """Of a urllib3 connection: its sockets are under the deadline of the attempt that uses them."""

    def _new_conn(self) -> socket.socket:
        connected = super()._new_conn()
        watched.deadline.watch(connected)
        return connected

    def getresponse(self, *args: Any, **kwargs: Any) -> Any:
        if self.sock is not None:
            watched.deadline.watch(self.sock)
        return super().getresponse(*args, **kwargs)


def new_session() -> Any:
    """A session of requests whose sockets are under `watched.deadline`."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3 import HTTPConnectionPool, HTTPSConnectionPool

    pools = {}
    for scheme, pool in (("http", HTTPConnectionPool), ("https", HTTPSConnectionPool)):
        connection = type("Connection", (Watched, pool.ConnectionCls), {})
        pools[scheme] = type("Pool", (pool,), {"ConnectionCls": connection})

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = pools

        def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
            manager = super().proxy_manager_for(*args, **kwargs)
            manager.pool_classes_by_scheme = pools
            return manager

    class Session(requests.Session):
        def get_redirect_target(self, response: Any) -> None:
            """Of no use to requests, which would read the redirect's whole body."""

    session = Session()
    session.headers.update({"User-Agent": "fMRLRec", "Accept": "*/*", "Accept-Encoding": "identity"})
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter())
    return session
