"""A process, started by tests, that owns a folder until its standard input ends: `owner.py FOLDER`.

The environment variables HOST, BOOT and PID_NAMESPACE name its machine, kernel and container.
"""

import os
import platform
import sys
from pathlib import Path

from codebook_jax.errors import UserError
from codebook_jax.run import ownership

BEAT_S, WATCH_S = 0.2, 2.0


def main():
    ownership.BEAT_S, ownership.WATCH_S = BEAT_S, WATCH_S
    if host := os.environ.get("HOST"):
        platform.node = lambda: host
    if boot := os.environ.get("BOOT"):
        this_process = ownership._this_process
        ownership._this_process = lambda: this_process()._replace(boot=boot)
    if namespace := os.environ.get("PID_NAMESPACE"):
        os.readlink = lambda path: namespace
    try:
        with ownership.owned(Path(sys.argv[1])):
            print("owns", flush=True)
            sys.stdin.read()
    except UserError as refusal:
        print(f"refused: {refusal}", flush=True)


if __name__ == "__main__":
    main()
