"""A channel between the processes of a run that works while a collective hangs: TCP connections to
process 0, which sends every message to all.

A process that dies closes its connection, so all learn of it at once: `(process, "gone")`.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
from multiprocessing.connection import Connection, wait

from codebook_jax.errors import UserError

ANSWER_S = 10.0


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


def reach(offer: str, process: int) -> Connection:
    """A connection to process 0; raises UserError if none of its addresses answers."""
    addresses, port, token = json.loads(offer)
    for address in addresses:
        with contextlib.suppress(OSError, EOFError):
            reached = socket.create_connection((address, port), timeout=ANSWER_S)
            reached.settimeout(None)
            connection = Connection(reached.detach())
            connection.send_bytes(f"{token} {process}".encode())
            if connection.poll(6 * ANSWER_S) and connection.recv_bytes(100) == token.encode():
                return connection
    raise UserError(
        f"process {process} on {socket.gethostname()} gets no answer from process 0 at "
        f"{', '.join(addresses)}, port {port}: open the ports between the hosts, or give "
        "--coordinator=HOST:PORT of an address that all can reach"
    )


def _serve(server: socket.socket, count: int, token: str) -> None:
    processes: dict[Connection, int] = {}
    while len(processes) < count:
        connection = Connection(server.accept()[0].detach())
        with contextlib.suppress(OSError, EOFError, ValueError):
            said = connection.recv_bytes(100).decode() if connection.poll(ANSWER_S) else ""
            if said.startswith(token):
                processes[connection] = int(said.removeprefix(token))
                connection.send_bytes(token.encode())
                continue
        connection.close()
    while processes:
        for connection in wait(list(processes)):
            try:
                message = connection.recv()
            except (OSError, EOFError):
                message = processes.pop(connection), "gone"
            for other in processes:
                with contextlib.suppress(OSError):  # it is gone too
                    other.send(message)
