"""A small Hub on loopback: the part of the Hugging Face Hub's HTTP protocol by which huggingface_hub gets model files.

Served: files by revision, with their metadata; large files by a redirect to another host.
"""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

LFS_FROM = 100_000  # bytes from which a file is stored as the Hub stores large files


class Hub:
    """The server, a context manager.

    Attributes:
        commits: by repository, 'organisation/name': {commit: {path: content}}, the newest last.
        requests: (method, path) of every request so far.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256, what was redirected to
        self.requests: list[tuple[str, str]] = []
        handler = type("Handler", (_Handler,), {"hub": self, "log_message": lambda *_: None})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repository: str, files: dict[str, bytes]) -> str:
        """Commit `files` to `repository`, as if uploaded; returns the commit."""
        commits = self.commits.setdefault(repository, {})
        commit = hashlib.sha1(repr([len(commits), *files.values()]).encode()).hexdigest()
        commits[commit] = {**(list(commits.values())[-1] if commits else {}), **files}
        return commit


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.hub.requests.append((self.command, self.path))
        path = unquote(self.path.partition("?")[0]).strip("/").split("/")
        if path[0] == "large":  # the host of large files
            return self._send(200, {"ETag": f'"{path[1]}"'}, self.hub.large[path[1]])
        organisation, name, _, revision, *file = path  # <organisation>/<name>/resolve/<revision>/<file>
        commits = self.hub.commits.get(f"{organisation}/{name}")
        if commits is None:  # the Hub hides private repositories
            return self._send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Unauthorized"}, b"")
        commit = list(commits)[-1] if revision == "main" else revision
        content = commits.get(commit, {}).get("/".join(file))
        if content is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"")
        sha256 = hashlib.sha256(content).hexdigest()
        if len(content) < LFS_FROM:
            return self._send(200, {"X-Repo-Commit": commit, "ETag": f'"{sha256}"'}, content)
        self.hub.large[sha256] = content
        location = f"http://localhost:{self.server.server_port}/large/{sha256}"  # another host name
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256}"', "Location": location}
        return self._send(302, {"X-Repo-Commit": commit, **linked}, b"")

    do_HEAD = do_GET

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
