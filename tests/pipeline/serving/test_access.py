"""Who may ask, and how much: keys, their limits, and the names of this machine."""

import hashlib
import time
from pathlib import Path

import openai
import pytest

from pipeline.serving.access import Allowance, ApiKey, is_local_host, is_local_name, read_keys
from tests.pipeline.serving.asking import CLIENT, LONG, Start, post


def test_keys_from_environment_and_file(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    file = tmp_path / "keys.yaml"
    file.write_text(f"- {{name: alice, sha256: {digest}, requests_per_minute: 5}}\n")
    keys = read_keys({"SERVE_API_KEYS": "one, two", "SERVE_API_KEYS_FILE": str(file)})
    assert [key.name for key in keys] == ["key-1", "key-2", "alice"]
    assert keys[2] == ApiKey("alice", digest, 5, 0)
    assert "one" not in repr(keys)
    assert read_keys({}) == ()
    for content, says in [
        ("{", "YAML"),
        ("[]", "at least one"),
        ("- {name: a}", "sha256"),
        ("- {name: a, sha256: x}", "64"),
    ]:
        file.write_text(content)
        with pytest.raises(ValueError, match=says):
            read_keys({"SERVE_API_KEYS_FILE": str(file)})


def test_keys_decide_who_may_ask(start: Start) -> None:
    keys = (ApiKey("a", hashlib.sha256(b"first").hexdigest()), ApiKey("b", hashlib.sha256(b"second").hexdigest(), 2))
    server = start(keys=keys)
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first"}):
        answer = post(server, {"prompt": "x"}, headers=header)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    broken = CLIENT.post(f"{server.url}/v1/completions", content=b"{")
    assert broken.status_code == 401  # nothing is parsed for a stranger
    assert post(server, {"prompt": "x"}, headers={"Authorization": "Bearer first"}).status_code == 200
    statuses = [post(server, {"prompt": "x"}, headers={"Authorization": "Bearer second"}) for _ in range(3)]
    assert [answer.status_code for answer in statuses] == [200, 200, 429]
    assert int(statuses[2].headers["retry-after"]) >= 1
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    assert CLIENT.get(f"{server.url}/readyz").status_code == 200


def test_tokens_per_minute_count_what_was_used(start: Start) -> None:
    server = start(keys=(ApiKey("a", hashlib.sha256(b"k").hexdigest(), 0, 100),))
    header = {"Authorization": "Bearer k"}
    assert post(server, LONG | {"max_tokens": 90}, headers=header).status_code == 200
    refused = post(server, LONG | {"max_tokens": 90}, headers=header)
    assert refused.status_code == 429
    assert "tokens per minute" in refused.json()["error"]["message"]


def test_allowance_fills_again() -> None:
    allowance = Allowance(600)
    allowance.take(600)
    assert 0.05 < allowance.seconds_until(1) <= 0.1
    time.sleep(0.11)
    assert allowance.seconds_until(1) == 0
    assert Allowance(0).seconds_until(1e9) == 0


def test_names_of_this_machine() -> None:
    own = ["localhost", "localhost:80", "LOCALHOST:80", "localhost.", "localhost.:80", "127.0.0.1:1", "127.1.2.3"]
    assert all(map(is_local_name, [*own, "[::1]:80", "[::ffff:127.0.0.1]", "0.0.0.0:8000", "[::]:8000", None]))
    others = ["evil.example", "localhost.evil.example:80", "10.0.0.1", "127.evil", "localhost..", "[::2]", "0.0.0.1"]
    assert not any(map(is_local_name, others))
    assert not is_local_host("0.0.0.0"), "listening there is not listening on this machine alone"


def test_a_name_that_is_not_this_machines_is_named(start: Start) -> None:
    """What a browser sends that a page elsewhere has led here (DNS rebinding)."""
    server = start()
    for host in ("LOCALHOST", "localhost.", "0.0.0.0"):
        assert post(server, {"prompt": "x"}, headers={"Host": host}).status_code == 200
    answer = post(server, {"prompt": "x"}, headers={"Host": "evil.example"})
    assert answer.status_code == 403
    assert "'evil.example' is none of them" in answer.json()["error"]["message"]


def test_keys_of_one_name_have_limits_of_their_own(start: Start) -> None:
    keys = (
        ApiKey("alice", hashlib.sha256(b"work").hexdigest(), 1),
        ApiKey("alice", hashlib.sha256(b"home").hexdigest(), 2),
    )
    server = start(keys=keys)
    server.access.share_among(1)

    def statuses(key: str, times: int) -> list[int]:
        header = {"Authorization": f"Bearer {key}"}
        return [post(server, {"prompt": "x", "max_tokens": 1}, headers=header).status_code for _ in range(times)]

    assert statuses("work", 2) == [200, 429]
    assert statuses("home", 3) == [200, 200, 429]


def test_one_key_with_two_limits_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"- {{name: bob, sha256: {hashlib.sha256(b'secret').hexdigest()}, requests_per_minute: 5}}\n")
    with pytest.raises(ValueError, match="'key-1' and 'bob' are one key"):
        read_keys({"SERVE_API_KEYS": "secret", "SERVE_API_KEYS_FILE": str(file)})
    assert len(read_keys({"SERVE_API_KEYS": "secret, secret"})) == 1
