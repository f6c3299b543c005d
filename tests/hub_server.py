"""A server that speaks the Hub's file protocol for local folders, and counts what it sends.

    with HubServer({"lab/model": folder}) as server:
        ...  # HF_ENDPOINT=server.url

Model listings with hashes and sizes, files by HEAD, GET and Range, commits, and gated or private repositories.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


COMMIT, TOKEN = "c0ffee" * 6 + "c0ff", "hf_right"
LARGE = 10_000_000  # files of that size are kept outside git, under their SHA-256


class HubServer:
    """Serves folders as repositories.

    Attributes:
        sent: Bytes of all answers so far, with their headers.
        requests: Of all requests so far, "METHOD path".
    """

    def __init__(self, repositories: dict[str, Path], *, gated=(), private=()):
        self.repositories, self.gated, self.private = repositories, set(gated), set(private)
        self.sent, self.requests = 0, []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        subfolder = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/.+", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        asked = listing or subfolder or file
        repository, revision = asked.group(1, 2) if asked else (None, None)
        folder = self.hub.repositories.get(repository)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if folder is None or (repository in self.hub.private and not known):
            self.refuse(401, "RepoNotFound", body)
        elif revision not in (None, "main", COMMIT):
            self.refuse(404, "RevisionNotFound", body)
        elif listing:
            self.send(200, json.dumps(self.listing(repository, folder)).encode(), {}, body)
        elif repository in self.hub.gated and not known:
            self.refuse(401, "GatedRepo", body)
        # repositories here have no folders
        elif subfolder or not (folder / file[3]).is_file():
            self.refuse(404, "EntryNotFound", body)
        else:
            self.send_file(folder / file[3], body)

    def listing(self, repository, folder):
        files = [describe(path) for path in sorted(folder.iterdir()) if path.is_file()]
        gated = "manual" if repository in self.hub.gated else False
        return {"id": repository, "modelId": repository, "sha": COMMIT, "gated": gated, "siblings": files}

    def refuse(self, status, code, body):
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": f"{code}."}, body)

    def send_file(self, path, body):
        size, about = path.stat().st_size, describe(path)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{(about.get("lfs") or {}).get("sha256", about["blobId"])}"'}
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


def describe(path: Path) -> dict:
    """A file as a listing shows it: weights are known by their header alone, for they are holes."""
    size = path.stat().st_size
    with path.open("rb") as opened:
        content = opened.read(LARGE)
    about = {"rfilename": path.name, "size": size, "blobId": hashlib.sha1(b"blob %d\0" % size + content).hexdigest()}
    if size > LARGE:
        about["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 135}
    return about
