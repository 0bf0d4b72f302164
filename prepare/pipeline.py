"""The preparation of a data set, top to bottom: each step is a folder, made of the folders before it.

    tables of URLs     metadata -> filter -> download -> images/ ─┐
    pictures as they lie (tars, folders, tables with images) ─────┴─> dedup -> caption -> encode -> RESOLUTION/

A step that is finished is left alone, one that was killed goes on with the parts it lacks, and one whose settings or
input changed is refused. `report.json` tells of all rows what became of them: what one step keeps the next is given.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from models.autoencoder import AutoencoderConfig
from models.text import TextConfig
from prepare.caption import CaptionConfig, caption
from prepare.dedup import DedupConfig, dedup
from prepare.download import DownloadConfig, download
from prepare.encode import EncodeConfig, encode
from prepare.filter import FilterConfig, filter_rows
from prepare.metadata import MetadataConfig, metadata
from prepare.parts import Tally, finished, write_json
from prepare.sources import Source, SourceConfig, open_source

Tick = Callable[[int], None]
Watch = Callable[[str, int | None], AbstractContextManager[Tick | None]]


class Step(Enum):
    """What may be done, in this order."""

    metadata = "metadata"
    filter = "filter"
    download = "download"
    dedup = "dedup"
    caption = "caption"
    encode = "encode"


@dataclass(slots=True, kw_only=True)
class PrepareConfig:
    """A whole preparation: what is read, what is done to it, and the folder that holds the results.

    steps: with download, source.paths are tables of URLs, else pictures; then filter is done while encoding, by what
    the source says of each. processes: of this machine, for the steps that compute.
    """

    out: str  # the folder of all that is made
    steps: list[Step]
    processes: int = 1
    source: SourceConfig = field(default_factory=SourceConfig)
    metadata: MetadataConfig = field(default_factory=MetadataConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    vae: AutoencoderConfig
    text: TextConfig | None = None

    def __post_init__(self):
        names = [step.value for step in self.steps]
        if names != [step.value for step in Step if step in self.steps] or not names:
            raise ValueError(
                f"steps={names} must name each step once, in the order {', '.join(step.value for step in Step)}; leave"
                " out what is not wanted"
            )
        if (Step.metadata in self.steps) != (Step.download in self.steps):
            raise ValueError(
                f"steps={names}: metadata reads tables of URLs for download to fetch; name both, or neither for"
                " pictures that are there"
            )
        if self.processes < 1:
            raise ValueError(f"processes={self.processes} must be at least 1; choose the number of cores")
        if not self.source.paths:
            raise ValueError(
                "source.paths is empty; name a table of URLs, or with pipeline=images pictures that are there:"
                " source.paths=[PATH]"
            )

    @property
    def folder(self) -> Path:
        """The folder of this data set."""
        return Path(self.out)


def unwatched(name: str, total: int | None) -> AbstractContextManager[Tick | None]:
    """No progress bar."""
    return nullcontext()


def prepare(config: PrepareConfig, only: Step | None = None, watch: Watch = unwatched) -> dict[str, Any]:
    """Do all steps of `config`, or one of them, and return the report, which is also written to `report.json`.

    `watch(title, rows)` opens a progress bar. Raises ValueError at the first step that cannot go on.
    """
    if only and only not in config.steps:
        names = ", ".join(step.value for step in config.steps)
        raise ValueError(f"{only.value} is not one of steps=[{names}]; add it, or choose another pipeline=")
    for name, step in folders(config):
        if only in (None, step):
            title = f"encode {name}" if step is Step.encode else step.value
            with watch(title, _expected(config, name)) as tick:
                make(config, name, step, tick)
    about = report(config)
    if int(os.environ.get("RANK", 0)) == 0:
        write_json(config.folder / "report.json", about)
    return about


def folders(config: PrepareConfig) -> list[tuple[str, Step]]:
    """The folder that each step makes, in order; encode makes one a resolution."""
    named = {Step.download: ["images"], Step.caption: ["captions"], Step.encode: map(str, config.encode.resolutions)}
    if Step.metadata not in config.steps:
        named[Step.filter] = []  # done while encoding
    return [(name, step) for step in config.steps for name in named.get(step, [step.value])]


def make(config: PrepareConfig, name: str, step: Step, tick: Tick | None = None) -> Tally:
    """Do one step into its folder; ValueError if one before it is not finished."""
    folder, steps, processes = config.folder, config.steps, config.processes
    match step:
        case Step.metadata:
            return metadata(config.metadata, config.source.paths, folder / name, tick=tick)
        case Step.filter:
            return filter_rows(config.filter, folder / "metadata", folder / name, processes=processes, tick=tick)
        case Step.download:
            before = folder / ("filter" if Step.filter in steps else "metadata")
            return download(config.download, before, folder / name, processes=processes, tick=tick)
        case Step.dedup:
            return dedup(config.dedup, pictures(config), folder / name, processes=processes, tick=tick)
    left_out = folder / "dedup" if Step.dedup in steps else None
    if step is Step.caption:
        return caption(config.caption, pictures(config), folder / name, left_out=left_out, tick=tick)
    return encode(
        config.encode,
        pictures(config),
        folder / name,
        resolution=int(name),
        vae=config.vae,
        text=config.text,
        filters=config.filter if Step.filter in steps and Step.metadata not in steps else None,
        left_out=left_out,
        captions=folder / "captions" if Step.caption in steps else None,
        processes=processes,
        tick=tick,
    )


def pictures(config: PrepareConfig) -> Source:
    """The pictures that dedup, caption and encode read: those downloaded, or those that are there."""
    if Step.download not in config.steps:
        return open_source(config.source)
    images = config.folder / "images"
    finished(images)
    return open_source(SourceConfig(paths=[str(images / "*.tar")]))


def _expected(config: PrepareConfig, name: str) -> int | None:
    """How many rows a step will be given: those that the step before it kept, if there was one."""
    names = [folder for folder, step in folders(config) if step is not Step.encode or folder == name]
    place = names.index(name)
    return Tally(**finished(config.folder / names[place - 1])["tally"]).kept if place else None


def report(config: PrepareConfig) -> dict[str, Any]:
    """What became of all rows in the steps that are finished, and whether the accounts balance.

    Raises ValueError if a step was given other rows than the one before it kept.
    """
    steps = []
    for name, _ in folders(config):
        try:
            tally = finished(config.folder / name)["tally"]
        except ValueError:
            continue
        given, kept, dropped = tally["given"], tally["kept"], sum(tally["dropped"].values())
        expected = _expected(config, name)
        if given != kept + dropped or expected not in (None, given):
            raise ValueError(
                f"{config.folder / name} was given {given:,} rows, kept {kept:,} and dropped {dropped:,}, but the step"
                f" before kept {expected:,}; delete {config.folder / name} and run it again"
            )
        steps.append({"step": name} | tally)
    return {"out": config.out, "source": config.source.paths, "steps": steps}
