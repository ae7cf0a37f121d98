"""Models of the hub, from a hub of our own on this machine: one line for whatever goes wrong, and the commit kept."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import constants

import kvpatch as kv
from kvpatch.errors import ModelError
from kvpatch.executors.host import model_record
from kvpatch.models import hub
from kvpatch.models.load import load_model
from kvpatch.models.named import hub_models, hub_repository, named_models
from tiny import tiny_model_dir

pytestmark = pytest.mark.model

COMMIT, OLDER = "a" * 40, "b" * 40
NAME = "lab/tiny-llama"


class FakeHub(ThreadingHTTPServer):
    """A hub with one model, `NAME`, whose branch main is at `COMMIT` and whose tag v1 is at `OLDER`."""

    folder: Path
    status: dict[str, tuple[int, str]]
    asked: list[str]
    delay: float

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder, self.status, self.asked, self.delay = folder, {}, [], 0.0


class _Answers(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        own = self.server
        path = unquote(self.path.partition("?")[0])
        own.asked.append(path)
        time.sleep(own.delay)
        for name, (status, code) in own.status.items():
            if name in path:
                return self._say(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})
        if path.startswith(f"/api/models/{NAME}"):
            commits = {"main": COMMIT, "v1": OLDER, COMMIT: COMMIT, OLDER: OLDER}
            _, _, rest = path.partition("/revision/")
            if "/tree/" in path:
                rest = path.partition("/tree/")[2].partition("/")[0]
            if (rest or "main") not in commits:
                return self._say(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            files = sorted(p for p in own.folder.iterdir() if p.is_file())
            if "/tree/" in path:
                tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _oid(p)} for p in files]
                return self._say(200, json.dumps(tree).encode(), {})
            found = {
                "id": NAME,
                "modelId": NAME,
                "sha": commits[rest or "main"],
                "siblings": [{"rfilename": name} for name in (*(p.name for p in files), "onnx/model.safetensors")],
            }
            return self._say(200, json.dumps(found).encode(), {})
        file = own.folder / path.rpartition("/")[2]
        if "/resolve/" not in path or not file.is_file():
            return self._say(404, b"{}", {"X-Error-Code": "RepoNotFound" if "/api/" in path else "EntryNotFound"})
        commit = path.partition("/resolve/")[2].partition("/")[0]
        return self._say(200, file.read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{_oid(file)}"'})

    def _say(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub, running, with a cache of this test's own."""
    server = FakeHub(tiny_model_dir("llama", tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("KVPATCH_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def refusal(name: str = NAME, **settings: object) -> str:
    with pytest.raises(ModelError) as error:
        load_model(name, device="cpu", **settings)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_is_fetched_at_its_commit_which_the_record_keeps(fake: FakeHub):
    model = kv.load(NAME, device="cpu")
    assert model.loaded.revision == COMMIT
    record = model_record(model)
    assert (record.name, record.revision) == (NAME, COMMIT)
    assert len(record.weights_sha256) == 64
    assert not any("onnx" in path for path in fake.asked if "resolve" in path)
    assert load_model(NAME, device="cpu", revision="v1").revision == OLDER


def test_a_commit_that_is_here_asks_no_hub_and_what_is_here_serves_without_one(fake: FakeHub):
    load_model(NAME, device="cpu")
    fake.asked.clear()
    assert load_model(NAME, device="cpu", revision=COMMIT).revision == COMMIT
    assert fake.asked == []
    fake.shutdown()
    fake.server_close()
    assert load_model(NAME, device="cpu").revision == COMMIT


def test_without_a_network_the_answer_comes_at_once_and_says_what_to_do(fake: FakeHub):
    fake.shutdown()
    fake.server_close()
    began = time.perf_counter()
    message = refusal()
    assert time.perf_counter() - began < 5
    assert message.startswith(f"{NAME} is not on this machine")
    assert f"{constants.ENDPOINT} can't be reached; connect" in message


def test_a_hub_that_hangs_is_waited_for_no_longer_than_the_deadline(fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "DEADLINE", 0.5)
    fake.delay = 3.0
    began = time.perf_counter()
    assert "can't be reached" in refusal()
    assert time.perf_counter() - began < 3


def test_offline_mode_is_named(fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal()


@pytest.mark.parametrize("where", ["/api/", "/resolve/"])
def test_a_gated_model_says_where_to_accept_its_terms_and_how_to_log_in(fake: FakeHub, where: str):
    fake.status[where] = (403, "GatedRepo")
    message = refusal()
    assert f"accept its terms at {constants.ENDPOINT}/{NAME}" in message
    assert "`hf auth login`" in message


def test_a_revision_or_a_model_that_there_is_not_is_told_as_such(fake: FakeHub):
    assert refusal(revision="v9") == f"{NAME} has no revision 'v9'; give a branch, a tag or a commit of it"
    assert refusal("lab/other").startswith("there is no model 'lab/other' at ")


def test_a_revision_is_of_a_hub_model_alone(fake: FakeHub):
    assert "a revision is of a hub model (owner/name)" in refusal(str(fake.folder), revision="v1")


def test_a_server_s_fault_is_named(fake: FakeHub):
    fake.status["/api/"] = (400, "")
    assert "answers with HTTP status 400" in refusal()


def test_names_of_hub_models_lead_to_their_repositories(fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    known = hub_models()
    assert not set(known) & set(named_models())
    assert known["llama-3-8b-instruct"].layers == {"early": 4, "late": 24}
    assert known["mistral-7b-instruct-v0.2"].layers["late"] == 22
    assert len(known) >= 14
    mistral = known["mistral-7b-instruct-v0.2"].repository
    assert refusal("mistral-7b-instruct-v0.2").startswith(f"there is no model {mistral!r}")


def test_the_hub_s_library_has_what_is_used_of_it():
    assert callable(huggingface_hub.snapshot_download)
    assert constants.HUGGINGFACE_CO_URL_TEMPLATE.endswith("/{repo_id}/resolve/{revision}/{filename}")


def test_a_repository_of_the_hub_is_told_from_what_is_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert hub_repository("owner/name-7b.v1") == "owner/name-7b.v1"
    assert hub_repository("llama-3-8b-instruct") == hub_models()["llama-3-8b-instruct"].repository
    (tmp_path / "owner" / "name-7b.v1").mkdir(parents=True)
    assert hub_repository("owner/name-7b.v1") is None
    for here in ("smollm2-135m", "./model", "/models/one", "~/model", "file.gguf", "owner/file.gguf", "a/b/c"):
        assert hub_repository(here) is None


def test_check_asks_the_hub_before_it_imports_torch(tmp_path: Path):
    """Importing torch takes seconds, in which a person without a network would wait for nothing."""
    told = (
        "import sys, kvpatch.models.hub as hub\n"
        "def ask(*_, **__):\n"
        "    print('torch' in sys.modules, flush=True)\n"
        "    raise SystemExit(3)\n"
        "hub.fetch_from_hub = ask\n"
        "sys.argv = ['kvpatch', 'check', 'owner/name']\n"
        "from kvpatch.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (3, "False"), done.stderr


@pytest.mark.parametrize("name", ["x" * 5000, "\u00e9" * 5000, "owner/" + "x" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have_is_looked_up_without_a_crash(name: str):
    assert hub_repository(name) in (None, name)
