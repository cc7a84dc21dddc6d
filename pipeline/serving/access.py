"""Who may ask, and how much: bearer keys with limits per minute. Only hashes of keys are ever kept.

Keys come from the environment, never from a preset:
    SERVE_API_KEYS       keys separated by commas; they have no limits
    SERVE_API_KEYS_FILE  a YAML list of {name, sha256, requests_per_minute, tokens_per_minute}, limits optional;
                         `printf %s "$KEY" | sha256sum` prints the hash of a key
"""

import hashlib
import hmac
import ipaddress
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.serving.errors import ApiError

KEYS_VARIABLE = "SERVE_API_KEYS"
KEYS_FILE_VARIABLE = "SERVE_API_KEYS_FILE"


@dataclass(frozen=True)
class ApiKey:
    """One key, known by its hash."""

    name: str
    sha256: str
    requests_per_minute: int = 0  # 0: no limit
    tokens_per_minute: int = 0


def read_keys(environment: Mapping[str, str] = os.environ) -> tuple[ApiKey, ...]:
    """Read the keys that the environment names; raises `ValueError` without ever showing one.

    Several keys may have one name, such as a person's; each has limits of its own.
    """
    plain = [key.strip() for key in environment.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    keys = [ApiKey(f"key-{index + 1}", hash_key(key)) for index, key in enumerate(plain)]
    path = environment.get(KEYS_FILE_VARIABLE)
    if path:
        keys += _read_key_file(Path(path))
    found: dict[str, ApiKey] = {}
    for key in keys:
        first = found.setdefault(key.sha256, key)
        if replace(first, name=key.name) != key:
            raise ValueError(f"The keys {first.name!r} and {key.name!r} are one key with two limits; remove one.")
    return tuple(found.values())


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).hexdigest()


def _read_key_file(path: Path) -> list[ApiKey]:
    where = f"The key file {str(path)!r}"
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"{where} is not valid YAML.") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{where} must hold a list with at least one key.")
    return [_parse_key(row, f"{where}, entry {number}") for number, row in enumerate(rows, 1)]


def _parse_key(row: Any, where: str) -> ApiKey:
    if not isinstance(row, dict) or not {"name", "sha256"} <= row.keys():
        raise ValueError(f"{where} needs a name and a sha256.")
    unknown = row.keys() - {"name", "sha256", "requests_per_minute", "tokens_per_minute"}
    if unknown:
        raise ValueError(f"{where} has an unknown field {sorted(map(str, unknown))[0]!r}.")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", str(row["sha256"])):
        raise ValueError(f"{where}: sha256 must be 64 hex digits.")
    limits = [row.get("requests_per_minute", 0), row.get("tokens_per_minute", 0)]
    if not all(isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0 for limit in limits):
        raise ValueError(f"{where}: limits must be whole numbers, 0 for none.")
    return ApiKey(str(row["name"]), str(row["sha256"]).lower(), *limits)


class Allowance:
    """A token bucket: it gains `per_minute` a minute and holds at most that much; 0 means no limit."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = float(per_minute)
        self._level = self.per_minute
        self._filled = time.monotonic()

    def seconds_until(self, amount: float) -> float:
        """How long until `amount` may be taken; 0 for now. More than the bucket holds waits for a full one."""
        if not self.per_minute:
            return 0.0
        now = time.monotonic()
        self._level = min(max(1.0, self.per_minute), self._level + (now - self._filled) * self.per_minute / 60)
        self._filled = now
        missing = min(amount, max(1.0, self.per_minute)) - self._level
        return max(0.0, missing * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        """Take `amount`, into debt if need be: what was generated is generated."""
        if self.per_minute:
            self._level -= amount


class Access:
    """Decides on each request, in one replica."""

    def __init__(self, keys: tuple[ApiKey, ...], *, open_access: bool) -> None:
        self._keys = keys
        self._open = open_access
        self._requests = {key.sha256: Allowance(key.requests_per_minute) for key in keys}
        self._tokens = {key.sha256: Allowance(key.tokens_per_minute) for key in keys}

    def share_among(self, replicas: int) -> None:
        """Take this replica's even part of every limit: requests reach the replicas evenly."""
        for key in self._keys:
            self._requests[key.sha256].per_minute = key.requests_per_minute / replicas
            self._tokens[key.sha256].per_minute = key.tokens_per_minute / replicas

    def admit(self, authorization: str | None, client: str | None, host: str | None) -> ApiKey | None:
        """Return the key of a request; raises `ApiError` 401 or 403 where it may not ask."""
        if not self._keys:
            if not self._open and not is_local_host(client):
                raise ApiError(
                    403,
                    "This server has no API keys and so answers its own machine only; set SERVE_API_KEYS.",
                    code="no_keys_configured",
                )
            if not self._open and not is_local_name(host):
                raise ApiError(
                    403,
                    f"This server has no API keys and so answers to its own machine's names only, such as localhost;"
                    f" {(host or '')[:100]!r} is none of them. Use localhost, or set SERVE_API_KEYS.",
                    code="no_keys_configured",
                )
            return None
        scheme, _, presented = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not presented.strip():
            raise ApiError(401, "Send an API key as 'Authorization: Bearer KEY'.", code="invalid_api_key")
        digest = hash_key(presented.strip())
        # All are compared, each in constant time: how long it takes says nothing about any key.
        matches = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        if not matches:
            raise ApiError(401, "This API key is not known here.", code="invalid_api_key")
        return matches[0]

    def start(self, key: ApiKey | None, tokens: int) -> None:
        """Count one request that may take `tokens`; raises `ApiError` 429 over the key's limits."""
        if key is None:
            return
        waits = {
            "requests": self._requests[key.sha256].seconds_until(1),
            "tokens": self._tokens[key.sha256].seconds_until(tokens),
        }
        kind, wait = max(waits.items(), key=lambda item: item[1])
        if wait > 0:
            limit = key.requests_per_minute if kind == "requests" else key.tokens_per_minute
            raise ApiError(
                429,
                f"This key may use {limit} {kind} per minute; try again in {math.ceil(wait)} s.",
                code="rate_limit_exceeded",
                retry_after=math.ceil(wait),
            )
        self._requests[key.sha256].take(1)
        self._tokens[key.sha256].take(tokens)

    def settle(self, key: ApiKey | None, reserved: int, used: int) -> None:
        """Give back the tokens that a request reserved and did not use."""
        if key is not None:
            self._tokens[key.sha256].take(used - reserved)


def is_local_host(address: str | None) -> bool:
    """Whether an address is this machine's own loopback."""
    try:
        found = ipaddress.ip_address((address or "").strip("[]"))
    except ValueError:
        # Names know no case, and end in the root's dot where somebody wrote it.
        return (address or "").lower().removesuffix(".") == "localhost"
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def is_local_name(host: str | None) -> bool:
    """Whether a Host header names this machine: another name means that a web page elsewhere is asking.

    0.0.0.0 and [::] lead to this machine too, for a client that is on it.
    """
    if not host:
        return True
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    return name in ("0.0.0.0", "[::]") or is_local_host(name)
