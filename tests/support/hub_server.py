"""A small Hub on loopback: the part of the Hugging Face Hub's HTTP protocol that huggingface_hub uses for model files.

Served: model info, and files by revision (metadata, a redirect to another host for large files, ranges). Nobody may
read private repositories.
"""

import hashlib
import importlib
import json
import warnings
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

from support.loopback import Loopback, requested_part, send_head

LFS_FROM = 100_000  # bytes from which a file is stored as the Hub stores large files


class Repository:
    """History of one repository: commits are {path: content}, named by their hash."""

    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.commit({})

    def commit(self, files: dict[str, bytes]) -> str:
        content = {**self.head_files(), **files}
        digest = hashlib.sha1(repr([len(self.commits), sorted(content)]).encode())
        for data in content.values():
            digest.update(hashlib.sha256(data).digest())
        self.commits[digest.hexdigest()] = content
        return digest.hexdigest()

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def head_files(self) -> dict[str, bytes]:
        return self.commits[self.head] if self.commits else {}


class Hub(Loopback):
    """The server.

    Attributes:
        repositories: by id, 'organisation/name'.
        requests: (method, path) of every request so far.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        super().__init__(_Handler)

    def add(self, repository: str, files: dict[str, bytes], private: bool = False) -> str:
        """Commit `files` to `repository`, as if uploaded; returns the commit."""
        if repository not in self.repositories:
            self.repositories[repository] = Repository(private)
        return self.repositories[repository].commit(files)

    def count(self, method: str, part: str) -> int:
        """Number of requests so far with this method whose path contains `part`."""
        return sum(m == method and part in path for m, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    home: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.home.requests.append((self.command, self.path))
        path = unquote(self.path.partition("?")[0]).strip("/").split("/")
        if path[0] == "large":  # the host of large files, which needs no token
            commits = [files for repository in self.home.repositories.values() for files in repository.commits.values()]
            contents = {hashlib.sha256(content).hexdigest(): content for files in commits for content in files.values()}
            content = contents[path[1]]
            return self._send_file(content, {"ETag": f'"{path[1]}"'})
        is_info = path[:2] == ["api", "models"]
        name = "/".join(path[2:4] if is_info else path[:2])
        repository = self._readable(name)
        if repository is None:
            return None
        if is_info:
            revision = path[5] if path[4:5] == ["revision"] else "main"
            commit = repository.head if revision == "main" else revision
            siblings = [{"rfilename": file} for file in repository.commits[commit]]
            return self._send_json({"id": name, "sha": commit, "private": repository.private, "siblings": siblings})
        _, revision, file = path[2], path[3], "/".join(path[4:])  # <organisation>/<name>/resolve/<revision>/<file>
        commit = repository.head if revision == "main" else revision
        if commit not in repository.commits:
            return self._send_error(404, "RevisionNotFound")
        content = repository.commits[commit].get(file)
        if content is None:
            return self._send_error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        if len(content) < LFS_FROM:
            return self._send_file(content, {"X-Repo-Commit": commit, "ETag": f'"{_git_sha1(content)}"'})
        sha256 = hashlib.sha256(content).hexdigest()
        location = f"http://localhost:{self.server.server_port}/large/{sha256}"  # another host name
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256}"', "Location": location}
        return self._send(302, {"X-Repo-Commit": commit, **linked}, b"")

    do_HEAD = do_GET

    def _readable(self, name: str) -> Repository | None:
        """The repository, or None after an error; the Hub hides private repositories."""
        repository = self.home.repositories.get(name)
        if repository is None or repository.private:
            self._send_error(401, "RepoNotFound")
            return None
        return repository

    def _send_json(self, value: dict, status: int = 200) -> None:
        self._send(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send_error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": code or "Unauthorized", **(headers or {})}, b"")

    def _send_file(self, content: bytes, headers: dict[str, str]) -> None:
        start, status, part = requested_part(self, content)
        self._send(status, {"Accept-Ranges": "bytes", **headers, **part}, content[start:])

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        send_head(self, status, headers, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def list_and_create_published(published: dict[str, tuple[str, str]], *models: tuple[str, dict]) -> tuple[list, list]:
    """For FreshProcess: what timm lists and `create_pretrained`, as if these commits and hashes were in the package."""
    import timm

    from equivision_timm.models import equivariant_resnet, pretrained
    from support.fresh_process import create_pretrained

    pretrained.PUBLISHED.update({name: pretrained.Published(*entry) for name, entry in published.items()})
    with warnings.catch_warnings():  # of timm, that the names are registered already
        warnings.simplefilter("ignore")
        importlib.reload(equivariant_resnet)  # its cfgs are made of them
    return timm.list_pretrained("[cd]?resnet*"), create_pretrained(*models)
