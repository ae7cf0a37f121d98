"""An S3 server on this machine's loopback interface, for runs on object stores."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from kvpatch.store import buckets

SETTINGS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def s3() -> Iterator[Callable[[], str]]:
    """`s3()`: the address of a run directory that is not there yet. Processes that the test starts can use it too."""
    import logging

    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {**SETTINGS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="runs")
        buckets.bucket.cache_clear()
        count = itertools.count()
        yield lambda: f"s3://runs/{next(count)}"
        buckets.bucket.cache_clear()
    server.stop()


@pytest.fixture(autouse=True)
def own_cache_of_parts(request, tmp_path, monkeypatch):
    """No part of another test is found in the cache."""
    if "s3" in request.fixturenames:
        monkeypatch.setenv("KVPATCH_CACHE", str(tmp_path / "cache"))
