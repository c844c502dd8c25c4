"""The recipe of the paper in every size: --config=configs/paper.py[:tiny|small|base|large|huge].

As configs/base.py, but that `tiny` has none of its `IN_MINUTES`. Above `tiny` the two are the same.
"""

import runpy
from pathlib import Path

get_config = runpy.run_path(str(Path(__file__).with_name("base.py")))["paper"]
