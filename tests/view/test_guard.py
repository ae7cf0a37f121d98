"""The view answers this machine only, to who has the token, and gives nothing but what belongs to a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from kvpatch.view.server import View

HOME = "/a-token/"


def test_a_request_with_token_and_own_host_is_answered(client: TestClient) -> None:
    for host in ("127.0.0.1:8000", "localhost:8000", "localhost", "[::1]:8000"):
        assert client.get(HOME, headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "127.0.0.1:8000@evil.example", "", "localhost:x"],
)
def test_a_foreign_host_is_refused(client: TestClient, host: str) -> None:
    assert client.get(HOME, headers={"host": host}).status_code == 421


@pytest.mark.parametrize("path", ["/", "/run/first/", "/a-toke/", "/a-token2/", "/static/view.js", "//a-token2/"])
def test_a_request_without_its_token_is_refused(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_only_reading_is_allowed(client: TestClient, method: str) -> None:
    assert client.request(method, HOME).status_code == 405


def test_without_a_token_none_is_asked(directory: Path) -> None:
    with TestClient(View([directory]).app(None), base_url="http://127.0.0.1") as open_client:
        assert open_client.get("/").status_code == 200
        assert open_client.get("/", headers={"host": "evil.example"}).status_code == 421


@pytest.mark.parametrize(
    "path",
    [
        "../../../etc/passwd",
        "..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "trials/../../secret.txt",
        "trials/..%2f..%2fsecret.txt",
        "link.parquet",
        "trials/link.parquet",
        ".lock",
        "trials",
        "run.json%00",
    ],
)
def test_a_path_outside_the_run_is_refused(client: TestClient, directory: Path, path: str) -> None:
    secret = directory.parent / "secret.txt"
    secret.write_text("secret")
    for link in (directory / "link.parquet", directory / "trials" / "link.parquet"):
        if not link.is_symlink():
            os.symlink(secret, link)
    answer = client.get(f"/a-token/run/first/file/{path}")
    assert answer.status_code in (403, 404)
    assert "secret" not in answer.text and "root:" not in answer.text


def test_the_runs_own_files_are_given(client: TestClient, directory: Path) -> None:
    part = next(p.name for p in (directory / "trials").iterdir() if not p.is_symlink())
    for name in ("run.json", f"trials/{part}"):
        answer = client.get(f"/a-token/run/first/file/{name}")
        assert answer.content == (directory / name).read_bytes()


def test_pages_keep_to_themselves(client: TestClient) -> None:
    headers = client.get(HOME).headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe-inline" not in headers["content-security-policy"].split("style-src")[0]
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"
    assert client.get("/a-token/run/none/").headers["content-security-policy"]


def test_unknown_runs_trials_and_files_are_not_found(client: TestClient) -> None:
    for path in ("run/none/", "run/first/trial/none", "static/none.js", "run/..%2f/"):
        assert client.get(f"/a-token/{path}").status_code == 404
