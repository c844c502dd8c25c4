"""One of two processes that predict for examples together: `predicted_by_two.py TENSOR`.

Example 2 is broken on process 1, example 9 on process 0. Prints what came out and what was read.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
from small_gallery import predicted

from codebook_jax.parallel.processes import joining, peers

joining.join(joining.find(os.environ), timeout_s=60)
others = peers.connect(None)
broken = ((9,), (2,))[jax.process_index()]
found, read = predicted(broken, tensor=int(sys.argv[1]))
print(json.dumps({"results": found, "read": read}), flush=True)
others.leave()
