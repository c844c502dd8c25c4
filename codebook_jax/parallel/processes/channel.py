"""A channel between the processes of a run that works while a collective hangs: TCP connections to
process 0, which sends every line to all.

A process that dies closes its connection, so all learn of it at once: `[process, "gone"]`.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
from typing import BinaryIO

from codebook_jax.errors import UserError

CONNECT_S = 10.0
COME_S = 60.0  # how far the last process may be behind the first


def open_channel(count: int, coordinator: str | None) -> str:
    """Starts sending what each of `count` processes says to all, in one order; for process 0, whose
    address HOST:PORT the others know as `coordinator` (None: by JAX's detection).

    Returns what `reach` needs: addresses, port, and a token without which nobody is let in.
    """
    ipv6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    server = socket.create_server(("", 0), family=family, backlog=count, dualstack_ipv6=ipv6)
    addresses = [coordinator.rpartition(":")[0].strip("[]")] if coordinator else []
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing, but chooses the address to send from
        addresses.append(probe.getsockname()[0])
    addresses += [socket.gethostname(), "127.0.0.1"]
    token = secrets.token_hex(16)
    threading.Thread(target=_serve, args=(server, count, token), daemon=True).start()
    return json.dumps([addresses, server.getsockname()[1], token])


def reach(offer: str, process: int) -> tuple[socket.socket, BinaryIO]:
    """A connection to send lines on and a file to read them from; raises UserError if no address of
    process 0 answers.
    """
    addresses, port, token = json.loads(offer)
    for address in addresses:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((address, port), timeout=CONNECT_S)
            connection.settimeout(COME_S)
            connection.sendall(f"{token} {process}\n".encode())
            lines = connection.makefile("rb")
            if lines.readline() == f"{token}\n".encode():
                connection.settimeout(None)
                return connection, lines
    raise UserError(
        f"process {process} on {socket.gethostname()} gets no answer from process 0 at "
        f"{', '.join(addresses)}, port {port}: open the ports between the hosts, or give "
        "--coordinator=HOST:PORT of an address that all can reach"
    )


def _serve(server: socket.socket, count: int, token: str) -> None:
    connections: dict[int, tuple[socket.socket, BinaryIO]] = {}
    while len(connections) < count:
        connection, _ = server.accept()
        connection.settimeout(CONNECT_S)
        lines = connection.makefile("rb")
        with contextlib.suppress(OSError):
            said, _, process = lines.readline(100).decode(errors="replace").partition(" ")
            if said == token:
                connection.settimeout(None)
                connections[int(process)] = connection, lines
            else:
                connection.shutdown(socket.SHUT_RDWR)
    lock = threading.Lock()

    def tell(line: bytes) -> None:
        with lock:
            for connection, _ in connections.values():
                with contextlib.suppress(OSError):  # that one is gone
                    connection.sendall(line)

    def forward(process: int, lines: BinaryIO) -> None:
        with contextlib.suppress(OSError):
            for line in lines:
                if line.endswith(b"\n"):
                    tell(line)
        tell(json.dumps([process, "gone"]).encode() + b"\n")

    tell(token.encode() + b"\n")
    for process, (_, lines) in connections.items():
        threading.Thread(target=forward, args=(process, lines), daemon=True).start()
