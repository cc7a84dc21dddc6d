"""Which addresses are our own: this machine's and the cluster's. They are never asked through a proxy.

    addresses.go_direct()                        # for libraries that read NO_PROXY: MLflow, S3, Ray's job client
    with addresses.open_own(url, timeout=10):    # for what we ask ourselves

A proxy that is set for the web (http_proxy) cannot reach a loopback address of this machine, and what it answers in
place of a service says nothing about the service.
"""

import ipaddress
import os
import urllib.request
from collections.abc import MutableMapping
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

# What libraries match by text; 127.0.0.0/8 is for those that know networks.
LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "127.0.0.0/8")
ADDRESS_VARIABLES = ("MLFLOW_TRACKING_URI", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "AWS_ENDPOINT_URL")
INTERNAL_SUFFIXES = (".svc", ".cluster.local", ".internal", ".local", ".localhost")


def is_own(host: str) -> bool:
    """Whether a host is this machine or one behind the same walls: a private address, or a name without a domain."""
    name = host.strip("[]").lower().rstrip(".")
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return bool(name) and ("." not in name or name.endswith(INTERNAL_SUFFIXES))
    return address.is_loopback or address.is_private or address.is_link_local


def go_direct(*urls: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Add loopback, the hosts of these URLs and those of the known variables to NO_PROXY, as far as they are our own.

    What the user has set stays.
    """
    hosts = list(LOOPBACK)
    for url in (*urls, *(environment.get(name, "") for name in ADDRESS_VARIABLES)):
        host = host_of(url)
        if host and is_own(host):
            hosts.append(host)
    given = ",".join(environment.get(name, "") for name in ("no_proxy", "NO_PROXY"))
    known = [each.strip() for each in given.split(",") if each.strip()]
    told = ",".join(dict.fromkeys([*known, *hosts]))
    environment["no_proxy"] = environment["NO_PROXY"] = told  # some read the one, some the other


def host_of(url: str) -> str:
    try:
        return urlsplit(url if "//" in url else f"//{url}").hostname or ""
    except ValueError:
        return ""


def answers(url: str, words: str) -> bool:
    """Whether one of our own services answers, and in words that are its own: another may listen on its port."""
    try:
        with open_own(url, timeout=5) as answer:
            return words in answer.read(100_000).decode(errors="replace")
    except (OSError, HTTPException):
        return False


def open_own(request: str | urllib.request.Request, timeout: float) -> Any:
    """Ask one of our own addresses, as `urllib.request.urlopen` does, but past any proxy."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout)
