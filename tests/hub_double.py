"""A double of the Hub on 127.0.0.1: enough of its HTTP interface for push, pull, data sets and PEFT.

Clients reach it with `endpoint=double.url`, or in a process of their own with `double.environment(token)`:
`HF_ENDPOINT` is read when huggingface_hub is imported. Repositories live in a temporary folder. Every request is
recorded, and faults come on demand: a status, a connection cut in the middle, an answer lost, silence.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

DATE = "2024-01-01T00:00:00.000Z"
SIGNATURE = "SignedAddressCanary"
_LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".parquet")
_LONGEST_SILENCE_SECONDS = 20.0


@dataclass(frozen=True)
class User:
    """An account behind a token."""

    name: str
    role: str = "write"  # of the token: read, write or fineGrained
    orgs: dict[str, str] = field(default_factory=dict)  # organization to the account's role in it
    grants: tuple[str, ...] = ()  # namespaces that a fine-grained token may write in

    def may_write(self, namespace: str) -> bool:
        if self.role == "read" or (self.role == "fineGrained" and namespace not in self.grants):
            return False
        return namespace == self.name or self.orgs.get(namespace) in ("admin", "write", "contributor")

    def may_read(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


@dataclass(frozen=True)
class File:
    """One version of a file; its bytes are stored by sha256."""

    sha256: str
    git_oid: str
    size: int
    is_lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """A commit and the whole tree behind it."""

    oid: str
    title: str
    tree: dict[str, File]


@dataclass
class Repository:
    """A model or data set."""

    kind: str  # models or datasets
    name: str
    private: bool
    gated: str | bool = False  # False, or how requests for access are granted: auto or manual
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)  # branches and tags to commits

    def find(self, revision: str) -> Commit | None:
        oid = self.refs.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    def add(self, title: str, tree: dict[str, File], branch: str = "main") -> Commit:
        oid = hashlib.sha1(f"{self.name} {len(self.commits)} {title} {tree}".encode()).hexdigest()
        self.commits.append(Commit(oid, title, tree))
        self.refs[branch] = oid
        return self.commits[-1]


@dataclass(frozen=True)
class Request:
    """What a client sent; the Authorization header is kept apart from all that must hold no token."""

    method: str
    path: str
    headers: dict[str, str]
    authorization: str | None
    body: bytes
    fault: str | None


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match."""

    pattern: re.Pattern[str]
    kind: Literal["status", "cut", "lost", "slow"]
    times: int
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)


class Answer(Exception):
    """An answer of the double; raised from anywhere in a route."""

    def __init__(self, status: int, content: Any = None, headers: dict[str, str] | None = None, code: str = "") -> None:
        super().__init__(status)
        self.status, self.headers = status, dict(headers or {})
        self.body = content if isinstance(content, bytes) else json.dumps(content).encode()
        if code:
            self.headers["X-Error-Code"] = code


class HubDouble:
    """The double; a context manager that serves while it is open."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self._stack = ExitStack()

    def __enter__(self) -> HubDouble:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hub-double-")))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"double": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._stack.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, token: str | None, home: Path) -> dict[str, str]:
        """The variables of a process that takes this for the Hub; nothing of the user's login is seen."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        own = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        return {**kept, **own, "HF_HUB_DISABLE_TELEMETRY": "1", **({"HF_TOKEN": token} if token else {})}

    def add_repository(
        self, name: str, files: dict[str, bytes] | Path, *, kind: str = "models", private: bool = False
    ) -> Commit:
        """A repository that is there already, from bytes by path or a folder."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        repository = Repository(kind, name, private)
        self.repositories[kind, name] = repository
        first = repository.add(
            "initial commit", {".gitattributes": self.store(b"*.bin filter=lfs\n", ".gitattributes")}
        )
        if not files:
            return first
        return repository.add("files", first.tree | {path: self.store(data, path) for path, data in files.items()})

    def content(self, name: str, path: str, *, kind: str = "models", revision: str = "main") -> bytes:
        """A file's bytes."""
        commit = self.repositories[kind, name].find(revision)
        assert commit is not None
        return (self.folder / commit.tree[path].sha256).read_bytes()

    def files(self, name: str) -> dict[str, bytes]:
        """A model's files by path, without the one that the Hub adds itself."""
        commit = self.repositories["models", name].find("main")
        assert commit is not None
        return {path: self.content(name, path) for path in commit.tree if path != ".gitattributes"}

    def fail(self, pattern: str, status: int, *, times: int = 1, **headers: str) -> None:
        """Answer requests whose `METHOD /path` matches `pattern` with `status`."""
        self.faults.append(Fault(re.compile(pattern), "status", times, status, headers))

    def cut(self, pattern: str, *, times: int = 1) -> None:
        """Close the connection in the middle of the request's body."""
        self.faults.append(Fault(re.compile(pattern), "cut", times))

    def lose(self, pattern: str, *, times: int = 1) -> None:
        """Do what is asked, and close the connection instead of answering."""
        self.faults.append(Fault(re.compile(pattern), "lost", times))

    def stall(self, pattern: str, *, times: int = 1) -> None:
        """Say nothing until the double is closed (or a test would hang)."""
        self.faults.append(Fault(re.compile(pattern), "slow", times))

    def sent(self, pattern: str) -> list[Request]:
        """The recorded requests whose `METHOD /path` matches."""
        return [one for one in self.requests if re.search(pattern, f"{one.method} {one.path}")]

    def store(self, data: bytes, path: str) -> File:
        """Keep bytes; large kinds of files are LFS files, as on the Hub."""
        sha256 = hashlib.sha256(data).hexdigest()
        (self.folder / sha256).write_bytes(data)
        git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        return File(sha256, git, len(data), path.endswith(_LFS_SUFFIXES))

    def take_fault(self, line: str) -> Fault | None:
        """The fault that is due for a request, counted down."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.pattern.search(line):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body in one packet: else each answer waits 40 ms for an acknowledgement.
    disable_nagle_algorithm = True
    wbufsize = -1
    double: HubDouble

    def log_message(self, *_: object) -> None:
        pass

    def do_any(self) -> None:
        address = urlsplit(self.path)
        self.route = unquote(address.path)
        self.query = {key: values[-1] for key, values in parse_qs(address.query).items()}
        fault = self.double.take_fault(f"{self.command} {self.route}")
        self.body = self._read_body(cut=fault is not None and fault.kind == "cut")
        headers = {key.lower(): value for key, value in self.headers.items()}
        authorization = headers.pop("authorization", None)
        kind = fault.kind if fault else None
        with self.double.lock:
            self.double.requests.append(Request(self.command, self.path, headers, authorization, self.body, kind))
        self.user = self.double.users.get((authorization or "").removeprefix("Bearer "))
        self.has_token = authorization is not None
        if kind == "slow":
            self.double.closing.wait(_LONGEST_SILENCE_SECONDS)
        if kind in ("cut", "slow"):
            self._hang_up()
            return
        if fault is not None and kind == "status":
            self._send(Answer(fault.status, {"error": "a fault on demand"}, fault.headers))
            return
        try:
            with self.double.lock:
                self._dispatch()
            answer = Answer(404, {"error": f"the double does not know {self.command} {self.route}"})
        except Answer as given:
            answer = given
        if kind == "lost":
            self._hang_up()
        else:
            self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_any

    def _read_body(self, *, cut: bool) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if cut:
                    return parts[0]
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length // 2 if cut else length)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(answer.body)), **answer.headers}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _dispatch(self) -> None:
        line = f"{self.command} {self.route}"
        for pattern, function in _ROUTES:
            if match := re.fullmatch(pattern, line):
                function(self, **match.groupdict())
                return

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def repository(self, kind: str | None, name: str, *, write: bool = False) -> Repository:
        """The repository that a request names, if its sender may see it and, for `write`, change it."""
        found = self.double.repositories.get(((kind or "models").strip("/"), name))
        namespace = name.split("/")[0]
        if self.has_token and self.user is None:
            raise Answer(401, {"error": "Invalid credentials in Authorization header"})
        if found is None or (found.private and not (self.user and self.user.may_read(namespace))):
            raise Answer(404 if self.user else 401, {"error": "Repository not found"}, code="RepoNotFound")
        if write and self.user is None:
            raise Answer(401, {"error": "Invalid username or password."})
        if write and not self.user.may_write(namespace):
            raise Answer(403, {"error": "Forbidden: you have no write permission"})
        return found

    def commit(self, repository: Repository, revision: str) -> Commit:
        found = repository.find(revision)
        if found is None:
            raise Answer(404, {"error": "Revision not found"}, code="RevisionNotFound")
        return found

    def whoami(self) -> None:
        user = self.user
        if user is None:
            raise Answer(401, {"error": "Invalid username or password."})
        scopes = [{"entity": {"type": "org", "name": name}, "permissions": ["repo.write"]} for name in user.grants]
        token = {"displayName": "test", "role": user.role, "fineGrained": {"scoped": scopes}}
        orgs = [{"name": name, "roleInOrg": role} for name, role in user.orgs.items()]
        raise Answer(200, {"type": "user", "name": user.name, "orgs": orgs, "auth": {"accessToken": token}})

    def create(self) -> None:
        given = self.json()
        name = f"{given.get('organization') or (self.user.name if self.user else '')}/{given['name']}"
        kind = f"{given.get('type') or 'model'}s"
        if self.user is None:
            raise Answer(401, {"error": "Invalid username or password."})
        if not self.user.may_write(name.split("/")[0]):
            raise Answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        url = f"{self.double.url}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.double.repositories:
            raise Answer(409, {"error": "You already created this model repo", "url": url})
        private = given.get("private", given.get("visibility") == "private")
        self.double.add_repository(name, {}, kind=kind, private=private)
        raise Answer(200, {"url": url, "name": name, "id": "1"})

    def delete(self) -> None:
        given = self.json()
        name = f"{given['organization']}/{given['name']}"
        repository = self.repository(f"{given.get('type') or 'model'}s", name, write=True)
        del self.double.repositories[repository.kind, name]
        raise Answer(200, {})

    def settings(self, kind: str, name: str) -> None:
        repository, given = self.repository(kind, name, write=True), self.json()
        repository.private = given.get("private", given.get("visibility", "private") == "private")
        raise Answer(200, {"private": repository.private})

    def auth_check(self, kind: str, name: str, write: str | None) -> None:
        self.repository(kind, name, write=bool(write))
        raise Answer(200, {})

    def validate_yaml(self) -> None:
        try:
            metadata = _front_matter(self.json()["content"].encode())
            if metadata is None:
                raise Answer(
                    200, {"warnings": [{"message": "empty or missing yaml metadata in repo card"}], "errors": []}
                )
        except yaml.YAMLError as error:
            raise Answer(400, {"errors": [{"message": str(error)}], "warnings": []}) from None
        raise Answer(200, {"errors": [], "warnings": []})

    def info(self, kind: str, name: str, revision: str | None = None) -> None:
        repository = self.repository(kind, name)
        commit = self.commit(repository, revision or "main")
        card = commit.tree.get("README.md")
        metadata = _front_matter((self.double.folder / card.sha256).read_bytes()) if card else None
        siblings = [{"rfilename": path} for path in sorted(commit.tree)]
        content = {"_id": "1", "id": name, "modelId": name, "sha": commit.oid, "private": repository.private}
        content |= {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "disabled": False}
        content["gated"] = repository.gated
        raise Answer(200, {**content, "lastModified": DATE, "createdAt": DATE, "cardData": metadata or {}})

    def tree(self, kind: str, name: str, revision: str, path: str | None = None) -> None:
        commit = self.commit(self.repository(kind, name), revision)
        rows = _entries(
            commit, (path or "").strip("/"), recursive=self.query.get("recursive", "").lower() in ("true", "1")
        )
        raise Answer(200, rows, {"X-Repo-Commit": commit.oid})

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        commit = self.commit(self.repository(kind, name), revision)
        wanted = self.json()["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode()).get("paths", [])
        rows = [row for row in _entries(commit, "", recursive=True) if row["path"] in wanted]
        raise Answer(200, rows)

    def commits(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name)
        self.commit(repository, revision)
        rows = [
            {"id": one.oid, "title": one.title, "message": "", "authors": [], "date": DATE}
            for one in repository.commits
        ]
        raise Answer(200, rows[::-1])

    def refs(self, kind: str, name: str) -> None:
        refs = self.repository(kind, name).refs
        rows = [{"name": key, "ref": f"refs/heads/{key}", "targetCommit": oid} for key, oid in refs.items()]
        raise Answer(200, {"branches": rows, "converts": [], "tags": []})

    def point(self, kind: str, name: str, revision: str) -> None:
        repository, given = self.repository(kind, name, write=True), self.json()
        repository.refs[given.get("tag", revision)] = self.commit(repository, given.get("startingPoint", "main")).oid
        raise Answer(200, {})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        tree = self.commit(self.repository(kind, name, write=True), revision).tree
        rows = []
        for one in self.json()["files"]:
            mode = "lfs" if one["path"].endswith(_LFS_SUFFIXES) else "regular"
            held = tree.get(one["path"])
            rows.append(
                {"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": held.etag if held else None}
            )
        raise Answer(200, {"files": rows})

    def make_commit(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name, write=True)
        head = self.commit(repository, revision)
        tree, lines = dict(head.tree), [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head.oid):
            raise Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = self.double.store(base64.b64decode(value["content"]), value["path"])
            elif line["key"] == "lfsFile":
                if not (self.double.folder / value["oid"]).is_file():
                    raise Answer(400, {"error": f"LFS object {value['oid']} was not uploaded"})
                tree[value["path"]] = self.double.store((self.double.folder / value["oid"]).read_bytes(), value["path"])
            else:
                del tree[value["path"]]
        made = repository.add(header["summary"], tree, revision)
        url = f"{self.double.url}/{name}/commit/{made.oid}"
        raise Answer(
            200, {"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None}
        )

    def lfs_batch(self, kind: str | None, name: str) -> None:
        self.repository(kind, name, write=True)
        rows: list[dict[str, Any]] = []
        for one in self.json()["objects"]:
            row: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if not (self.double.folder / one["oid"]).is_file():
                upload = {"href": f"{self.double.url}/lfs-storage/{one['oid']}?signature={SIGNATURE}"}
                row["actions"] = {"upload": upload, "verify": {"href": f"{self.double.url}/lfs-verify"}}
            rows.append(row)
        raise Answer(200, {"transfer": "basic", "objects": rows})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Answer(400, {"error": "the bytes are not those of the oid"})
        (self.double.folder / oid).write_bytes(self.body)
        raise Answer(200, {})

    def lfs_verify(self) -> None:
        found = (self.double.folder / self.json()["oid"]).is_file()
        raise Answer(200 if found else 404, {})

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        commit = self.commit(self.repository(kind, name), revision)
        headers = {"X-Repo-Commit": commit.oid}
        file = commit.tree.get(path)
        if file is None:
            raise Answer(404, {"error": "Entry not found"}, headers, code="EntryNotFound")
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        data = (self.double.folder / file.sha256).read_bytes()
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            raise Answer(206, data[start : end + 1], headers)
        raise Answer(200, data, headers)


def _entries(commit: Commit, under: str, *, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{under}/" if under else ""
    rows: dict[str, dict[str, Any]] = {}
    for path, file in sorted(commit.tree.items()):
        if not path.startswith(prefix):
            continue
        parents = path.split("/")[:-1]
        for depth in range(prefix.count("/") + 1, len(parents) + 1):
            folder = "/".join(parents[:depth])
            if recursive or depth == prefix.count("/") + 1:
                oid = hashlib.sha1(folder.encode()).hexdigest()
                rows.setdefault(folder, {"type": "directory", "oid": oid, "size": 0, "path": folder})
        if recursive or "/" not in path[len(prefix) :]:
            rows[path] = {"type": "file", "oid": file.git_oid, "size": file.size, "path": path}
            if file.is_lfs:
                rows[path]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
    return list(rows.values())


def _front_matter(content: bytes) -> dict[str, Any] | None:
    match = re.match(r"---\n(.*?)\n---\n", content.decode(errors="replace"), re.DOTALL)
    found = yaml.safe_load(match[1]) if match else None
    return found if isinstance(found, dict) else None


_REPO = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_REV = r"(?P<revision>[^/]+)"
_PLAIN = r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"DELETE /api/repos/delete", _Handler.delete),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"PUT {_REPO}/settings", _Handler.settings),
    (rf"GET {_REPO}/auth-check(?P<write>/write)?", _Handler.auth_check),
    (rf"GET {_REPO}", _Handler.info),
    (rf"GET {_REPO}/revision/{_REV}", _Handler.info),
    (rf"GET {_REPO}/tree/{_REV}(?P<path>/.*)?", _Handler.tree),
    (rf"POST {_REPO}/paths-info/{_REV}", _Handler.paths_info),
    (rf"GET {_REPO}/commits/{_REV}", _Handler.commits),
    (rf"GET {_REPO}/refs", _Handler.refs),
    (rf"POST {_REPO}/(?:branch|tag)/{_REV}", _Handler.point),
    (rf"POST {_REPO}/preupload/{_REV}", _Handler.preupload),
    (rf"POST {_REPO}/commit/{_REV}", _Handler.make_commit),
    (rf"POST {_PLAIN}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs-storage/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (r"POST /lfs-verify", _Handler.lfs_verify),
    (rf"(?:GET|HEAD) {_PLAIN}/resolve/{_REV}/(?P<path>.+)", _Handler.resolve),
]
