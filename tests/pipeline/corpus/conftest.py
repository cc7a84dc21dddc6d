from collections.abc import Iterator

import pytest

from pipeline.artifacts import filesystem_of
from tests.s3_server import s3_server


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket on S3."""
    with s3_server():
        filesystem_of("s3://tokens")[0].mkdir("tokens")
        yield "s3://tokens"
