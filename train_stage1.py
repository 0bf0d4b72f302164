"""Stage 1: a class-conditioned model learns what pictures look like, at the small resolution (eps prediction).

    python scripts/prepare.py shapes --resolution 64 --two 0
    python train_stage1.py                                        # or: torchrun --standalone --nproc_per_node=N
    python train_stage1.py data=... model=... objective=... optim=...

The same command continues a run that stopped. Next: train_stage2.py init.from=outputs/stage1
"""

from configs.schema import main
from training.config import RunConfig
from training.run import run


@main("stage1")
def train(cfg: RunConfig) -> None:
    """Compose, check, train."""
    run(cfg)


if __name__ == "__main__":
    train()
