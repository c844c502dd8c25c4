"""Whether the Hugging Face hub can be reached."""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request

HUB = "https://huggingface.co"  # unless HF_ENDPOINT names another


def hub_reachable() -> bool:
    """Whether the hub's name resolves: its library would retry for 40 s, each time with a warning.

    Behind a proxy, which resolves names itself, the answer is always yes.
    """
    if {"http", "https", "all"} & urllib.request.getproxies().keys():
        return True
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or HUB)
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return False
    return True
