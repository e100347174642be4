"""A web server for tests: it serves a folder, and does to each request what a function says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class Request(NamedTuple):
    """A request: GET or HEAD, the name of the file, and how often this was asked before."""

    method: str
    name: str
    before: int


class Fault(NamedTuple):
    """What is wrong with an answer: its status, the bytes after which it is cut or stands still, the Content-Length
    that it claims beyond the file's, and seconds before each half of it.
    """

    status: int = 200
    cut: int | None = None
    hang: bool = False
    lie: int = 0
    delay: float = 0.0


class Web:
    """A running server: `url` of its folder, and the `requests` that came."""

    def __init__(self, url: str):
        self.url, self.requests, self.fault = url, list[Request](), lambda _: Fault()
        self.fault: Callable[[Request], Fault]

    def got(self, suffix: str) -> list[str]:
        """Names of the files that were asked for by GET."""
        return [name for method, name, _ in self.requests if method == "GET" and name.endswith(suffix)]


@contextmanager
def serving(folder: Path) -> Iterator[Web]:
    """Serve a folder on a free port of this machine."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = unquote(urlsplit(self.path).path).lstrip("/")
            count = sum(r.name == name and r.method == self.command for r in web.requests)
            web.requests.append(Request(self.command, name, count))
            fault, file = web.fault(web.requests[-1]), folder / name
            status = fault.status if file.is_file() else 404
            body = file.read_bytes() if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + fault.lie))
            self.end_headers()
            if self.command == "HEAD":
                return
            body = body[: len(body) + min(0, fault.lie)][: fault.cut]
            for part in (body[: len(body) // 2], body[len(body) // 2 :]):
                time.sleep(fault.delay)
                self.wfile.write(part)
                self.wfile.flush()
            if fault.hang:
                ended.wait(20)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        web = Web(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield web
        finally:
            ended.set()
            server.shutdown()
            thread.join()
