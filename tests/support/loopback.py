"""A server on loopback that runs in a thread."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Loopback:
    """Context manager; the handler finds this object as its `home`."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        bound = type("Handler", (handler,), {"home": self, "log_message": lambda *_: None})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        self.server.daemon_threads = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()


def send_head(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], length: int) -> None:
    """Send the status and the headers of an answer with a body of `length` bytes."""
    handler.send_response(status)
    for name, value in {**headers, "Content-Length": str(length)}.items():
        handler.send_header(name, value)
    handler.end_headers()


def requested_part(handler: BaseHTTPRequestHandler, content: bytes) -> tuple[int, int, dict[str, str]]:
    """Start, status and header of the part of a file that the request asks for."""
    start = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
    part = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
    return start, 206 if start else 200, part
