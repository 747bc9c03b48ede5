"""A proxy on loopback that takes a store away: for tests and tests/bench/outage.py."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}


@dataclass
class Outage:
    """A store behind a proxy; `upstream` is its host and port."""

    upstream: str
    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each, those that were refused included."""
    refuse: Callable[[str, str], int | None] = lambda method, path: None
    """Returns the status with which a request is refused, 0 to reset the connection, None to let it pass."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def away(self, begins: Callable[[str, str], bool], seconds: float) -> None:
        """Reset every connection for some seconds, from the first request on for which `begins` is true."""
        started: list[float] = []

        def refuse(method: str, path: str) -> int | None:
            with self.lock:
                if not started and begins(method, path):
                    started.append(time.monotonic())
            return 0 if started and time.monotonic() < started[0] + seconds else None

        self.refuse = refuse


@contextlib.contextmanager
def proxy(upstream: str) -> Iterator[Outage]:
    """Run a proxy in front of `http://HOST:PORT`."""
    outage = Outage(upstream.removeprefix("http://"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(outage))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    outage.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield outage
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(outage: Outage) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(OSError, HTTPException):
                super().handle()

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with outage.lock:
                outage.requests.append((self.command, self.path))
            status = outage.refuse(self.command, self.path)
            if status == 0:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                return
            if status is not None:
                self.reply(status, {}, b"<Error><Code>AccessDenied</Code><Message>Not yours.</Message></Error>")
                return
            connection = HTTPConnection(outage.upstream, timeout=60)
            with contextlib.closing(connection):
                headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body or None)
                response = connection.getresponse()
                data = response.read()
                self.reply(response.status, dict(response.getheaders()), data, response.headers.get("Content-Length"))

        def reply(self, status: int, headers: dict[str, str], data: bytes, length: str | None = None) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in HOP_BY_HOP | {"content-length"}:
                    self.send_header(name, value)
            is_head = self.command == "HEAD"
            if status not in (204, 304):
                self.send_header("Content-Length", length if is_head and length else str(len(data)))
            self.end_headers()
            if not is_head:
                self.wfile.write(data)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    return Handler
