"""A Hugging Face hub on loopback with commits, private and gated repositories; it counts what is asked of it."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_ofTheTests"
PAGE = 1000


@dataclass
class Repository:
    """All commits of a repository: files by path, and the commit of each branch or tag."""

    kind: str = "datasets"
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit that holds these files and no others."""
        sha = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = dict(sorted(files.items()))
        self.refs[branch] = sha
        return sha


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


class LoopbackHub:
    """The server and its repositories, as `hub.repositories["org/name"]`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.fault: int | None = None
        """The status of every answer, if set."""
        self.faults: list[str] = []
        """Beginnings of paths whose next request is answered by 503."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, name: str, files: dict[str, bytes] | None = None, **options) -> Repository:
        repository = self.repositories[name] = Repository(**options)
        if files is not None:
            repository.commit(files)
        return repository

    @property
    def api_calls(self) -> int:
        return sum(request.is_api_call for request in self.requests)

    @property
    def bytes_of_files(self) -> int:
        return sum(request.bytes for request in self.requests if not request.is_api_call)


def _handler_of(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer(404, b"not of this hub")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            parts = [unquote(part) for part in url.path.split("/") if part]
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if hub.fault is not None:
                return self.answer(hub.fault, b"out of order")
            for start in [each for each in hub.faults if url.path.startswith(each)]:
                hub.faults.remove(start)
                return self.answer(503, b"out of order")
            if token and token != TOKEN:
                return self.refuse(401, "", "Invalid credentials in Authorization header")
            if parts[:1] == ["api"]:
                kind, name, verb, rest = parts[1], "/".join(parts[2:4]), *[*parts[4:5], "revision"][:1], parts[5:]
            else:
                kind, parts = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts)
                name, verb, rest = "/".join(parts[:2]), parts[2], parts[3:]
            repository = hub.repositories.get(name)
            if repository is None or repository.kind != kind or (repository.private and not token):
                return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            if repository.gated and verb == "resolve" and not token:
                return self.refuse(401, "GatedRepo", "Access to it is restricted")
            revision, path = (rest or ["main"])[0], "/".join(rest[1:])
            sha = repository.refs.get(revision, revision)
            if sha not in repository.commits:
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            files = repository.commits[sha]
            if verb == "tree":
                return self.tree(files, path, parse_qs(url.query), url.path)
            if verb == "revision":
                siblings = [{"rfilename": name} for name in files]
                fields = {"id": name, "sha": sha, "siblings": siblings, "gated": "auto" if repository.gated else False}
                return self.answer(200, json.dumps(fields | {"private": repository.private, "tags": []}).encode())
            if path not in files:
                return self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
            return self.file(files[path], sha)

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
            page = list(entries.values())[start : start + PAGE]
            headers = {}
            if start + PAGE < len(entries):
                following = f"{hub.url}{path}?recursive={is_recursive}&cursor={start + PAGE}"
                headers["Link"] = f'<{following}>; rel="next"'
            return self.answer(200, json.dumps(page).encode(), headers)

        def file(self, data: bytes, sha: str) -> None:
            headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
            asked = (self.headers.get("Range") or "").removeprefix("bytes=")
            if not asked:
                return self.answer(200, data, headers)
            first, _, last = asked.partition("-")
            start, stop = int(first), min(int(last or len(data)), len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            return self.answer(206, data[start:stop], headers)

        def refuse(self, status: int, code: str, message: str, headers=None) -> None:
            named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
            self.answer(status, json.dumps({"error": message}).encode(), named | (headers or {}))

        def answer(self, status: int, body: bytes, headers=None) -> None:
            sent = b"" if self.command == "HEAD" else body
            hub.requests.append(Request(self.command, self.path, status, len(sent)))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent)

    return Handler
