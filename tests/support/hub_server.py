"""A server that speaks the Hub's file protocol for local folders, and counts what it sends.

    with HubServer({"lab/model": folder}) as server:
        ...  # HF_ENDPOINT=server.url

Model listings with hashes and sizes, files by HEAD, GET and Range, commits, and gated or private repositories. With a
folder to store into, it takes uploads too: new repositories and branches, large files by git LFS, and commits, each a
folder of its own.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


COMMIT, TOKEN = "c0ffee" * 6 + "c0ff", "hf_right"
LARGE = 10_000_000  # files of that size are kept outside git, under their SHA-256, as weights of any size are


class HubServer:
    """Serves folders as repositories.

    Args:
        repositories: Id to the folder of its only commit.
        gated: Ids whose files are for the token only.
        private: Ids that are for the token only.
        store: Folder for what is uploaded.

    Attributes:
        branches: Of each repository, by name; to their commit.
        trees: Folder of each (repository, commit).
        watch: Called with every request, "METHOD path", before it is answered.
        sent: Bytes of all answers so far, with their headers.
        requests: Of all requests so far, "METHOD path".
        received: SHA-256 of every large file that was sent to it so far.
    """

    def __init__(self, repositories: dict[str, Path], *, gated=(), private=(), store: Path | None = None):
        self.branches = {repository: {"main": COMMIT} for repository in repositories}
        self.trees = {(repository, COMMIT): folder for repository, folder in repositories.items()}
        self.gated, self.private, self.store = set(gated), set(private), store
        self.watch = lambda request: None
        self.sent, self.requests, self.received = 0, [], []
        self.lock = threading.Lock()
        handler = type("Handler", (_Uploads if store else _Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def tree(self, repository, revision="main") -> tuple[str | None, Path | None]:
        """Commit and folder of a branch or commit."""
        commit = self.branches.get(repository, {}).get(revision, revision)
        return commit, self.trees.get((repository, commit))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def begin(self):
        """Notes the request. Returns its path, and whether it shows the token."""
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
        self.hub.watch(self.hub.requests[-1])
        return path, self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def answer(self, body):
        path, known = self.begin()
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        subfolder = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/.+", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        asked = listing or tree or subfolder or file
        repository, revision = asked.group(1, 2) if asked else (None, None)
        commit, folder = self.hub.tree(repository, revision or "main")
        if repository not in self.hub.branches or (repository in self.hub.private and not known):
            self.refuse(401, "RepoNotFound", body)
        elif folder is None:
            self.refuse(404, "RevisionNotFound", body)
        elif listing:
            self.send(200, json.dumps(self.listing(repository, commit, folder)).encode(), {}, body)
        elif tree:
            files = self.listing(repository, commit, folder)["siblings"]
            self.send(200, json.dumps([as_node(about) for about in files]).encode(), {}, body)
        elif repository in self.hub.gated and not known:
            self.refuse(401, "GatedRepo", body)
        # repositories here have no folders but that of scores
        elif subfolder or not (folder / file[3]).is_file():
            self.refuse(404, "EntryNotFound", body)
        else:
            self.send_file(folder / file[3], commit, body)

    def listing(self, repository, commit, folder):
        paths = sorted([*folder.iterdir(), *folder.glob(".eval_results/*")])
        files = [describe(p) | {"rfilename": p.relative_to(folder).as_posix()} for p in paths if p.is_file()]
        gated = "manual" if repository in self.hub.gated else False
        private = repository in self.hub.private
        about = {"id": repository, "modelId": repository, "sha": commit, "gated": gated, "private": private}
        return about | {"siblings": files}

    def refuse(self, status, code, body):
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": f"{code}."}, body)

    def send_file(self, path, commit, body):
        size, about = path.stat().st_size, describe(path)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{(about.get("lfs") or {}).get("sha256", about["blobId"])}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        start, end = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else (0, size)
        if asked:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        content = b""
        if body:
            with path.open("rb") as opened:
                opened.seek(start)
                content = opened.read(end - start)
        self.send(206 if asked else 200, content, headers, body, length=end - start)

    def send(self, status, content, headers, body, length=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content) if length is None else length), **headers}.items():
            self.send_header(key, value)
        with self.hub.lock:
            self.hub.sent += sum(map(len, self._headers_buffer)) + (len(content) if body else 0)
        self.end_headers()
        if body:
            self.wfile.write(content)


class _Uploads(_Handler):
    """What comes in. Content first, which nobody sees; then a commit, which takes it all into a tree of its own."""

    def do_PUT(self):
        path, _ = self.begin()
        content, oid = self.rfile.read(int(self.headers["Content-Length"])), path.removeprefix("/objects/")
        if hashlib.sha256(content).hexdigest() != oid:
            self.refuse(400, "BadRequest", True)
            return
        with self.hub.lock:
            self.hub.received.append(oid)
        self.object(oid).parent.mkdir(exist_ok=True)
        self.object(oid).write_bytes(content)
        self.reply({})

    def do_POST(self):
        path, known = self.begin()
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        objects = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)", path)
        given = content if asked and asked[2] == "commit" else json.loads(content)
        if not known:
            self.refuse(401, "RepoNotFound", True)
        elif path == "/api/validate-yaml":
            self.reply({"warnings": [], "errors": []})
        elif path == "/api/repos/create":
            self.create(given)
        elif (asked or objects) and (asked or objects)[1] not in self.hub.branches:
            self.refuse(404, "RepoNotFound", True)
        elif objects and objects[2] == "batch":
            self.reply({"objects": [self.wanted(objects[1], **about) for about in given["objects"]]})
        elif objects:
            size = self.object(given["oid"]).stat().st_size if self.object(given["oid"]).exists() else None
            self.reply({}, 200 if size == given["size"] else 422)
        elif asked[2] == "branch":
            self.branch(asked[1], asked[3])
        elif asked[2] == "preupload":
            self.preupload(asked[1], asked[3], given)
        else:
            self.commit(asked[1], asked[3], [json.loads(line) for line in content.splitlines()])

    def reply(self, answer, status=200):
        self.send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"}, True)

    def object(self, oid):
        return self.hub.store / "objects" / oid

    def create(self, given):
        repository = f"{given['organization']}/{given['name']}"
        url = {"url": f"{self.hub.url}/{repository}"}
        if repository in self.hub.branches:
            self.reply({"error": "It is there.", **url}, 409)
            return
        commit = "0" * 40
        folder = self.hub.trees[repository, commit] = self.hub.store / repository / commit
        folder.mkdir(parents=True)
        (folder / ".gitattributes").touch()
        self.hub.branches[repository] = {"main": commit}
        if given.get("visibility") == "private" or given.get("private"):
            self.hub.private.add(repository)
        self.reply(url)

    def branch(self, repository, name):
        branches = self.hub.branches[repository]
        if name in branches:
            self.reply({"error": "It is there."}, 409)
        else:
            branches[name] = branches["main"]
            self.reply({})

    def preupload(self, repository, revision, given):
        _, folder = self.hub.tree(repository, revision)
        files = []
        for file in given["files"]:
            large = file["size"] > LARGE or file["path"].endswith(".safetensors")
            known = describe(folder / file["path"]) if (folder / file["path"]).exists() else {"blobId": None}
            oid = known["lfs"]["sha256"] if "lfs" in known else known["blobId"]
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": files})

    def wanted(self, repository, oid, size):
        """What to do about a large file: nothing, if its content is there."""
        if self.object(oid).exists():
            return {"oid": oid, "size": size}
        upload, verify = f"{self.hub.url}/objects/{oid}", f"{self.hub.url}/{repository}.git/info/lfs/objects/verify"
        return {"oid": oid, "size": size, "actions": {"upload": {"href": upload}, "verify": {"href": verify}}}

    def commit(self, repository, branch, lines):
        parent, before = self.hub.tree(repository, branch)
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", parent) != parent:
            self.reply({"error": "A commit has happened since."}, 412)
            return
        commit = hashlib.sha1(json.dumps([parent, lines]).encode()).hexdigest()
        after = self.hub.store / repository / commit
        shutil.copytree(before, after)
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "file":
                (after / value["path"]).parent.mkdir(exist_ok=True)
                (after / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                shutil.copyfile(self.object(value["oid"]), after / value["path"])
            elif kind == "deletedFile":
                (after / value["path"]).unlink()
        self.hub.trees[repository, commit] = after
        self.hub.branches[repository][branch] = commit
        self.reply({"commitUrl": f"{self.hub.url}/{repository}/commit/{commit}", "commitOid": commit})


def describe(path: Path) -> dict:
    """A file as a listing shows it: very large weights are known by their header alone, for they are holes."""
    size = path.stat().st_size
    with path.open("rb") as opened:
        content = opened.read(LARGE)
    about = {"rfilename": path.name, "size": size, "blobId": hashlib.sha1(b"blob %d\0" % size + content).hexdigest()}
    if size > LARGE or path.suffix == ".safetensors":
        about["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 135}
    return about


def as_node(about: dict) -> dict:
    """The same as a tree shows it."""
    lfs = {"lfs": {"oid": about["lfs"]["sha256"], **about["lfs"]}} if "lfs" in about else {}
    return {"type": "file", "path": about["rfilename"], "size": about["size"], "oid": about["blobId"], **lfs}


def environment(server, cache, **more):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    # a proxy of the machine would be asked for its own address
    return kept | {"HF_ENDPOINT": server.url, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1", **more}
