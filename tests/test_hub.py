"""push_to_hub and from_pretrained("user/name"), against a local stand-in of the Hub's HTTP API."""

import base64
import hashlib
import http.server
import json
import threading

import pytest
import yaml
from huggingface_hub import constants

from common.errors import InputError
from serving import Recommender, hub
from tests.made_up import random_model, write_export


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, user/shop, that the token "mine" may write."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            self.server.card = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            self.answer({"errors": [], "warnings": []})
        elif self.headers["Authorization"] != "Bearer mine":
            self.answer({"error": "Invalid token"}, 401)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{self.server.address}/user/shop", "name": "user/shop"})
        elif self.path.startswith("/api/models/user/shop/preupload/"):
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [how | {"path": file["path"]} for file in json.loads(body)["files"]]})
        elif self.path.startswith("/api/models/user/shop/commit/"):
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.server.commit = hashlib.sha1(body).hexdigest()
            address = f"{self.server.address}/user/shop"
            self.answer({"success": True, "commitOid": self.server.commit, "commitUrl": address})

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/user/shop/tree/"):
            entries = [{"path": name, "size": len(content)} for name, content in self.server.files.items()]
            self.answer([{"type": "file", "oid": entry["path"], **entry} for entry in entries])
        elif path.startswith("/api/models/user/shop"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer({"id": "user/shop", "sha": self.server.commit, "siblings": siblings})
        elif path.startswith(start := f"/user/shop/resolve/{self.server.commit}/"):
            content = self.server.files[path.removeprefix(start)]
            self.respond(content, {"ETag": hashlib.sha1(content).hexdigest(), "X-Repo-Commit": self.server.commit})
        else:
            self.answer({"error": "Repository not found"}, 404)

    do_HEAD = do_GET

    def answer(self, value, status=200):
        self.respond(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def respond(self, content, headers, status=200):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.files = f"http://127.0.0.1:{server.server_port}", {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "mine")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("exports") / "shop", random_model((4, 8)))


def test_what_was_pushed_is_opened_by_its_name_also_with_a_changed_catalogue(server, export):
    (export / "notes.txt").write_text("not of the export", encoding="utf-8")
    assert hub.main([str(export), "user/shop"]) == f"{server.address}/user/shop"
    assert server.files.keys() == {path.name for path in export.iterdir()} - {"notes.txt"}
    assert server.card["library_name"] == "fmrlrec" and server.card["datasets"] == ["made-up"]
    recommender = Recommender.from_pretrained("user/shop")
    assert recommender.recommend([[1, 2]]) == Recommender.from_pretrained(export).recommend([[1, 2]])
    recommender.remove_items([3])
    recommender.push_to_hub("user/shop")
    assert len(Recommender.from_pretrained("user/shop")) == len(recommender)


def test_errors_say_what_the_hub_said_and_a_folder_goes_before_a_repository(server, export, tmp_path, monkeypatch):
    (tmp_path / "exports").mkdir()
    with pytest.raises(InputError, match="exports/demo-64 is not an export"):
        Recommender.from_pretrained("exports/demo-64")
    with pytest.raises(InputError, match=r"no folder user/none, and no such repository .*; check the name"):
        Recommender.from_pretrained("user/none")
    for folder, name, expected in ((export, "a/b/c", "such as user/name"), (tmp_path, "user/shop", "is not an export")):
        with pytest.raises(InputError, match=expected):
            hub.push(folder, name)
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(InputError, match=r"could not publish user/shop on the Hub \(.*; log in with `hf auth login`"):
        hub.push(export, "user/shop")
