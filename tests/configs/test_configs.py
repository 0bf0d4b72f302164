"""Every YAML composes, every key is known, and bad input gets one sentence with the way out."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.schema import CONFIGS, compose, compose_raw, main

STAGES = ("stage1", "stage2", "stage3")
EXPERIMENTS = sorted(
    p.relative_to(CONFIGS / "experiment").with_suffix("").as_posix() for p in CONFIGS.glob("experiment/**/*.yaml")
)
MODELS = sorted(path.stem for path in CONFIGS.glob("model/*.yaml"))


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_composes_alone(stage):
    cfg = compose(stage, [])
    assert cfg.name == stage
    assert cfg.folder == Path("outputs") / stage


@pytest.mark.parametrize("group", ["objective", "sampler", "optim", "vae", "text", "logger", "model"])
def test_each_choice_of_each_group_composes(group):
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        compose("stage3", [f"{group}={path.stem}"])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_each_experiment_composes_with_its_stage(experiment):
    for stage in [stage for stage in STAGES if stage in experiment] or STAGES:  # named by no stage: for every one
        data = compose_raw(stage, [f"experiment={experiment}"]).data
        compose(stage, [f"experiment={experiment}", "init.from=any", *["data.path=any"] * (not data.mix)])


@pytest.mark.parametrize("name", MODELS)
def test_each_model_builds_on_the_meta_device(name):
    with torch.device("meta"):
        built = compose("train", ["name=meta", f"model={name}"]).model.build()
    assert sum(p.numel() for p in built.parameters()) > 1e5


def test_no_config_folder_is_ignored_by_git():
    ignored = (CONFIGS.parent / ".gitignore").read_text().split()
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    assert not {pattern.strip("/") for pattern in ignored if not pattern.startswith("/")} & (groups - {"__pycache__"})


BAD = {
    "train.imagse=3": "train.imagse is not a key of stage1; did you mean train.images?",
    "smapler=euler": "smapler is not a key of stage1; did you mean sampler?",
    "+model.foo=1": "+foo adds a key that no config has; write it without +",
    "+init.form=x": "init.form is not a key; choose one of init.from",
    "objective.prediction=epps": "objective.prediction=epps is not a choice; choose one of eps, x0, v, flow",
    "sampler=foo": "sampler=foo is not a choice; choose one of ddim, ddpm, dopri5, dpmpp_2m, ",
    "train.images=abc": "train.images=abc does not fit: Value 'abc' of type 'str' could not be converted to Integer",
    "train.batch_size=0": "must be positive; choose larger ones",
    "model.hidden=162": "model.hidden=162 is not a multiple of model.heads=5",
    "data=shards": "data.path=None and data.mix={}: give the folder of one data set",
    "data.path=/nowhere": "data.path=/nowhere does not exist; prepare it with `python scripts/prepare.py shapes`",
    "objective.zero_terminal=true": "objective.prediction=eps says nothing of x0 at t=1",
    "align=shapes model=unet_tiny": "align=shapes sets model.align_dim, which a UNetConfig has not; choose another",
    "init.mode=best": "init.mode=best is not a choice; choose one of anchor, mean",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_input_gets_one_sentence_and_builds_nothing(override, monkeypatch, tmp_path):
    from training.run import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_stage1.py", *override.split()])
    monkeypatch.setattr("models.autoencoder.AutoencoderConfig.build", lambda self: pytest.fail("built something"))
    with pytest.raises(SystemExit) as exit_:
        main("stage1")(run)()
    message = str(exit_.value)
    assert message.startswith("error: ")
    assert BAD[override] in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_multirun_under_torchrun_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_stage1.py", "-m", "seed=1,2"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="without torchrun"):
        main("stage1")(lambda cfg: None)()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("hydra/launcher=slurm", "hydra/launcher=slurm needs a plugin: pip install hydra-submitit-launcher"),
        (
            "hydra/sweeper=optuna",
            "hydra/sweeper=optuna is not among what is tested; search with python scripts/search.py",
        ),
        ("hydra/launcher=optuna", "hydra/launcher=optuna is not a choice; choose basic, or install the plugin"),
        ("hydra/launcher=cloud", "hydra/launcher=cloud is not a choice; choose basic, or install the plugin"),
    ],
)
def test_a_plugin_that_is_not_installed_is_named_with_its_command(override, sentence, tmp_path):
    script = (
        "import sys, types; sys.modules['hydra_plugins'] = empty = types.ModuleType('hydra_plugins')\n"
        "empty.__path__, sys.argv = [], ['train_stage1.py', '-m', sys.argv[1]]\n"
        "from configs.schema import main; main('stage1')(lambda cfg: None)()"
    )
    command, root = [sys.executable, "-c", script, override], CONFIGS.parent
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {sentence}"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_cannot_be_written_is_one_sentence_and_other_errors_of_the_system_are_not(number, monkeypatch):
    def refuse(cfg: object) -> None:
        raise OSError(number, "No", "outputs/run/config.yaml")

    monkeypatch.setattr(sys, "argv", ["train_stage1.py"])
    with pytest.raises(SystemExit, match="error: outputs/run/config.yaml cannot be written: No; whatever was saved is"):
        main("stage1")(refuse)()

    def missing(cfg: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No", "a bug")

    with pytest.raises(FileNotFoundError):
        main("stage1")(missing)()
