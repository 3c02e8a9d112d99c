"""Speaks HTTP for the loopback Hub: request bodies, answers, errors, routes, and failures on demand."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

_PIECE = 64 * 1024
"""Maximum number of bytes that are read from a connection at once."""


@dataclass
class Fault:
    """Says which requests fail, and how.

    A fault concerns the requests whose method is `method` and in whose path the regular expression `path` is found.
    The first `skip` of them pass, the next `times` fail, and the later ones pass again.

    Attributes:
        action: one of
            "drop": the connection is cut after `after` bytes of the request's body, or of the answer's if it has none;
            "stall": nothing more is read after `after` bytes of the request's body, until the server stops;
            "lose answer": the request is carried out and then the connection is cut;
            an HTTP status: it is the answer, and the request is not carried out.
        reached: set when the fault strikes.
    """

    method: str
    path: str
    action: Literal["drop", "stall", "lose answer"] | int = "drop"
    after: int = 0
    skip: int = 0
    times: int = 1
    reached: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Exchange:
    """One request as it was served.

    Attributes:
        status: HTTP status of the answer, or 0 where no answer was sent.
        received: number of bytes of the request's body.
        range: the Range header.
    """

    method: str
    path: str
    status: int
    received: int
    range: str | None


class HubError(Exception):
    """An answer other than success. The client chooses its exception by the status and by the X-Error-Code `code`."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers or {}


class ConnectionCut(Exception):
    """Nothing more can be read from this connection or sent on it."""


_Route = Callable[..., None]
_ROUTES: list[tuple[str, re.Pattern[str], _Route]] = []


def route(method: str, pattern: str) -> Callable[[_Route], _Route]:
    """Register the decorated method as the one that answers these requests.

    In `pattern`, {repo} stands for namespace/name, and any other {word} for one segment of the path.
    """
    pattern = pattern.replace("{repo}", r"(?P<namespace>\w[\w.-]*)/(?P<name>\w[\w.-]*)")
    compiled = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern))

    def register(function: _Route) -> _Route:
        _ROUTES.append((method, compiled, function))
        return function

    return register


class HttpHandler(BaseHTTPRequestHandler):
    """Serves one connection. Its server has `exchanges`, `fault_for(method, path)` and the event `stopping`."""

    protocol_version = "HTTP/1.1"
    # Header and body leave in two writes, and the second must not wait for an acknowledgement.
    disable_nagle_algorithm = True
    timeout = 60

    def handle_request(self) -> None:
        self.url_path = urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        self.fault: Fault | None = self.server.fault_for(self.command, self.url_path)  # type: ignore[attr-defined]
        self.received = 0
        self.recorded = False
        self.unread = self._read_body()
        try:
            self._serve()
        except (ConnectionCut, ConnectionError, TimeoutError):
            self.close_connection = True
            self._record(0)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def authenticate(self) -> None:
        """Find out who asks, before any route is called."""
        raise NotImplementedError

    def _serve(self) -> None:
        try:
            if self.fault and isinstance(self.fault.action, int):
                self.fault.reached.set()
                raise HubError(self.fault.action, "the test asked for this failure")
            self.authenticate()
            for method, pattern, function in _ROUTES:
                match = pattern.fullmatch(self.url_path)
                if match and method == self.command.replace("HEAD", "GET"):
                    function(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
                    return
            raise HubError(501, f"the loopback Hub does not speak {self.command} {self.url_path}")
        except HubError as error:
            for _ in self.unread:  # a client that is still sending would not read the answer
                pass
            headers = error.headers | {"X-Error-Message": error.message}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.answer_json({"error": error.message}, status=error.status, headers=headers)

    # --- the request's body

    def _read_body(self) -> Iterator[bytes]:
        """Yield the body in pieces, as Content-Length or the chunked coding delimits it."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            # A chunk is its size in hexadecimal, a line end, its bytes and a line end. One of size 0 is the last.
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                yield from self._read_exactly(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield from self._read_exactly(int(self.headers.get("Content-Length", 0)))

    def _read_exactly(self, size: int) -> Iterator[bytes]:
        while size:
            length = min(size, _PIECE)
            if self.fault and self.fault.action in ("drop", "stall"):
                if self.received >= self.fault.after:
                    self._strike(self.fault)
                length = min(length, self.fault.after - self.received)
            piece = self.rfile.read(length)
            if len(piece) < length:
                raise ConnectionCut
            self.received += len(piece)
            size -= len(piece)
            yield piece

    def read_all(self) -> bytes:
        return b"".join(self.unread)

    def read_json(self) -> dict[str, Any]:
        return json.loads(self.read_all() or b"{}")

    def _strike(self, fault: Fault) -> None:
        fault.reached.set()
        if fault.action == "stall":
            self.server.stopping.wait()  # type: ignore[attr-defined]
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionCut

    # --- the answer

    def answer(
        self, pieces: Iterator[bytes], size: int, *, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        """Send `size` bytes, given in pieces. A HEAD request gets the headers only."""
        if self.fault and self.fault.action == "lose answer":
            self._strike(self.fault)
        self._record(status)
        self.send_response(status)
        for name, value in ({"Content-Length": str(size)} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = 0
        for piece in pieces:
            if self.fault and self.fault.action == "drop" and sent + len(piece) > self.fault.after:
                self.wfile.write(piece[: self.fault.after - sent])
                self._strike(self.fault)
            self.wfile.write(piece)
            sent += len(piece)

    def answer_json(self, value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.answer(
            iter([content]),
            len(content),
            status=status,
            headers={"Content-Type": "application/json"} | (headers or {}),
        )

    def _record(self, status: int) -> None:
        """Record the exchange before its answer leaves, so that a client that has the answer finds it recorded."""
        if not self.recorded:
            self.recorded = True
            exchange = Exchange(self.command, unquote(self.url_path), status, self.received, self.headers.get("Range"))
            self.server.exchanges.append(exchange)  # type: ignore[attr-defined]

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing, as the server's `exchanges` holds it all."""
