"""Google Drive on loopback: a proxy that answers for drive.google.com itself, with a certificate made for the test.

So the real download path runs unchanged: the environment (`HTTPS_PROXY`, `REQUESTS_CA_BUNDLE`) does the rest.
"""

import ssl
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import trustme

from support.loopback import Loopback, requested_part, send_head

CONFIRM = (  # all on one line, as Drive has it
    '<html><body><form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    '<input type="hidden" name="id" value="{id}"><input type="hidden" name="confirm" value="t"></form></body></html>'
)
QUOTA = """<html><body><p class="uc-error-caption">Sorry, you can't view or download this file at this time.</p>
<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p></body></html>"""


class Drive(Loopback):
    """The server.

    Attributes:
        files: content by Drive id; an id that is missing is answered with 404.
        over_quota: answer with the page for too many downloads.
        break_after: bytes after which a download loses its connection, None for never.
        offsets: where each download began.
    """

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, bytes] = {}
        self.over_quota = False
        self.break_after: int | None = None
        self.offsets: list[int] = []
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "authority.pem"))
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("drive.google.com", "drive.usercontent.google.com").configure_cert(self.tls)
        self.authority = folder / "authority.pem"
        super().__init__(_Handler)

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process take this for Google Drive."""
        authority = str(self.authority)
        return {
            "HTTPS_PROXY": self.endpoint,
            "https_proxy": self.endpoint,
            "NO_PROXY": "",
            "REQUESTS_CA_BUNDLE": authority,
        }


class _Handler(BaseHTTPRequestHandler):
    home: Drive
    protocol_version = "HTTP/1.1"

    def do_CONNECT(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.connection = self.home.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
        self.close_connection = False

    def finish(self) -> None:
        super().finish()
        self.connection.close()

    def do_GET(self) -> None:
        file_id = parse_qs(urlsplit(self.path).query)["id"][0]
        content = self.home.files.get(file_id)
        if content is None:
            self._send(404, {"Content-Type": "text/html"}, b"<html><body>Not Found</body></html>")
        elif self.home.over_quota:
            self._send(200, {"Content-Type": "text/html"}, QUOTA.encode())
        elif self.path.startswith("/uc"):  # large files need a confirmation: not checked for viruses
            self._send(200, {"Content-Type": "text/html"}, CONFIRM.format(id=file_id).encode())
        else:
            self._send_file(content)

    def _send_file(self, content: bytes) -> None:
        headers = {"Content-Type": "application/octet-stream", "Content-Disposition": 'attachment; filename="model.pt"'}
        start, status, part = requested_part(self, content)
        self.home.offsets.append(start)
        self._send(status, {**headers, **part}, content[start:])

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        send_head(self, status, headers, len(body))
        limit = self.home.break_after
        self.wfile.write(body[:limit])
        self.close_connection = limit is not None and len(body) > limit
