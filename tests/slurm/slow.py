"""python slow.py SCRIPT ...: as SCRIPT, but in a job's first start every step takes a while, so that tests can meet it.

It waits where nothing is computed: the bits stay the same.
"""

import os
import runpy
import sys
import time

from torch import nn

from training.ema import EMA

update = EMA.update


def wait(self: EMA, module: nn.Module, images_seen: int, batch_size: int) -> None:
    """The update, then the pause."""
    update(self, module, images_seen, batch_size)
    time.sleep(float(os.environ.get("SLOW", "1")))


if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    EMA.update = wait
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
