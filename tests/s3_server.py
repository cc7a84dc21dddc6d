"""A real HTTP server that speaks S3, and the environment that leads there."""

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Serve an empty S3 while it is entered; yields the environment, which is this process's meanwhile."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        # Servers of one process share what they hold.
        direct.open(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        yield environment
    server.stop()
