"""A hub on loopback with commits, private and gated repositories and faults; it keeps all requests."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_tokenOfTheTestsThatMayReadAll"
OTHER_TOKEN = "hf_tokenOfTheTestsThatMayReadLess"


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by commit, the newest last."""
    refs: dict[str, str] = field(default_factory=dict)
    is_private: bool = False
    is_gated: bool = False


@dataclass
class Hub:
    models: dict[str, Repository] = field(default_factory=dict)
    datasets: set[str] = field(default_factory=set)
    faults: list[tuple[str, int]] = field(default_factory=list)
    """Part of a path, and the status to answer with once."""
    damaged: list[str] = field(default_factory=list)
    """Parts of paths of files of which one byte changes, each once."""
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def commit(self, name: str, files: dict[str, bytes] | Path | str, **options: bool) -> str:
        """Add a commit, which becomes main, of files or of a folder; return its hash."""
        if not isinstance(files, dict):
            folder = Path(files)
            files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        repository = self.models.setdefault(name, Repository(**options))
        commit = hashlib.sha1(repr((name, len(repository.commits))).encode()).hexdigest()
        repository.commits[commit] = files
        repository.refs["main"] = commit
        return commit

    def take_requests(self) -> list[str]:
        """Return METHOD and path of what was asked since the last call."""
        taken = [each for each in self.requests if "agent-harnesses" not in each]
        self.requests.clear()
        return taken


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def answer(self):
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            for fault in hub.faults:
                if fault[0] in path:
                    hub.faults.remove(fault)
                    return self.reply(fault[1], b"", {})
            token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
            if token not in ("", TOKEN, OTHER_TOKEN):
                return self.fail(401, "", "Invalid credentials in Authorization header")
            if found := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(revision|refs)/?(.*))?", path):
                return self.api(*found.groups(), token)
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self.file(*found.groups(), token)
            return self.fail(404, "", "Not Found")

        def api(self, kind, name, verb, revision, token):
            if kind == "datasets" and name in hub.datasets:
                return self.json({"id": name, "sha": "0" * 40, "siblings": []})
            repository = hub.models.get(name) if kind == "models" else None
            if repository is None or (repository.is_private and token != TOKEN):
                return self.fail(404 if token else 401, "RepoNotFound", "Repository not found")
            if verb == "refs":
                refs = [
                    {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha}
                    for ref, sha in repository.refs.items()
                ]
                return self.json({"branches": refs, "tags": [], "converts": []})
            commit = self.resolve(repository, unquote(revision or "main"))
            if commit is None:
                return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            files = [{"rfilename": file} for file in repository.commits[commit]]
            return self.json({"id": name, "modelId": name, "sha": commit, "siblings": files})

        def resolve(self, repository, revision):
            return repository.refs.get(revision) or (revision if revision in repository.commits else None)

        def file(self, name, revision, file, token):
            repository = hub.models[name]
            if repository.is_gated and token != TOKEN:
                return self.fail(403 if token else 401, "GatedRepo", "Access is restricted")
            commit = self.resolve(repository, revision)
            content = repository.commits[commit][unquote(file)]
            kind = hashlib.sha256 if file.endswith(".safetensors") else hashlib.sha1
            headers = {"ETag": f'"{kind(content).hexdigest()}"', "X-Repo-Commit": commit}
            for part in hub.damaged if self.command == "GET" else ():
                if part in file:
                    hub.damaged.remove(part)
                    content = content[:-1] + bytes([content[-1] ^ 1])
                    break
            return self.reply(200, content, headers)

        def json(self, content):
            self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def fail(self, status, code, message):
            self.reply(status, b"", {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))

        def reply(self, status, content, headers):
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

    return Handler


@contextlib.contextmanager
def serve(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Hub]:
    """Serve a hub that this process and those that it starts use, with an empty cache under `home`."""
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
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
