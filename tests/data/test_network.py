"""Whether the hub can be reached, without contacting it."""

import socket

from codebook_jax.data import network


def test_the_hub_is_reachable_where_its_name_resolves_or_a_proxy_resolves_names(monkeypatch):
    def getaddrinfo(host, port):
        if host != "known.example":
            raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NO_PROXY", "localhost")  # says what is not for a proxy, and is none
    assert not network.hub_reachable()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert network.hub_reachable()
    monkeypatch.delenv("HTTPS_PROXY")
    monkeypatch.setenv("HF_ENDPOINT", "https://known.example/mirror")
    assert network.hub_reachable()
