"""Whether the Hugging Face hub can be reached."""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request

HUB = "https://huggingface.co"  # unless HF_ENDPOINT names another


def hub_reachable() -> bool:
    """Whether the hub's name resolves: otherwise its library retries for 40 s, with warnings."""
    if {"http", "https", "all"} & urllib.request.getproxies().keys():
        return True  # a proxy resolves names itself
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or HUB)
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return False
    return True
