"""``--push-to-hub`` against a server on this machine that speaks the few endpoints it needs.

huggingface_hub is the real one, in a process of its own: it reads its environment once. The server
answers by what the hub's API documents; the hub itself was never asked.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.launch import environment
from tests.pico import directory_bytes

TOKEN = "hf_right"


@dataclass
class Hub:
    """Repositories of a server: name -> whether it is private, and its files."""

    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    takes_commits: bool = True
    address: str = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Silent."""

        def _answer(self, code: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(code)
            if code == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _handle(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._answer(401, {"error": "Invalid username or password."})
                return
            self._answer(*self._found(path, sent))

        do_GET = do_POST = _handle

        def _found(self, path: str, sent: bytes) -> tuple[int, Any]:
            if path == "/api/whoami-v2":
                return 200, {"name": "me", "type": "user"}
            if path == "/api/validate-yaml":  # of README.md
                return 200, {"errors": [], "warnings": []}
            if path == "/api/repos/create":
                asked = json.loads(sent)
                name = f"{asked['organization']}/{asked['name']}"
                wish = asked.get("visibility") == "private" or bool(asked.get("private"))
                if name in hub.private:
                    return 409, {"url": f"{hub.address}/{name}"}
                hub.private[name] = wish
                return 200, {"url": f"{hub.address}/{name}"}
            name = "/".join(path.split("/")[3:5])
            if name not in hub.private:
                return 404, {"error": "Repository not found"}
            if path.endswith("/preupload/main"):
                names = [file["path"] for file in json.loads(sent)["files"]]
                how = {"uploadMode": "regular", "shouldIgnore": False}
                return 200, {"files": [{"path": name, **how} for name in names]}
            if path.endswith("/commit/main"):
                return self._commit(name, sent)
            return 200, {"id": name, "private": hub.private[name], "siblings": []}

        def _commit(self, name: str, sent: bytes) -> tuple[int, Any]:
            if not hub.takes_commits:
                return 403, {"error": "You may not write here"}
            for row in map(json.loads, sent.splitlines()):
                if row["key"] == "file":
                    assert row["value"]["encoding"] == "base64"
                    hub.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            url = f"{hub.address}/{name}/commit/abc"
            return 200, {"success": True, "commitOid": "abc", "commitUrl": url}

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def convert(
    source: Path, out: Path, hub: Hub, *more: str, ranks: int = 0, token: str = TOKEN
) -> tuple[int, str, str]:
    """``convert --to hf --push-to-hub me/pico``: its exit code and what it says."""
    env = environment(HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="0", HF_HOME=str(out.parent / "home"))
    env |= {"HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    flags = ["--load", source, "--save", out, "--to", "hf", "--push-to-hub", "me/pico", *more]
    start = [sys.executable, *(torchrun if ranks else []), "-m", "megatron_prune", "convert"]
    done = subprocess.run([*start, *flags], env=env, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_directory_arrives_whole(models, tmp_path: Path, hub: Hub, ranks: int) -> None:
    flags = ("--private", "--max-shard-size", "100KB")
    code, out, err = convert(models("gqa"), tmp_path / "out", hub, *flags, ranks=ranks)
    assert code == 0, err
    assert hub.private == {"me/pico": True}
    assert f"{hub.address}/me/pico/commit/abc" in out
    (tmp_path / "remote").mkdir()
    for name, data in hub.files.items():
        (tmp_path / "remote" / name).write_bytes(data)
    found = directory_bytes(tmp_path / "out")
    assert directory_bytes(tmp_path / "remote") == found and "README.md" in found
    assert hub.asked.count("POST /api/models/me/pico/commit/main") == 1


def test_a_repository_that_is_there_is_written_to(models, tmp_path: Path, hub: Hub) -> None:
    hub.private["me/pico"] = False
    code, _, err = convert(models("gqa"), tmp_path / "out", hub)
    assert code == 0, err
    assert "config.json" in hub.files


def last_line(err: str) -> str:
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize("token", ["hf_wrong", ""])
def test_a_wrong_or_missing_token_is_refused_first(
    models, tmp_path: Path, hub: Hub, token: str
) -> None:
    code, _, err = convert(models("gqa"), tmp_path / "out", hub, token=token)
    assert code == 2 and "Traceback" not in err
    assert ("did not take the token" if token else "no token; set HF_TOKEN") in last_line(err)
    assert not (tmp_path / "out").exists() and hub.private == {}


def test_a_hub_that_does_not_answer_is_refused_first(models, tmp_path: Path) -> None:
    nobody = Hub(address="http://127.0.0.1:9")  # the port of "discard": nothing listens
    code, _, err = convert(models("gqa"), tmp_path / "out", nobody)
    assert code == 2 and "check HF_TOKEN and the network" in last_line(err)
    assert not (tmp_path / "out").exists()


def test_a_private_model_never_goes_to_a_public_repository(
    models, tmp_path: Path, hub: Hub
) -> None:
    hub.private["me/pico"] = False
    code, _, err = convert(models("gqa"), tmp_path / "out", hub, "--private")
    assert code == 2 and "--private: is there and public" in last_line(err)
    assert not (tmp_path / "out").exists() and hub.files == {}


def test_an_upload_that_fails_leaves_the_directory(models, tmp_path: Path, hub: Hub) -> None:
    hub.takes_commits = False
    code, _, err = convert(models("gqa"), tmp_path / "out", hub)
    assert code == 4 and "is whole, try again with 'hf upload me/pico" in last_line(err)
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert not list(tmp_path.glob(".out*"))


def test_a_dry_run_asks_and_uploads_nothing(models, tmp_path: Path, hub: Hub) -> None:
    code, _, err = convert(models("gqa"), tmp_path / "out", hub, "--dry-run")
    assert code == 0, err
    assert hub.asked == ["GET /api/whoami-v2", "GET /api/models/me/pico"]
    assert hub.files == {} and not (tmp_path / "out").exists()
