"""Prepare from S3 to S3: through errors that pass, past one that does not, to the same shards as on a disk."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.test_prepare import REPOSITORY, make_texts, write_jsonl

# In a process of its own: the workers take the server's address from the environment that Ray was started in.
PROGRAM = """
import json, os, sys, urllib.request
from pathlib import Path
import ray
from tests.pipeline.test_prepare import configure, digests, run
ray.init(address="local", num_cpus=2, log_to_driver=False, configure_logging=False, include_dashboard=False)
folder = Path(sys.argv[1])
storage = str(folder / "storage")
expected = digests(run(configure(storage, folder / "corpus"), storage)[1])
config = configure("s3://bucket/storage", "s3://bucket/corpus")
try:
    run(config, "s3://bucket/storage")
    first = "no error"
except ValueError as error:
    first = str(error)
urllib.request.urlopen(os.environ["AWS_ENDPOINT_URL"] + "/mend")
output, manifest = run(config, "s3://bucket/storage")
names = sorted(output.list_files())
print(json.dumps({"first": first, "digests": digests(manifest), "expected": expected, "names": names,
                  "files": sorted(manifest.files)}))
"""


class Troubled:
    """S3 in front of which every ninth request fails once, and writing is refused after some shards."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application = application
        self.requests: Counter[str] = Counter()
        self.listings: list[list[str]] = [[], []]  # that were answered: before it was mended, and after
        self.shards_written = 0
        self.is_mended = False
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path, method, query = environ["PATH_INFO"], environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")
        with self.lock:
            if path == "/mend":
                self.is_mended = True
                start_response("200 OK", [])
                return [b""]
            self.requests[method] += 1
            if sum(self.requests.values()) % 9 == 0:
                start_response("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
            if method == "GET" and "list-type" in query and "max-keys=1&" not in query:  # that asks if there is any
                self.listings[self.is_mended].append(query)
            if method == "PUT" and "/train/" in path and not self.is_mended:
                self.shards_written += 1
                if self.shards_written > 3:
                    start_response("403 Forbidden", [("Content-Type", "application/xml")])
                    return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        return self.application(environ, start_response)


@pytest.fixture
def server() -> Iterator[tuple[str, Troubled]]:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    troubled = Troubled(DomainDispatcherApplication(create_backend_app))
    running = make_server("127.0.0.1", 0, troubled, threaded=True)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", troubled
    running.shutdown()


@pytest.mark.slow
def test_s3_errors_are_survived_or_told_and_the_shards_are_the_same(
    tmp_path: Path, server: tuple[str, Troubled]
) -> None:
    import boto3

    address, troubled = server
    texts = make_texts(500)
    (tmp_path / "corpus").mkdir()
    paths = [write_jsonl(tmp_path / "corpus" / f"{half}.jsonl", texts[half * 250 :][:250]) for half in (0, 1)]
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    client = boto3.client(
        "s3", endpoint_url=address, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
    )
    client.create_bucket(Bucket="bucket")
    for path in paths:
        client.put_object(Bucket="bucket", Key=f"corpus/{path.name}", Body=path.read_bytes())

    environment = os.environ | credentials | {"AWS_ENDPOINT_URL": address, "PYTHONPATH": str(REPOSITORY)}
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    told = json.loads(finished.stdout.splitlines()[-1])
    assert "run again to go on" in told["first"]
    assert "denied" in told["first"].lower()
    assert told["digests"] == told["expected"]
    assert told["names"] == sorted([*told["files"], "manifest.json"])
    # One listing of the corpus and one of the output for each run; the last is this test's own.
    assert [len(queries) for queries in troubled.listings] == [2, 3], troubled.listings
