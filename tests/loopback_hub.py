"""A Hugging Face hub on loopback with commits, private and gated repositories and faults; it keeps all requests."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_tokenOfTheTestsThatMayReadAll"
OTHER_TOKEN = "hf_tokenOfTheTestsThatMayReadLess"
PAGE = 1000
"""Files that one answer lists at most."""


@dataclass
class Repository:
    """All commits of a repository: files by path, and the commit of each branch or tag."""

    kind: str = "models"
    is_private: bool = False
    is_gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A request that was answered: `bytes` are those of the body."""

    method: str
    path: str
    status: int
    bytes: int

    @property
    def is_api_call(self) -> bool:
        return self.path.startswith("/api/")


@dataclass
class Hub:
    """The repositories by name, what goes wrong, and what was asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    url: str = ""
    fault: int | None = None
    """The status of every answer, if set."""
    faults: list[tuple[str, int]] = field(default_factory=list)
    """Beginning or other part of a path, and the status to answer with once."""
    damaged: list[str] = field(default_factory=list)
    """Parts of paths of files of which one byte changes, each once."""
    requests: list[Request] = field(default_factory=list)

    def commit(
        self,
        name: str,
        files: dict[str, bytes] | Path | str,
        kind: str = "models",
        branch: str = "main",
        **access: bool,
    ) -> str:
        """Add a commit that holds these files, or those of a folder, and no others; return its hash."""
        if not isinstance(files, dict):
            folder = Path(files)
            files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        repository = self.repositories.setdefault(name, Repository(kind, **access))
        commit = hashlib.sha1(repr((name, len(repository.commits))).encode()).hexdigest()
        repository.commits[commit] = dict(sorted(files.items()))
        repository.refs[branch] = commit
        return commit

    def commit_data(self, name: str, files: dict[str, bytes], branch: str = "main", **access: bool) -> str:
        """Do the same for a dataset."""
        return self.commit(name, files, "datasets", branch, **access)

    def take_requests(self) -> list[str]:
        """Return METHOD and path of what was asked since the last call."""
        taken = [f"{each.method} {urlsplit(each.path).path}" for each in self.requests]
        self.requests.clear()
        return [each for each in taken if "agent-harnesses" not in each]

    @property
    def api_calls(self) -> int:
        return sum(request.is_api_call for request in self.requests)

    @property
    def bytes_of_files(self) -> int:
        return sum(request.bytes for request in self.requests if not request.is_api_call)


def _handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments) -> None:
            pass

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.refuse(404, "", "Not Found")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if hub.fault is not None:
                return self.answer(hub.fault)
            for fault in hub.faults:
                if fault[0] in url.path:
                    hub.faults.remove(fault)
                    return self.answer(fault[1])
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token not in ("", TOKEN, OTHER_TOKEN):
                return self.refuse(401, "", "Invalid credentials in Authorization header")
            parts = [unquote(part) for part in url.path.split("/") if part]
            is_api = parts[:1] == ["api"]
            if is_api:
                parts = parts[1:]
            kind, parts = (
                (parts[0], parts[1:]) if parts[:1] in (["models"], ["datasets"], ["spaces"]) else ("models", parts)
            )
            if len(parts) < 2 + (not is_api):
                return self.refuse(404, "", "Not Found")
            name, verb, rest = "/".join(parts[:2]), (parts[2:3] or ["revision"])[0], parts[3:]
            repository = hub.repositories.get(name)
            is_hidden = repository is not None and repository.is_private and token != TOKEN
            if repository is None or repository.kind != kind or is_hidden:
                return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            if repository.is_gated and verb == "resolve" and token != TOKEN:
                return self.refuse(403 if token else 401, "GatedRepo", "Access is restricted")
            if verb == "refs":
                return self.refs(repository)
            revision, path = (rest or ["main"])[0], "/".join(rest[1:])
            commit = repository.refs.get(revision, revision)
            if commit not in repository.commits:
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            files = repository.commits[commit]
            if verb == "tree":
                return self.tree(files, path, parse_qs(url.query), url.path)
            if verb == "revision":
                return self.revision(repository, name, commit)
            if path not in files:
                return self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return self.file(path, files[path], commit)

        def refs(self, repository) -> None:
            branches = [
                {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": commit}
                for ref, commit in repository.refs.items()
            ]
            self.json({"branches": branches, "tags": [], "converts": []})

        def revision(self, repository, name, commit) -> None:
            access = {"private": repository.is_private, "gated": "auto" if repository.is_gated else False}
            siblings = [{"rfilename": file} for file in repository.commits[commit]]
            self.json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": [], **access})

        def tree(self, files, folder, query, path) -> None:
            prefix = f"{folder}/" if folder else ""
            below = [name for name in files if name.startswith(prefix)]
            if not below:
                return self.refuse(404, "EntryNotFound", f"{folder} does not exist")
            is_recursive = query.get("recursive", ["false"])[0].lower() == "true"
            entries = {}
            for name in below:
                inner = name.removeprefix(prefix).split("/")
                for depth in range(1, len(inner)):
                    parent = prefix + "/".join(inner[:depth])
                    if is_recursive or depth == 1:
                        entries[parent] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": parent}
                if is_recursive or len(inner) == 1:
                    data = files[name]
                    size, pointer = len(data), hashlib.sha1(b"pointer" + data).hexdigest()
                    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 130}
                    entries[name] = {"type": "file", "oid": pointer, "size": size, "path": name, "lfs": lfs}
            start = int(query.get("cursor", ["0"])[0])
            headers = {}
            if start + PAGE < len(entries):
                following = f"{hub.url}{path}?recursive={is_recursive}&cursor={start + PAGE}"
                headers["Link"] = f'<{following}>; rel="next"'
            return self.json(list(entries.values())[start : start + PAGE], headers)

        def file(self, path, data: bytes, commit: str) -> None:
            # The hub gives the SHA-256 of large files, and the hash of git of small ones.
            kind = hashlib.sha1 if path.endswith((".json", ".txt", ".md")) else hashlib.sha256
            headers = {"X-Repo-Commit": commit, "ETag": f'"{kind(data).hexdigest()}"', "Accept-Ranges": "bytes"}
            for part in hub.damaged if self.command == "GET" else ():
                if part in path:
                    hub.damaged.remove(part)
                    data = data[:-1] + bytes([data[-1] ^ 1])
                    break
            asked = (self.headers.get("Range") or "").removeprefix("bytes=")
            if not asked:
                return self.answer(200, data, headers)
            first, _, last = asked.partition("-")
            start, stop = int(first), min(int(last or len(data)), len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            return self.answer(206, data[start:stop], headers)

        def json(self, content, headers=None) -> None:
            self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {}))

        def refuse(self, status: int, code: str, message: str, headers=None) -> None:
            named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
            self.answer(status, json.dumps({"error": message}).encode(), named | (headers or {}))

        def answer(self, status: int, body: bytes = b"", headers=None) -> None:
            sent = b"" if self.command == "HEAD" else body
            hub.requests.append(Request(self.command, self.path, status, len(sent)))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(sent)

    return Handler


@contextlib.contextmanager
def serve(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Hub]:
    """Serve a hub that this process and those that it starts use, with an empty cache under `home`."""
    import datasets
    from huggingface_hub import HfFileSystem, constants, file_download

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(hub))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        HfFileSystem._cache.clear()
