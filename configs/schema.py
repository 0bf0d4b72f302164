"""The one place that meets Hydra: it knows which dataclass each config group is checked against.

Each YAML begins with `- /schema/<group>/<class>@_here_`, so choosing a file chooses the class, and a misspelt key or a
value of the wrong type is refused while composing. `main` turns the result into plain dataclasses at once; nothing
below ever sees a DictConfig.
"""

import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.loader import DataConfig
from diffusion.objective import ObjectiveConfig
from inference.description import SamplerConfig
from models.autoencoder import AutoencoderConfig
from models.ccdit import CCDiTConfig
from models.mmdit import MMDiTConfig
from models.pixart import PixArtConfig
from models.text import TextConfig
from models.unet import UNetConfig
from training.checkpoint import FULL
from training.config import RunConfig
from training.metrics import LoggerConfig
from training.optim import OptimConfig
from training.restart import AGAIN

if TYPE_CHECKING:
    from prepare.pipeline import PrepareConfig

CONFIGS = Path(__file__).parent
UNWRITABLE = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM)
PLUGINS = {
    "launcher/submitit": "hydra/launcher=slurm needs a plugin: pip install hydra-submitit-launcher",
    "sweeper/optuna": "hydra/sweeper=optuna is not among what is tested; search with python scripts/search.py",
}
SCHEMAS = {
    "data/shards": DataConfig,
    "model/ccdit": CCDiTConfig,
    "model/pixart": PixArtConfig,
    "model/mmdit": MMDiTConfig,
    "model/unet": UNetConfig,
    "objective/objective": ObjectiveConfig,
    "sampler/sampler": SamplerConfig,
    "optim/adamw": OptimConfig,
    "vae/kl": AutoencoderConfig,
    "text/encoders": TextConfig,
    "logger/logger": LoggerConfig,
    "run": RunConfig,
}


def register() -> None:
    """Put the schemas where the YAMLs look for them."""
    store = ConfigStore.instance()
    for path, node in SCHEMAS.items():
        *group, name = f"schema/{path}".split("/")
        store.store(group="/".join(group), name=name, node=structured(node))


def structured(node: type) -> DictConfig:
    """The schema of a dataclass; its fields that are dicts, of captions or data sets by name, take any key."""
    schema = OmegaConf.structured(node)
    _open_dicts(schema)
    return schema


def _open_dicts(schema: DictConfig) -> None:
    if OmegaConf.get_type(schema) is dict:
        OmegaConf.set_struct(schema, False)
    elif not schema._is_none() and not schema._is_missing():
        for key in schema:
            if isinstance(below := schema._get_node(key), DictConfig):
                _open_dicts(below)


def main(config_name: str) -> Callable[[Callable[[RunConfig], Any]], Callable[[], None]]:
    """Decorate a function of a `RunConfig` into a command that Hydra composes from the command line."""

    def decorate(task: Callable[[RunConfig], Any]) -> Callable[[], None]:
        register()

        def command() -> None:
            alone: list[DictConfig] = []

            def composed(cfg: DictConfig) -> None:
                if HydraConfig.get().mode is RunMode.MULTIRUN:  # one folder a job, named by what the job overrides
                    run_config = to_run_config(cfg)
                    run_config.name = f"{run_config.name}/{HydraConfig.get().job.override_dirname}"
                    sweep(task, run_config)
                else:
                    alone.append(cfg)  # runs below, out of Hydra's hands: it would print about every error

            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us, and we print one sentence of them
            try:
                if {"-m", "--multirun"} & set(sys.argv) and "WORLD_SIZE" in os.environ:
                    raise ValueError(
                        "-m (multirun) under torchrun would start each job of a sweep on every rank; run `python ... -m"
                        " hydra/launcher=...` without torchrun, or start torchrun once a job"
                    )
                hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(composed)()
                for cfg in alone:
                    task(to_run_config(cfg))
            except (ValueError, FloatingPointError, OSError, OmegaConfBaseException, HydraException) as error:
                strange = getattr(error, "errno", None) not in (None, *UNWRITABLE)
                if os.environ.get("TRIPTYCH_TRACEBACK") or strange:
                    raise
                sys.exit(f"error: {explain(error, config_name)}")

        return command

    return decorate


def sweep(task: Callable[[RunConfig], Any], cfg: RunConfig) -> None:
    """One job of a multirun; one that SLURM started makes ranks of its tasks, and asks to be started again if it is to.

    submitit queues a job again upon its own signal.
    """
    slurm = "SUBMITIT_EXECUTOR" in os.environ
    if slurm and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ["SLURM_PROCID"], os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ["LOCAL_WORLD_SIZE"] = re.split(r"[(,]", os.environ["SLURM_STEP_TASKS_PER_NODE"])[0]
    try:
        task(cfg)
    except SystemExit as ended:
        if slurm and ended.code == AGAIN:
            signal.raise_signal(signal.SIGUSR2)
        raise


def to_run_config(cfg: DictConfig) -> RunConfig:
    """The plain dataclasses of a run, whose own checks have run."""
    made = to_config(cfg)
    assert isinstance(made, RunConfig)
    return made


def to_config(cfg: DictConfig) -> Any:
    """The dataclass of a config in which nothing is missing."""
    if missing := OmegaConf.missing_keys(cfg):
        raise ValueError(f"{', '.join(sorted(missing))} must be given; add {min(missing)}=... to the command")
    try:
        return OmegaConf.to_object(cfg)
    except AttributeError as error:  # a key added with +, which a dataclass with slots has no room for
        key = str(error).rpartition("'")[0].rpartition("'")[2]
        raise ValueError(
            f"+{key} adds a key that no config has; write it without + and spelt as in training/config.py"
        ) from error


def explain(error: BaseException, config_name: str) -> str:
    """One sentence on what the user wrote and what is possible instead."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    for cause in causes:
        if type(cause) in (ValueError, FloatingPointError):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno in UNWRITABLE:
            return (
                f"{cause.filename or 'a file'} cannot be written: {cause.strerror}; whatever was saved is whole: make"
                " room, or give the right to write, and start the same command again"
            )
    text = " ".join(" ".join(str(cause).split()) for cause in causes)
    if missed := re.search(r"Could not override '([^']+)'", text):
        known = keys(compose_raw(config_name, []))
        near = difflib.get_close_matches(missed[1], known, n=1)
        advice = (
            f"did you mean {near[0]}?"
            if near
            else f"choose one of {', '.join(sorted({k.split('.')[0] for k in known}))}"
        )
        return f"{missed[1]} is not a key of {config_name}; {advice}"
    if wrong := re.search(r"Error merging override (\S+).*Invalid value .*expected one of \[([^\]]+)\]", text):
        return f"{wrong[1]} is not a choice; choose one of {wrong[2]}"
    if wrong := re.search(r"Error merging override (\S+) (.*?)(?: full_key|$)", text):
        return f"{wrong[1]} does not fit: {wrong[2]}"
    if absent := re.search(r"Could not (?:find|load) 'hydra/(launcher|sweeper)/([a-z]+)[^']*'", text):
        kind, name = absent.groups()
        other = f"hydra/{kind}={name} is not a choice; choose basic, or install the plugin that has it"
        return PLUGINS.get(f"{kind}/{name}", other)
    if wrong := re.search(r"Could not find '(\w+)/([^']+)' Available options in '\w+': (.*?) Config search", text):
        return f"{wrong[1]}={wrong[2]} is not a choice; choose one of {', '.join(wrong[3].split())}"
    if wrong := re.search(r"In '(\w+)/([^']+)': .* Key '\w+' not in '(\w+)' full_key: ((\w+)\S+)", text):
        group, name, found, key, part = wrong.groups()
        return f"{group}={name} sets {key}, which a {found} has not; choose another {part} or another {group}"
    if wrong := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{wrong[1]} has no value; give {wrong[1]}=..."
    return text


def keys(cfg: DictConfig) -> list[str]:
    """Every dotted key of a config."""
    found = []
    for key in cfg:
        below = None if OmegaConf.is_missing(cfg, key) else cfg._get_node(key)
        found.append(str(key))
        if isinstance(below, DictConfig) and not below._is_none():
            found += [f"{key}.{deeper}" for deeper in keys(below)]
    return found


def compose_raw(config_name: str, overrides: list[str]) -> DictConfig:
    """What Hydra makes of a config name and overrides, from code."""
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return hydra.compose(config_name=config_name, overrides=overrides)


def compose_preparation(overrides: list[str]) -> "PrepareConfig":
    """A preparation's config; its schema is registered here alone, so that training does not import its libraries."""
    from prepare.pipeline import PrepareConfig

    ConfigStore.instance().store(group="schema", name="prepare", node=structured(PrepareConfig))
    made = to_config(compose_raw("prepare", overrides))
    assert isinstance(made, PrepareConfig)
    return made


def compose(config_name: str, overrides: list[str]) -> RunConfig:
    """A whole run's config, as the command line would compose it."""
    return to_run_config(compose_raw(config_name, overrides))
