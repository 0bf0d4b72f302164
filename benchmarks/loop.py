"""What the loop itself costs a step: a linear layer of 16 x 16 and eight rows, so that all else is the loop.

    python benchmarks/loop.py        the table, and where our part of it goes

Ours does all that a run's step does beside drawing noise and calling the network: guard, sums of losses, clip, fused
AdamW, average, heartbeat, a look at the signals, progress, and a log line every hundred steps. The plain loop is
forward, backward and torch's AdamW. Accelerate is measured twice: as bare as the plain loop, and with the clip, the
average and the loss read for a log that diffusers' example scripts put into it. Lightning and Composer do what their
trainers do with a clip and neither logger nor checkpoint; they are left out where they are not installed. One thread,
because there is nothing to share; on a CPU processor time, and of the rounds the fastest, because the others measure
what else runs there.
"""

import contextlib
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Row, synchronise
from training.distributed import Ranks, session
from training.ema import EMA, EMAConfig
from training.guard import Guard, GuardConfig
from training.metrics import Journal, LoggerConfig, LossSums
from training.optim import OptimConfig, build_optimizer, gradient_norm, guarded_step, learning_rate

BATCH, WIDTH, STEPS, LOG_EVERY = 8, 16, 100, 100
Step = Callable[[], object]
Loop = Callable[[], float]  # milliseconds a step


class Ours:
    """A run's step. With `parts` set, the seconds since the last `lap` are kept under that part's name."""

    def __init__(self, ranks: Ranks, folder: Path):
        self.ranks, device = ranks, ranks.device
        self.net, self.x, self.y = trivial(device)
        self.config = OptimConfig()
        self.optimizer, self.ema = build_optimizer(self.net, self.config), EMA(self.net, EMAConfig())
        self.free = [*self.net.parameters()]
        self.sums, self.guard, self.times = LossSums(device), Guard(GuardConfig(), device), torch.rand(BATCH).to(device)
        self.journal = Journal(folder, LoggerConfig(), ranks, "loop", 10**9, 0)
        self.images_seen = self.step = 0
        self.parts: dict[str, list[float]] | None = None
        self._since = 0.0

    def __call__(self) -> None:
        if self.parts is not None:
            self._since = now()
        self.images_seen += BATCH
        losses = (self.net(self.x) - self.y).square().mean(1)
        loss = losses.mean()
        self.lap("forward")
        self.guard.watch(loss, last=True)
        self.lap("guard: watch")
        loss.backward()
        self.lap("backward")
        self.sums.add_losses(losses.detach(), losses.detach(), self.times)
        self.lap("sums of losses")
        norm = gradient_norm(self.free)
        self.lap("norm of the gradient")
        veto = self.guard.veto(norm)
        self.lap("guard: veto")
        lr = learning_rate(self.config, self.images_seen, 10**9)
        skipped = guarded_step(self.optimizer, self.free, lr, self.config.clip, veto, norm)
        self.lap("clip and AdamW")
        self.sums.add_step(*skipped)
        self.lap("sums of the step")
        self.ema.update(self.net, self.images_seen, BATCH)
        self.lap("average")
        self.step += 1
        self.ranks.advance(self.step)
        self.journal.advance(BATCH)
        self.ranks.leaving()
        self.lap("heartbeat, progress, signals")
        if self.step % LOG_EVERY == 0:
            about = {"images_per_s": 0.0, "tflops": 0.0, "peak_share": 0.0} | self.guard.check(Path())
            self.journal.write("train", self.images_seen, self.sums.read(self.ranks) | about)
        self.lap("log")

    def lap(self, part: str) -> None:
        """The last part ends here."""
        if self.parts is not None:
            end = now()
            self.parts.setdefault(part, []).append(end - self._since)
            self._since = end


def trivial(device: torch.device) -> tuple[nn.Linear, Tensor, Tensor]:
    """The network, what it is given and what it should answer."""
    torch.manual_seed(0)
    x, y = torch.randn(2, BATCH, WIDTH, device=device)
    return nn.Linear(WIDTH, WIDTH).to(device), x, y


def plain(device: torch.device) -> Step:
    """Forward, backward, AdamW."""
    net, x, y = trivial(device)
    optimizer = torch.optim.AdamW(net.parameters())

    def step() -> None:
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def accelerate(device: torch.device, full: bool) -> Step:
    """The same through Accelerate; `full` adds what diffusers' example scripts do in every step."""
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(cpu=device.type == "cpu")
    bare, x, y = trivial(device)
    net, optimizer = accelerator.prepare(bare, torch.optim.AdamW(bare.parameters()))
    average = EMAModel(bare.parameters(), decay=0.9999)

    def step() -> None:
        with accelerator.accumulate(net):
            loss = nn.functional.mse_loss(net(x), y)
            if full:
                gathered: Any = accelerator.gather(loss.repeat(BATCH))
                gathered.mean().item()
            accelerator.backward(loss)
            if full:
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if full:
            average.step(bare.parameters())
            loss.detach().item()  # for the progress bar

    return step


def lightning() -> Loop:
    """Lightning's Trainer, from its step 20 on."""
    pl: Any = import_module("lightning.pytorch")  # an optional import, out of a type checker's sight
    net, x, y = trivial(torch.device("cpu"))
    started: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
            started.append(now())
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    def loop() -> float:
        started.clear()
        trainer = pl.Trainer(
            max_steps=STEPS, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        )  # fmt: skip
        trainer.fit(Module(), batches(x, y))
        return milliseconds(started)

    return loop


def composer() -> Loop:
    """Composer's Trainer, from its step 20 on."""
    com: Any = import_module("composer")
    clip: Any = import_module("composer.algorithms").GradientClipping
    net, x, y = trivial(torch.device("cpu"))
    started: list[float] = []

    class Module(com.ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, batch: list[Tensor]) -> Tensor:
            started.append(now())
            return self.net(batch[0])

        def loss(self, outputs: Tensor, batch: list[Tensor]) -> Tensor:
            return nn.functional.mse_loss(outputs, batch[1])

    def loop() -> float:
        started.clear()
        module = Module()
        com.Trainer(
            model=module, optimizers=torch.optim.AdamW(module.parameters()), max_duration=f"{STEPS}ba",
            train_dataloader=batches(x, y), progress_bar=False,
            algorithms=[clip(clipping_type="norm", clipping_threshold=1.0)],
        ).fit()  # fmt: skip
        return milliseconds(started)

    return loop


def batches(x: Tensor, y: Tensor) -> Any:
    """The same batch `STEPS` times, as trainers want it."""
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*torch.stack((x, y))[:, None].expand(-1, STEPS, -1, -1)), batch_size=None
    )


def now() -> float:
    """Seconds of processor time; with an accelerator those of the clock, when all that was started is done."""
    if not torch.accelerator.is_available():
        return time.process_time()
    synchronise()
    return time.perf_counter()


def milliseconds(started: list[float]) -> float:
    """A step's, from the twentieth start to the last."""
    return 1e3 * (started[-1] - started[20]) / (len(started) - 21)


def repeated(step: Step) -> Loop:
    """`STEPS` of them."""

    def loop() -> float:
        start = now()
        for _ in range(STEPS):
            step()
        return 1e3 * (now() - start) / STEPS

    return loop


@contextmanager
def quiet() -> Iterator[None]:
    """One thread, and without what trainers say about themselves."""
    logging.disable(logging.WARNING)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        logging.disable(logging.NOTSET)


def loops(rounds: int = 20) -> tuple[list[Row], dict[str, float]]:
    """Rows that compare ours with each of the others, all in turns; and microseconds by part of ours."""
    with TemporaryDirectory() as name, session() as ranks, quiet():
        ours = Ours(ranks, Path(name))
        ways: dict[str, Loop] = {
            "ours": repeated(ours),
            "plain loop": repeated(plain(ranks.device)),
            "Accelerate, bare": repeated(accelerate(ranks.device, full=False)),
            "Accelerate, with clip, EMA, log": repeated(accelerate(ranks.device, full=True)),
        }
        ways |= {
            name: way() for name, way in (("Lightning", lightning), ("Composer", composer)) if find_spec(name.lower())
        }
        took: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way()
        for _ in range(rounds):
            for name, way in ways.items():
                took[name].append(way())
        ours.parts = {}
        for _ in range(10 * STEPS):
            ours()
        ours.journal.close()
    fastest = {name: min(times) for name, times in took.items()}
    rows = [
        Row(name=f"loop a step: {name}", ours=fastest["ours"], usual=usual)
        for name, usual in fastest.items()
        if name != "ours"
    ]
    return rows, {part: 1e6 * statistics.median(seconds) for part, seconds in ours.parts.items()}


def main() -> None:
    """Print both tables."""
    rows, parts = loops()
    print(f"{'':64}{'ours':>16}{'usual':>16}{'ratio':>9}")
    for row in rows:
        print(row)
    print()
    for part, microseconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"{part:48}{microseconds:>8.0f} us")


if __name__ == "__main__":
    main()
