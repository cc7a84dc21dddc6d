"""A hub that knows one token and keeps what it is given: the few routes of an upload."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"


class FakeHub:
    """Serves while it is entered; `files` holds what was committed, `created` the requests for repositories."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.repositories: set[str] = set()
        self.refuses_commits = False
        self._objects: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, b"")

            def do_POST(self) -> None:
                hub.answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            do_PUT = do_POST

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        status, content = self.route(handler.command, handler.path, handler.headers.get("Authorization", ""), body)
        sent = json.dumps(content).encode()
        handler.send_response(status)
        if status == 404:
            handler.send_header("X-Error-Code", "RepoNotFound")
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(sent)))
        handler.end_headers()
        handler.wfile.write(sent)

    def route(self, method: str, path: str, authorization: str, body: bytes) -> tuple[int, Any]:
        if path.startswith("/objects/"):  # an address that is signed, and so needs no token
            self._objects[path.rpartition("/")[2]] = body
            return 200, {}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/api/whoami"):
            return 200, {"name": "me", "type": "user"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.created.append(asked)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repositories.add(name)
            return 200, {"url": f"{self.address}/{name}", "id": name}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._place(each) for each in json.loads(body)["objects"]]}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            lfs = {True: "lfs", False: "regular"}
            return 200, {
                "files": [
                    {"path": each["path"], "uploadMode": lfs[each["path"].endswith("tensors")], "shouldIgnore": False}
                    for each in files
                ]
            }
        if "/commit/" in path and not self.refuses_commits:
            self._commit(body)
            return 200, {
                "commitUrl": f"{self.address}/me/mine/commit/{'0' * 40}",
                "commitOid": "0" * 40,
                "success": True,
            }
        if "/commit/" in path:
            return 403, {"error": "This token may not write."}
        name = path.partition("?")[0].removeprefix("/api/models/").partition("/")[0:3]
        if method == "GET" and "".join(name).partition("/revision")[0] in self.repositories:
            return 200, {"id": "".join(name), "siblings": [], "sha": "0" * 40}
        return 404, {"error": "Repository not found"}

    def _place(self, asked: dict[str, Any]) -> dict[str, Any]:
        place = {"href": f"{self.address}/objects/{asked['oid']}", "header": {}}
        return {"oid": asked["oid"], "size": asked["size"], "actions": {"upload": place}}

    def _commit(self, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.files[value["path"]] = self._objects[value["oid"]]
