"""What a run at low noise alone (`objective.range`) needs beside others: a base to draw with, and scores of its data.

    denoise(z, t) = the base's where t > range[1], the refiner's from there on

so grids and the exam of the run show what the refiner makes of another model's beginnings.
"""

from collections.abc import Sequence

import numpy as np

from data.loader import AESTHETIC
from data.reader import ShardReader
from inference.device import Precision
from inference.pipeline import Pipeline

LOOK = 1000  # records of each data set that are asked for a score


class Refined:
    """A base and its refiner, drawn with like a pipeline; between drawings the base waits in main memory."""

    def __init__(self, path: str, refiner: Pipeline):
        """Open the base; ValueError if `refiner` cannot go on with what it begins."""
        compute = Precision.fp32 if refiner.dtype.itemsize == 4 else Precision.bf16
        self.base, self.refiner = Pipeline.load(path, device="cpu", compute=compute), refiner
        check_base(path, self.base, refiner)
        self.base.dtype, self.base.device = refiner.dtype, refiner.device

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        *,
        class_ids: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> np.ndarray:
        """`Pipeline.generate` as the refiner's `sampler` says, handed over where its range ends."""
        how = self.refiner.description.sampler
        self._move(str(self.base.device))
        try:
            return self.base.generate(
                prompts, class_ids=class_ids, seeds=seeds, sampler=how, refiner=self.refiner, handover=None
            )
        finally:
            self._move("cpu")

    def _move(self, device: str) -> None:
        for part in filter(None, (self.base.denoiser, self.base.conditioner.text, self.base.autoencoder)):
            part.to(device)


def check_base(path: str, base: Pipeline, refiner: Pipeline) -> None:
    """Refuse a base that the refiner cannot go on from, in what the two pipelines say of themselves."""
    ours, theirs = refiner.description, base.description
    if theirs.objective.range[1] < 1:
        raise ValueError(
            f"sample.base={path} was itself trained at noise times up to {theirs.objective.range[1]:g} only, so it"
            " begins no picture; give a model trained at all times"
        )
    if base.autoencoder.digest != refiner.autoencoder.digest:
        raise ValueError(
            f"sample.base={path} draws latents of the autoencoder {theirs.vae.path}, but the run has vae.path="
            f"{ours.vae.path}; give a base of the same latents"
        )
    if theirs.resolution != ours.resolution:
        raise ValueError(
            f"sample.base={path} draws pictures of {theirs.resolution} pixels, but data.resolution={ours.resolution};"
            " give a base of that resolution"
        )
    reads = ["text" if one.conditioner.text else f"{one.conditioner.num_classes} classes" for one in (base, refiner)]
    if reads[0] != reads[1]:
        raise ValueError(
            f"sample.base={path} is conditioned on {reads[0]}, and the run's model on {reads[1]}; give a base that"
            " reads the same"
        )
    refiner.takes_over(base.times(ours.sampler), None)  # refuses a grid that the base has not, or of too few steps


def told_scores(sets: Sequence[ShardReader]) -> str:
    """A sentence on the aesthetic scores of the data, for a model that is told them."""
    looked, scores = 0, []
    for reader in sets:
        records, _ = reader.records(np.arange(min(len(reader), LOOK)))
        looked += len(records)
        scores += [record["aesthetic"] for record in records if "aesthetic" in record]
    if not scores:
        return (
            f"none of the first {looked:,} records has an aesthetic score, which the model reads: all count as"
            f" {AESTHETIC:g}, and it learns nothing of it; prepare the data from a table with a column aesthetic"
        )
    return (
        f"of the first {looked:,} records {len(scores):,} have an aesthetic score, from {min(scores):g} to"
        f" {max(scores):g}; without one a picture counts as {AESTHETIC:g}"
    )
