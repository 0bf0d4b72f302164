"""Stage 2: the trunk learns what words mean, at the large resolution (v prediction, zero terminal SNR).

    python scripts/prepare.py shapes --resolution 128
    python train_stage2.py init.from=outputs/stage1               # or: torchrun --standalone --nproc_per_node=N

A source of another architecture is carried over as reparameterize.py does.
Next: train_stage3.py init.from=outputs/stage2
"""

from configs.schema import main
from training.config import RunConfig
from training.run import run


@main("stage2")
def train(cfg: RunConfig) -> None:
    """Compose, check, train."""
    run(cfg)


if __name__ == "__main__":
    train()
