"""Whether the Hugging Face hub can be reached."""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request

HUB = "https://huggingface.co"  # unless HF_ENDPOINT names another


def hub_reachable() -> bool:
    """Whether the Hugging Face hub's name resolves. Its library would need 40 s of retries, each
    with a warning.

    Behind a proxy, which resolves names itself, the answer is always yes.
    """
    proxies = urllib.request.getproxies()
    if any(proxies.get(scheme) for scheme in ("http", "https", "all")):
        return True
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or HUB)
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return False
    return True
