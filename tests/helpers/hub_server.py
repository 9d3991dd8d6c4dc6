"""A small stand-in for the Hugging Face Hub on this machine: what huggingface_hub asks of it for one repository."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from urllib.parse import unquote

import pytest

TOKEN = "hf_plantedtoken13579"


class HubServer:
    """The files of one repository or bucket, and its commits. `fail` requests of /commit/ or /batch are refused."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.fail, self.private = 0, False

    @property
    def head(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()

    def __call__(self, environ: dict[str, Any], start: Any) -> list[bytes]:
        from werkzeug.wrappers import Request, Response

        request = Request(environ)
        response = self.answer(request.method, unquote(request.path), request)
        if not isinstance(response, Response):
            code = "EntryNotFound" if self.private and "/me/cache" in request.path else "RepoNotFound"
            missing = {"error": f"{code}: {request.path}"}
            status, headers = (404, {"X-Error-Code": code}) if response is None else (200, {})
            data = json.dumps(missing if response is None else response)
            response = Response(data, status, headers, content_type="application/json")
        response.headers["X-Repo-Commit"] = self.head
        return response(environ, start)  # type: ignore[return-value]

    def answer(self, method: str, path: str, request: Any) -> Any:
        from werkzeug.wrappers import Response

        if path == "/api/validate-yaml":  # the one request without a token
            return {"warnings": [], "errors": []}
        if "Authorization" in request.headers:
            assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        elif path != "/api/agent-harnesses":
            pytest.fail(f"no token: {path}")
        if path in ("/api/repos/create", "/api/buckets/me/cache") and method == "POST":
            asked, kind = request.get_json(), "buckets" if "buckets" in path else "datasets"
            self.private |= asked.get("private") or asked.get("visibility") == "private"
            return {"url": f"{request.host_url}{kind}/me/cache", "name": "me/cache", "id": "me/cache"}
        if not self.private:
            return None
        if re.fullmatch("/api/datasets/me/cache(/revision/[^/]*)?", path):
            return {"id": "me/cache", "sha": self.head, "siblings": []}
        if path == "/api/buckets/me/cache":
            return {
                "id": "me/cache",
                "private": True,
                "createdAt": "2026-01-01T00:00:00.000Z",
                "size": 1,
                "totalFiles": 1,
            }
        if "/preupload/" in path:
            files = request.get_json()["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in path:
            return self.commit(request, [json.loads(line) for line in request.data.splitlines()])
        if "/paths-info" in path:
            return [self.entry(name) for name in request.form.getlist("paths") if name in self.files]
        if found := re.fullmatch("/api/(?:datasets|buckets)/me/cache/tree(?:/[0-9a-f]{40}|/main)?(?:/(.*))?", path):
            inside = f"{found[1]}/" if found[1] else ""
            names = [name for name in self.files if name.startswith(inside)]
            return [self.entry(name) for name in sorted(names)] or (None if inside else [])
        if (found := re.fullmatch("/(?:datasets|buckets)/me/cache/resolve/(?:main/)?(.*)", path)) and found[
            1
        ] in self.files:
            response = Response(self.files[found[1]], headers={"ETag": f'"{self.entry(found[1])["oid"]}"'})
            return response.make_conditional(request.environ, True, len(self.files[found[1]]))
        return None

    def entry(self, name: str) -> dict[str, Any]:
        oid = hashlib.sha1(self.files[name]).hexdigest()
        more = {"xetHash": oid, "mtime": "2026-01-01T00:00:00.000Z"}
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": oid} | more

    def commit(self, request: Any, lines: list[dict[str, Any]]) -> Any:
        from werkzeug.wrappers import Response

        (header,) = (line["value"] for line in lines if line["key"] == "header")
        if self.fail or header.get("parentCommit") != self.head:
            self.fail = max(0, self.fail - 1)
            return Response("the head has moved", 412)
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        self.files |= added
        self.commits.append(sorted(added))
        return {
            "success": True,
            "commitOid": self.head,
            "commitUrl": f"{request.host_url}datasets/me/cache/commit/{self.head}",
        }


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run the stand-in, and lead huggingface_hub to it."""
    pytest.importorskip("huggingface_hub")
    serving = pytest.importorskip("werkzeug.serving")

    class Quiet(serving.WSGIRequestHandler):  # type: ignore[name-defined,misc]
        def log(self, *_: Any) -> None:
            pass

    server = HubServer()
    web = serving.make_server("127.0.0.1", 0, server, threaded=True, request_handler=Quiet)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        constants, place = import_module("huggingface_hub.constants"), f"http://127.0.0.1:{web.port}"
        patch.setattr(constants, "ENDPOINT", place)  # it is read from HF_ENDPOINT at the first import
        template = place + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setenv("HF_TOKEN", TOKEN)
        try:
            yield server
        finally:
            web.shutdown()
            web.server_close()
