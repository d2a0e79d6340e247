"""A Hub on loopback for the real client, and Python processes that take it for the Hub.

The server keeps repositories in memory: commits, branches, private ones, large files sent apart from the commit. Errors
carry the status and the `X-Error-Code` that the Hub's do, so that the client raises what it would raise.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LARGE = (".safetensors", ".png")  # what the Hub's default .gitattributes sends apart from the commit
REPOSITORY = r"/api/models/(?P<repo_id>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, str]] = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", REPOSITORY + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", REPOSITORY + r"/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", REPOSITORY + r"/branch/(?P<name>[^/]+)", "create_branch"),
    ("GET", REPOSITORY + r"(?:/revision/(?P<revision>[^/]+))?", "model_info"),
    ("GET", REPOSITORY + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    ("POST", REPOSITORY + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "large_files"),
    ("PUT", r"/large/(?P<oid>\w+)", "store_large_file"),
    ("GET", r"/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class HubError(Exception):
    """An answer that is no success: HTTP status, the Hub's name for it, words, and what the body says beyond them."""

    def __init__(self, status: int, code: str = "", message: str = "", body: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.body = {"error": message, **(body or {})}


@dataclass
class Repository:
    """Commits by their id, each a whole tree, and what branches point at."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        tree = [(name, _oid(name, content)) for name, content in sorted(files.items())]
        oid = hashlib.sha1(repr((len(self.messages), branch, message, tree)).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Fault:
    """The next request whose line matches is answered with `status`, or, where that is None, cut off: before anything
    is done or, if `is_late`, when all is done."""

    pattern: str
    status: int | None
    is_late: bool


class HubServer(ThreadingHTTPServer):
    """The loopback Hub: `users` maps tokens to account names; an account owns the repositories under its name."""

    daemon_threads = True

    def __init__(self, users: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.users = users
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail_next(self, pattern: str, status: int | None, is_late: bool = False) -> None:
        """Answer the next request matching `METHOD /path` with an error, or cut the connection (None)."""
        self.faults.append(Fault(pattern, status, is_late))

    def store(self, repo_id: str, files: dict[str, Path | str], private: bool = False) -> None:
        """Put a repository there without a client."""
        repository = self.repositories[repo_id] = Repository(private)
        contents = {name: file.encode() if isinstance(file, str) else file.read_bytes() for name, file in files.items()}
        repository.commit("main", contents, "stored")

    def count(self, pattern: str) -> int:
        """How many requests matched `METHOD /path`."""
        return sum(re.match(pattern, line) is not None for line in self.requests)

    # --- who may do what ---

    def repository(self, repo_id: str, user: str | None) -> Repository:
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and user != repo_id.split("/")[0]):
            # As the Hub does: to strangers a private repository looks like none.
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        return repository

    def tree_of(self, repo_id: str, revision: str, user: str | None) -> tuple[str, dict[str, bytes]]:
        repository = self.repository(repo_id, user)
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repository.commits[oid]

    def writable(self, repo_id: str, user: str | None) -> Repository:
        repository = self.repository(repo_id, user)
        self.check_owner(repo_id, user)
        return repository

    def check_owner(self, repo_id: str, user: str | None) -> None:
        if user is None:
            raise HubError(401, "", "Invalid username or password.")
        if user != repo_id.split("/")[0]:
            raise HubError(403, "", f"You don't have the rights to write under {repo_id.split('/')[0]}")

    # --- answers ---

    def whoami(self, request: "_Handler") -> Any:
        if request.user is None:
            raise HubError(401, "", "Invalid username or password.")
        token = {"displayName": "test", "role": "write"}
        return {
            "type": "user",
            "name": request.user,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        }

    def validate_yaml(self, request: "_Handler") -> Any:
        return {"errors": [], "warnings": []}

    def create_repo(self, request: "_Handler") -> Any:
        wanted = json.loads(request.body)
        repo_id = f"{wanted.get('organization') or request.user}/{wanted['name']}"
        self.check_owner(repo_id, request.user)
        answer = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repositories:
            raise HubError(409, "", "You already created this model repo", answer)
        is_private = wanted.get("visibility") == "private" or bool(wanted.get("private"))  # newer and older clients
        repository = self.repositories[repo_id] = Repository(is_private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return answer

    def create_branch(self, request: "_Handler", repo_id: str, name: str) -> Any:
        repository = self.writable(repo_id, request.user)
        if name in repository.branches:
            raise HubError(409, "", "Reference already exists")
        start = json.loads(request.body or b"{}").get("startingPoint", "main")
        repository.branches[name] = repository.branches.get(start, start)
        return {}

    def preupload(self, request: "_Handler", repo_id: str, revision: str) -> Any:
        files = self.writable(repo_id, request.user) and self.tree_of(repo_id, revision, request.user)[1]
        answers = []
        for file in json.loads(request.body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            there = files.get(file["path"])
            oid = None if there is None else _oid(file["path"], there)
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def large_files(self, request: "_Handler", repo_id: str) -> Any:
        self.writable(repo_id, request.user)
        answers = []
        for wanted in json.loads(request.body)["objects"]:
            upload = {"upload": {"href": f"{self.endpoint}/large/{wanted['oid']}"}}
            answers.append(wanted if wanted["oid"] in self.large else {**wanted, "actions": upload})
        return {"transfer": "basic", "objects": answers}

    def store_large_file(self, request: "_Handler", oid: str) -> Any:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "", "the content is not what was announced")
        self.large[oid] = request.body
        return {}

    def commit(self, request: "_Handler", repo_id: str, revision: str) -> Any:
        repository = self.writable(repo_id, request.user)
        files = dict(self.tree_of(repo_id, revision, request.user)[1])
        message = ""
        for line in request.body.splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "header":
                message = value["summary"]
            elif step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif step["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(400, "", f"unknown step {step['key']}")
        oid = repository.commit(revision, files, message)
        return {"commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid, "success": True}

    def model_info(self, request: "_Handler", repo_id: str, revision: str | None) -> Any:
        oid, files = self.tree_of(repo_id, revision or "main", request.user)
        return {
            "_id": repo_id,
            "id": repo_id,
            "modelId": repo_id,
            "sha": oid,
            "private": self.repositories[repo_id].private,
            "tags": [],
            "siblings": [{"rfilename": name} for name in files],
        }

    def tree(self, request: "_Handler", repo_id: str, revision: str, folder: str | None) -> Any:
        files = self.tree_of(repo_id, revision, request.user)[1]
        prefix = f"{folder}/" if folder else ""
        below = {name: content for name, content in files.items() if name.startswith(prefix)}
        if folder and not below:
            raise HubError(404, "EntryNotFound", "Entry not found")
        is_recursive = parse_qs(urlsplit(request.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = {prefix + name[len(prefix) :].split("/")[0] for name in below if "/" in name[len(prefix) :]}
        return [
            *({"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)),
            *(
                _entry(name, content)
                for name, content in below.items()
                if is_recursive or "/" not in name[len(prefix) :]
            ),
        ]

    def paths_info(self, request: "_Handler", repo_id: str, revision: str) -> Any:
        files = self.tree_of(repo_id, revision, request.user)[1]
        is_json = request.body.startswith(b"{")
        paths = json.loads(request.body)["paths"] if is_json else parse_qs(request.body.decode()).get("paths", [])
        return [_entry(path, files[path]) for path in paths if path in files]

    def resolve(self, request: "_Handler", repo_id: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        oid, files = self.tree_of(repo_id, revision, request.user)
        if path not in files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        return files[path], {"X-Repo-Commit": oid, "ETag": f'"{_oid(path, files[path])}"'}


def _oid(path: str, content: bytes) -> str:
    """How the Hub names a content: large files by SHA-256, others as Git does."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    body: bytes
    user: str | None

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        self.body = self._read()
        try:
            self._strike(f"{self.command} {path}", is_late=False)
            self.user = self._authenticate()
            content, headers = self._dispatch("GET" if self.command == "HEAD" else self.command, path)
            self._strike(f"{self.command} {path}", is_late=True)
            self._send(200, content, headers)
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self._send(error.status, json.dumps(error.body).encode(), headers)
        except ConnectionAbortedError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _strike(self, line: str, is_late: bool) -> None:
        for fault in self.server.faults:
            if fault.is_late == is_late and re.match(fault.pattern, line):
                self.server.faults.remove(fault)
                if fault.status is None:
                    raise ConnectionAbortedError
                raise HubError(fault.status, "", "made to fail")

    def _authenticate(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.server.users:
            raise HubError(401, "", "Invalid credentials in Authorization header")
        return self.server.users[token]

    def _dispatch(self, method: str, path: str) -> tuple[bytes, dict[str, str]]:
        for wanted, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and wanted == method:
                answer = getattr(self.server, name)(self, **match.groupdict())
                return answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
        raise HubError(404, "", f"this Hub has no {method} {path}")

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        is_file = "ETag" in headers
        self.send_header("Content-Type", "application/octet-stream" if is_file else "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serve(users: dict[str, str]) -> Iterator[HubServer]:
    """A Hub for the duration of the block."""
    server = HubServer(users)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- processes that take it for the Hub ---


LOOP = """
import json, os, sys, traceback
orders, channel = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what libraries print does not mix with the answers
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # no one answers what libraries ask
namespace = {{"__name__": "client"}}
{preamble}
for line in orders:
    order = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({{"HF_TOKEN": order["token"]}} if order["token"] else {{}})
    namespace["answer"] = None
    try:
        exec(order["code"], namespace)
        reply = {{"answer": namespace["answer"]}}
    except BaseException as error:
        reply = {{
            "error": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }}
    channel.write(json.dumps(reply) + "\\n")
os._exit(0)  # taking the libraries down would cost seconds
"""
BLOCK = """
class _NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "m2f_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, _NoPackage())
sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]
"""


class ClientError(Exception):
    """What the code raised in the other process: `kind` is the class's name."""

    def __init__(self, kind: str, message: str, traceback: str) -> None:
        super().__init__(f"{kind}: {message}\n{traceback}")
        self.kind, self.message = kind, message


class Client:
    """A Python process whose Hub is `server`: one import of the libraries serves many snippets.

    Args:
        folder: an empty one, for the process's caches; it is also its working directory.
        has_package: whether `m2f_hf` can be imported there.
    """

    def __init__(self, server: HubServer, folder: Path, has_package: bool) -> None:
        root = Path(__file__).resolve().parents[1]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment = {
            **kept,
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            **({"PYTHONPATH": str(root)} if has_package else {}),
        }
        self.folder = folder
        with open(folder / "stderr.txt", "w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", LOOP.format(preamble="" if has_package else BLOCK)],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __call__(self, code: str, token: str | None = None) -> Any:
        """Run the code, logged in with `token`, and return what it assigns to `answer`.

        Raises:
            ClientError: what the code raised.
        """
        self._process.stdin.write(json.dumps({"code": code, "token": token}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client process has ended:\n{self.output()[-3000:]}")
        reply = json.loads(line)
        if "error" in reply:
            raise ClientError(reply["error"], reply["message"], reply["traceback"])
        return reply["answer"]

    def output(self) -> str:
        """Everything the process has printed so far."""
        return (self.folder / "stderr.txt").read_text()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def snippets(card: str) -> list[str]:
    """The Python blocks of a card: for the package, for the pipeline with it, for those without it."""
    return re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)
