"""Whether the hub can be reached, without contacting it."""

import socket

import pytest

from codebook_jax.data import network


@pytest.fixture
def names(monkeypatch):
    """Names that the resolver was asked for; it knows only `known.example`."""
    asked = []

    def getaddrinfo(host, port):
        asked.append(host)
        if host != "known.example":
            raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return asked


def test_the_hub_is_reachable_where_its_name_resolves_or_a_proxy_resolves_names(names, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "localhost")  # says what is not for a proxy, and is none
    assert not network.hub_reachable() and names == ["huggingface.co"]
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert network.hub_reachable() and names == ["huggingface.co"]
    monkeypatch.delenv("HTTPS_PROXY")
    monkeypatch.setenv("HF_ENDPOINT", "https://known.example/mirror")
    assert network.hub_reachable()
