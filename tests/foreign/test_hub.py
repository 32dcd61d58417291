"""What the hub answers, by huggingface_hub's own requests to a server here: each case has its own message."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from lrcompress.errors import InputError
from lrcompress.foreign.opening import open_model

COMMIT = "0" * 40


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(status, error_code, files=None, at=""): it answers so where the path has `at`; else it lists `files`."""
    servers = []

    def run(status, code="", files=(), at="/api/"):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                refused = status != 200 and at in self.path
                body = {"error": "no"} if refused else answer(self.path, files)
                self.send_response(status if refused else 200)
                for key, value in [("X-Error-Code", code), ("X-Repo-Commit", COMMIT), ("ETag", '"1"')]:
                    self.send_header(key, value)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(json.dumps(body).encode())

            do_HEAD = do_GET

            def log_message(self, *_):
                """Nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )

    for key in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    yield run
    for server in servers:
        server.shutdown()


def answer(path, files):
    if "/tree/" in path:
        return [{"type": "file", "path": name, "size": 2, "oid": "1" * 40} for name in files]
    return {"_id": "1", "id": "some/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (
            403,
            "GatedRepo",
            r"not open to you on the hub \(403\): accept its terms on https://huggingface.co/some/model",
        ),
        (401, "GatedRepo", r"not open to you on the hub \(401\)"),
        (401, "", r"not open to you on the hub \(401\)"),
        (401, "RepoNotFound", r"nor a repository of the hub \(401\): check the name"),
        (404, "RepoNotFound", r"nor a repository of the hub \(404\): check the name"),
        (429, "", r"busy or fails at model some/model \(429\): try again"),
        (500, "", r"busy or fails at model some/model \(500\): try again"),
        (503, "", r"busy or fails at model some/model \(503\): try again"),
    ],
)
def test_every_refusal_has_its_own_cure(hub, status, code, said):
    hub(status, code)
    with pytest.raises(InputError, match=said):
        open_model("some/model")


def test_a_repository_whose_files_alone_are_gated(hub):
    """The hub shows the list of a gated repository to everyone."""
    hub(403, "GatedRepo", ["config.json", "model.safetensors"], at="/resolve/")
    with pytest.raises(InputError, match=r"not open to you on the hub \(403\)"):
        open_model("some/model")


def test_a_repository_of_gguf_alone_says_what_to_pass(hub):
    hub(200, files=["README.md", "config.json", "m-Q4.gguf", "m-Q8.gguf"])
    with pytest.raises(InputError, match=r"GGUF files only \(m-Q4.gguf, m-Q8.gguf\): download one with `hf download"):
        open_model("some/model")


def test_no_hub_at_all(hub, monkeypatch):
    hub(200)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="nor reachable on the hub: check the name"):
        open_model("some/model")
