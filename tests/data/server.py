"""An HTTP server on this machine that serves a folder and misbehaves as it is told."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fd_scale.data.remote import Limits, Patience

HASTE = Patience(
    attempts=4, first_pause_s=0.01, longest_pause_s=0.05, limits=Limits(1.0, 0.5, slowest_bytes_per_s=20_000)
)
"""Gives up within a second or two."""


@dataclass
class Server:
    """What it serves, how it behaves, and what it was asked."""

    folder: Path
    url: str = ""
    ranges: bool = True
    refuse_first: int = 0
    """So many requests get ``status`` before the first is answered; -1 refuses all."""
    status: int = 503
    cut_after: int | None = None
    """Bytes after which the connection breaks, for as many answers as ``cuts``."""
    cuts: int = 0
    bytes_per_s: float = 0
    stall: bool = False
    page: bytes | None = None
    """Served instead of any file."""
    retry_after: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(path, range) of every request."""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """The server, until the block ends."""
    server = Server(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def do_GET(self) -> None:
            with contextlib.suppress(OSError):
                answer(self, server)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.handle_error = lambda *_: None  # clients of these tests leave in the middle
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def answer(request: BaseHTTPRequestHandler, server: Server) -> None:
    """One answer."""
    wanted = request.headers.get("Range", "")
    server.requests.append((request.path, wanted))
    if server.refuse_first:
        server.refuse_first -= 1
        refuse(request, server.status, server.retry_after)
        return
    path = server.folder / request.path.partition("?")[0].lstrip("/")
    if not path.is_file() and server.page is None:
        refuse(request, 404)
        return
    content = path.read_bytes() if server.page is None else server.page
    first, last, status = 0, len(content) - 1, 200
    if server.ranges and wanted and content:
        first, last = (int(place) for place in wanted.removeprefix("bytes=").split("-"))
        last, status = min(last, len(content) - 1), 206
    request.send_response(status)
    request.send_header("Content-Length", str(last - first + 1))
    if status == 206:
        request.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
    request.end_headers()
    send(request, content[first : last + 1], server)


def refuse(request: BaseHTTPRequestHandler, status: int, retry_after: str = "") -> None:
    request.send_response(status)
    request.send_header("Content-Length", "0")
    if retry_after:
        request.send_header("Retry-After", retry_after)
    request.end_headers()


def send(request: BaseHTTPRequestHandler, content: bytes, server: Server) -> None:
    if server.stall:
        request.wfile.write(content[:10])
        time.sleep(3)
        return
    if server.cut_after is not None and server.cuts and len(content) > server.cut_after:
        server.cuts -= 1
        request.wfile.write(content[: server.cut_after])
        request.wfile.flush()
        request.connection.shutdown(socket.SHUT_RDWR)
        return
    if not server.bytes_per_s:
        request.wfile.write(content)
        return
    step = max(1, int(server.bytes_per_s / 50))
    for begin in range(0, len(content), step):
        request.wfile.write(content[begin : begin + step])
        time.sleep(0.02)
