"""Stage 3: the model learns straight paths (flow matching with shifted logit-normal times).

    python train_stage3.py init.from=outputs/stage2               # or: torchrun --standalone --nproc_per_node=N

Then: python scripts/sample.py --checkpoint outputs/stage3 --prompt "a small red circle above a large blue star"
"""

from configs.schema import main
from training.config import RunConfig
from training.run import run


@main("stage3")
def train(cfg: RunConfig) -> None:
    """Compose, check, train."""
    run(cfg)


if __name__ == "__main__":
    train()
