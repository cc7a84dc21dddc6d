"""S3 for the corpus's tests, through a server that speaks its protocol."""

from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer

from pipeline.artifacts import filesystem_of


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        filesystem_of("s3://tokens")[0].makedirs("tokens", exist_ok=True)  # servers of one process share what they hold
        yield "s3://tokens"
    server.stop()
