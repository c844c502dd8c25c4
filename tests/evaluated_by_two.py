"""One of two processes that evaluate a gallery together: `evaluated_by_two.py FOLDER TENSOR AFTER`.

Image 20 is broken on process 1, image 21 on process 0. Both processes are gone AFTER so many calls
(0: never). Prints the results and what was read.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
from small_gallery import Numbers, evaluate

from codebook_jax.evaluation import stage
from codebook_jax.parallel.processes import joining, peers

joining.join(joining.find(os.environ), timeout_s=60)
others = peers.connect(None)
stage.RECORD_EVERY_S = 0.0
folder, tensor, after = Path(sys.argv[1]), *map(int, sys.argv[2:])
calls = 0


def progress(name: str, done: int, total: int) -> None:
    global calls
    calls += 1
    if calls == after:
        others.exchange("both are here", None)
        os._exit(9)


source = Numbers(37, broken=((21,), (20,))[jax.process_index()])
cache = stage.Cache(folder / str(jax.process_index()), "one")
results = evaluate(source, books=stage.Bookkeeping(progress, cache), tensor=tensor)
print(json.dumps({"results": results, "read": sorted(source.read)}), flush=True)
others.leave()
