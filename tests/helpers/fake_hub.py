"""A Hugging Face hub in this process, on a port of this machine, that keeps what is pushed to it.

It speaks what huggingface_hub asks for: what a repository has, its files, and commits to it.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants, file_download

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_thisisnotatoken"
_READ = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")
_INFO = re.compile(r"/api/models/([\w.-]+/[\w.-]+?)(/revision/([^/?]+))?(\?.*)?")
_TREE = re.compile(r"/api/models/([\w.-]+/[\w.-]+)/tree/.*")
_PREUPLOAD = re.compile(r"/api/models/([\w.-]+/[\w.-]+)/preupload/.*")
_COMMIT = re.compile(r"/api/models/([\w.-]+/[\w.-]+)/commit/.*")


class FakeHub:
    """Repositories as dicts of their files.

    Attributes:
      files: Of each repository, "org/name", the content of its files by name.
      private: Names of repositories.
      asked: Every request, as "GET /path".
      forbidden: Whether nobody may write.
    """

    def __init__(self):
        self.files, self.private, self.asked = {}, set(), []
        self.forbidden = False
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        """Nobody answers any more."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def _answer(self, body=True):
        hub = self.hub
        hub.asked.append(f"{self.command} {self.path}")
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if found := _READ.fullmatch(self.path):
            repository, revision, name = found.groups()
            content = hub.files.get(repository, {}).get(name)
            if revision not in ("main", "v1", COMMIT):
                return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            if content is None:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            etag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            return self._send(200, content, headers, body)
        if self.path.startswith("/api/repos/create"):
            return self._create(json.loads(sent))
        if self.path.startswith("/api/validate-yaml"):
            return self._json({"errors": [], "warnings": []})
        if found := _PREUPLOAD.fullmatch(self.path):
            named = [{"path": one["path"]} for one in json.loads(sent)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return self._json({"files": [{**one, **modes} for one in named]})
        if found := _COMMIT.fullmatch(self.path):
            return self._commit(found[1], sent)
        if found := _TREE.fullmatch(self.path):
            return self._json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for name, content in hub.files.get(found[1], {}).items()
                ]
            )
        if found := _INFO.fullmatch(self.path):
            return self._info(found[1], found[3])
        return self._send(404, b"")

    def _create(self, wanted):
        if self.hub.forbidden:
            return self._json({"error": "You don't have the rights to create a model"}, 403)
        repository = f"{wanted['organization']}/{wanted['name']}"
        if repository in self.hub.files:
            return self._json({"error": "You already created this model repo"}, 409)
        self.hub.files[repository] = {}
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(repository)
        return self._json({"url": f"{self.hub.address}/{repository}", "name": repository})

    def _commit(self, repository, sent):
        files = self.hub.files[repository]
        for line in map(json.loads, sent.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        url = f"{self.hub.address}/{repository}/commit/{COMMIT}"
        return self._json({"commitUrl": url, "commitOid": COMMIT, "success": True})

    def _info(self, repository, revision):
        if repository not in self.hub.files:
            return self._json({"error": "Repo not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", "v1", COMMIT):
            return self._json({"error": "no"}, 404, {"X-Error-Code": "RevisionNotFound"})
        names = [{"rfilename": name} for name in self.hub.files[repository]]
        private = repository in self.hub.private
        return self._json({"id": repository, "sha": COMMIT, "siblings": names, "private": private})

    def _json(self, value, status=200, headers=()):
        self._send(
            status,
            json.dumps(value).encode(),
            {"Content-Type": "application/json", **dict(headers)},
        )

    def _send(self, status, content, headers=(), body=True):
        self.send_response(status)
        # Of a connection that stays, the other side would not see that the hub is gone.
        always = {"Content-Length": str(len(content)), "Connection": "close"}
        for name, value in {**dict(headers), **always}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextlib.contextmanager
def serving(folder, patch):
    """A hub that huggingface_hub asks in this process; what it fetches it keeps in the folder."""
    hub = FakeHub()
    before = constants.ENDPOINT
    patch.setattr(constants, "ENDPOINT", hub.address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(before, hub.address)
    for module in (constants, file_download):  # where earlier versions have a copy of it
        patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_CACHE", str(folder))
    patch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        hub.close()
