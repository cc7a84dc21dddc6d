"""Our own addresses are asked past any proxy, and a check takes only the answer that it knows."""

import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import botocore.httpsession
import botocore.utils
import pytest
import requests

from jobs import demo
from pipeline import addresses, preflight, tracking


@contextmanager
def answering(status: int, body: str, host: str = "127.0.0.1") -> Iterator[str]:
    """A server that has one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((host, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A proxy for the web, which refuses whatever is not the web."""
    with answering(403, "The proxy does not lead there.") as address:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://{address}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "intranet.example")
        yield address


def test_own_addresses() -> None:
    for host in ("localhost", "LOCALHOST.", "127.0.0.1", "127.47.12.1", "::1", "[::1]", "10.0.0.7", "192.168.1.2"):
        assert addresses.is_own(host), host
    for host in ("mlflow", "head", "mlflow.gpt.svc", "x.svc.cluster.local", "ip-10-0-0-7.ec2.internal"):
        assert addresses.is_own(host), host
    for host in ("", "mlflow.example.com", "8.8.8.8", "localhost.evil.example", "bucket.s3.amazonaws.com"):
        assert not addresses.is_own(host), host


def test_what_the_user_has_spared_stays_spared() -> None:
    environment = {"NO_PROXY": "intranet.example, .corp", "MLFLOW_TRACKING_URI": "http://user:secret@10.1.2.3:5000/x"}
    addresses.go_direct("http://mlflow:5000", "https://mlflow.example.com", "sqlite:////x", environment=environment)
    addresses.go_direct("http://mlflow:5000", environment=environment)
    hosts = environment["NO_PROXY"].split(",")
    assert environment["no_proxy"] == environment["NO_PROXY"]
    assert hosts[:2] == ["intranet.example", ".corp"]
    assert {"localhost", "127.0.0.1", "::1", "mlflow", "10.1.2.3"} <= set(hosts)
    assert len(set(hosts)) == len(hosts)
    assert "secret" not in environment["NO_PROXY"]
    assert "mlflow.example.com" not in hosts


def test_libraries_go_direct(proxy: str) -> None:
    with answering(200, "here", host="127.47.12.1") as address:
        url = f"http://{address}"
        assert requests.get(url, timeout=10).status_code == 403, "the proxy stands between"
        addresses.go_direct(url)
        assert requests.get(url, timeout=10).text == "here"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.read() == b"here"
        assert botocore.utils.get_environ_proxies(url) == {}
        assert botocore.utils.get_environ_proxies("https://s3.amazonaws.com")


def test_mlflow_is_reached_past_the_proxy(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    body = '{"experiment": {"experiment_id": "7", "name": "tiny", "lifecycle_stage": "active"}}'
    with answering(200, body) as address:
        tracking.prepare_client(f"http://{address}")
        client = mlflow.MlflowClient(tracking_uri=f"http://{address}")
        assert client.get_experiment_by_name("tiny").experiment_id == "7"


def test_the_demo_asks_its_own_endpoint(proxy: str) -> None:
    with answering(200, "here") as address, demo.post(f"http://{address}/v1/completions", {}) as answer:
        assert answer.read() == b"here"


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, "Unauthorized: Missing authentication token", None),
        (403, "Forbidden: Invalid authentication token", None),
        (403, "The proxy does not lead there.", "is not Ray's dashboard"),
        (502, "Bad gateway", "is not Ray's dashboard"),
        (200, "[]", "can run code as you"),
    ],
)
def test_the_dashboard_is_closed_only_if_ray_says_so(
    proxy: str, monkeypatch: pytest.MonkeyPatch, status: int, body: str, says: str | None
) -> None:
    monkeypatch.setattr(preflight, "nodes", lambda: {"a": "head", "b": "worker"})
    with answering(status, body) as address:
        monkeypatch.setattr("ray._private.worker.get_dashboard_url", lambda: address)
        if says is None:
            assert "refuses strangers" in preflight.check_authentication()
            return
        with pytest.raises(preflight.Failed, match=says):
            preflight.check_authentication()


@pytest.mark.parametrize(
    ("status", "body", "alive"),
    [(200, "OK", True), (200, "<html>Somebody else</html>", False), (404, "OK", False), (503, "OK", False)],
)
def test_a_member_of_the_cluster_is_alive_only_in_its_own_words(
    proxy: str, status: int, body: str, alive: bool
) -> None:
    with answering(status, body) as address:
        assert addresses.answers(f"http://{address}/health", "OK") is alive


def test_nothing_answers_where_nothing_listens(proxy: str) -> None:
    assert not addresses.answers("http://127.0.0.1:9/health", "OK")
