"""A stand-in for the Hugging Face hub on this machine: what its client asks for to list, fetch and upload.

with stand_in("/tmp/cache") as hub:
    hub.repos["owner/repo"] = {"folder/cfg.json": b"{}"}
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import patch
from urllib.parse import unquote

from huggingface_hub import constants


def commit_of(files):
    "The commit at which a repository holds these files."
    return hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()


class Hub(BaseHTTPRequestHandler):
    "Repositories in memory; `fetched` says which files were asked for."

    def answer(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+?))?/?", path):
            return self.about(*m.groups())
        m = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        files = self.server.repos.get(m[1], {}) if m else {}
        if not m or m[2] not in files:
            return self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit_of(files))
        data = files[m[2]]
        self.server.fetched += [m[2]] * (self.command == "GET")
        self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit_of(files))

    do_HEAD = do_GET

    def about(self, repo, what, revision):
        files = self.server.repos.get(repo)
        if files is None:
            return self.answer({}, 404, X_Error_Code="RepoNotFound")
        commit = commit_of(files)
        if revision not in (None, "main", "v1", commit):
            return self.answer({}, 404, X_Error_Code="RevisionNotFound")
        each = [dict(type="file", path=n, rfilename=n, size=len(data), oid="0") for n, data in files.items()]
        self.answer(each if what == "tree" else dict(id=repo, sha=commit, siblings=each))

    def sent(self):
        "The body, in one piece or in several."
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size + 2)[:-2])
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self):
        path, body = unquote(self.path.partition("?")[0]), self.sent()
        if self.headers.get("Authorization") != "Bearer right":
            return self.answer({}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repos.setdefault(name, {})
            return self.answer(dict(url=f"{constants.ENDPOINT}/{name}", id=name))
        if path == "/api/validate-yaml":
            return self.answer(dict(errors=[], warnings=[]))
        repo, step = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/.+", path).groups()
        if step == "preupload":
            whole = dict(uploadMode="regular", shouldIgnore=False)
            return self.answer(dict(files=[dict(whole, path=f["path"]) for f in json.loads(body)["files"]]))
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                value = line["value"]
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
        commit = commit_of(self.server.repos[repo])
        at = f"{constants.ENDPOINT}/{repo}/commit/{commit}"
        self.answer(dict(success=True, commitOid=commit, commitUrl=at))

    def log_message(self, *words):
        pass


@contextmanager
def stand_in(cache):
    "Let huggingface_hub talk to a server of this process and keep what it fetches in `cache`."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.fetched = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{server.server_port}"
    file = at + "/{repo_id}/resolve/{revision}/{filename}"
    own = dict(ENDPOINT=at, HUGGINGFACE_CO_URL_TEMPLATE=file, HF_HUB_OFFLINE=False, HF_HUB_CACHE=str(cache))
    try:
        with patch.multiple(constants, **own):
            yield server
    finally:
        server.shutdown()
        server.server_close()
