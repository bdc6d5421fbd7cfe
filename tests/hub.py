"""A stand-in for the hub's HTTP API on a loopback port: repositories in memory, with commits, trees and files."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "secret" * 5


class Hub:
    """Start with `with`. commits: {(kind, id): [(sha, {path: bytes})]}, the newest last. private: {(kind, id): bool}."""

    def __init__(self):
        self.commits: dict[tuple[str, str], list[tuple[str, dict[str, bytes]]]] = {}
        self.private: dict[tuple[str, str], bool] = {}
        self.resolved: list[str] = []  # paths of files that were read
        self.tokens: set[str] = set()  # what requests that write were authorised with
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.get(self)

            def do_HEAD(self):
                hub.get(self)

            def do_POST(self):
                hub.post(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, kind: str, name: str, files: dict[str, bytes], private: bool = False) -> str:
        """Add files to a repository, which is made if it is not there. Returns the commit."""
        self.private.setdefault((kind, name), private)
        known = self.commits.setdefault((kind, name), [])
        whole = {**(known[-1][1] if known else {}), **files}
        sha = hashlib.sha1(repr((len(known), sorted(whole.items()))).encode()).hexdigest()
        known.append((sha, whole))
        return sha

    def at(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        known = self.commits.get((kind, name), [])
        return next((c for c in reversed(known) if revision in ("main", "HEAD", c[0])), None)

    # ---- answers ----
    def get(self, request) -> None:
        path = unquote(urlsplit(request.path).path)
        if path == "/api/whoami-v2":
            return answer(request, {"name": "someone", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path):
            kind, name, what, revision, folder = match.groups()
            found = self.at(kind, name, revision or "main")
            if found is None:
                return missing(request, (kind, name) in self.commits)
            return answer(
                request, tree(found[1], folder or "", request) if what == "tree" else self.info(kind, name, found)
            )
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            of, name, revision, file = match.groups()
            kind = "dataset" if of else "model"
            found = self.at(kind, name, revision)
            if found is None or file not in found[1]:
                return missing(
                    request,
                    found is not None or bool(self.commits.get((kind, name))),
                    "EntryNotFound" if found else "RevisionNotFound",
                )
            self.resolved += [path] if request.command == "GET" else []
            return send_file(request, found[0], found[1][file])
        return missing(request, False)

    def post(self, request, body: bytes) -> None:
        path = unquote(urlsplit(request.path).path)
        if path == "/api/validate-yaml":
            return answer(request, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            found = self.at(*match.groups())
            asked = parse_qs(body.decode()).get("paths", [])
            return answer(request, [entry(p, found[1][p]) for p in asked if found and p in found[1]])
        self.tokens.add(request.headers.get("Authorization", ""))
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return answer(request, {"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            given = json.loads(body)
            kind, name = given.get("type") or "model", f"{given.get('organization') or 'someone'}/{given['name']}"
            if (kind, name) in self.commits:
                return answer(request, {"error": "exists", "url": f"{self.url}/{name}"}, 409)
            self.commit(kind, name, {}, given.get("visibility") == "private")
            return answer(
                request, {"url": f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{name}", "name": name}
            )
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/(preupload|commit)/([^/]+)", path):
            kind, name, what, _ = match.groups()
            if what == "preupload":
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return answer(request, {"files": files})
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            files = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in lines if e["key"] == "file"}
            sha = self.commit(kind, name, files)
            return answer(
                request, {"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None}
            )
        return missing(request, False)

    def info(self, kind: str, name: str, found: tuple) -> dict:
        siblings = [{"rfilename": path} for path in found[1]]
        return {"id": name, "sha": found[0], "private": self.private[kind, name], "siblings": siblings, "tags": []}


def answer(request, value, status: int = 200, **headers: str) -> None:
    body = json.dumps(value).encode()
    request.send_response(status)
    for key, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
        request.send_header(key, text)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def missing(request, has_repository: bool, code: str = "RevisionNotFound") -> None:
    answer(request, {"error": "not found"}, 404, **{"X-Error-Code": code if has_repository else "RepoNotFound"})


def entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def tree(files: dict[str, bytes], folder: str, request) -> list[dict]:
    """Files and folders below a folder: all of them if the request says recursive, else those directly in it."""
    inside = f"{folder}/" if folder else ""
    recursive = parse_qs(urlsplit(request.path).query).get("recursive", ["false"])[0].lower() == "true"
    below = {p: c for p, c in files.items() if p.startswith(inside)}
    direct = {p: c for p, c in below.items() if recursive or "/" not in p[len(inside) :]}
    steps = [p[len(inside) :].split("/")[:-1] for p in below]
    folders = {inside + "/".join(s[: i + 1]) for s in steps for i in range(len(s) if recursive else min(len(s), 1))}
    return [entry(p, c) for p, c in direct.items()] + [
        {"type": "directory", "path": p, "size": 0, "oid": hashlib.sha1(p.encode()).hexdigest()}
        for p in sorted(folders)
    ]


def send_file(request, sha: str, content: bytes) -> None:
    """A file, or the range of it that is asked for."""
    begin, end, status = 0, len(content), 200
    if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
        begin, end, status = int(match[1]), min(int(match[2] or len(content)) + 1, len(content)), 206
    part = content[begin:end]
    request.send_response(status)
    request.send_header("Content-Length", str(len(part)))
    request.send_header("Content-Type", "application/octet-stream")
    request.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
    request.send_header("X-Repo-Commit", sha)
    if status == 206:
        request.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(part)
