"""The floors: imports only go down, siblings never meet, and each library is known only where it belongs.

The table is CONTRIBUTING.md's. A file that breaks a rule is named with the import that breaks it.
"""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"models": 1, "diffusion": 1, "data": 1, "inference": 2, "prepare": 2, "training": 3, "configs": 4}
FLOORS |= {"scripts": 5, "app": 5} | {path.stem: 5 for path in ROOT.glob("*.py")}
HIGH = {"hydra", "omegaconf"}  # floors 4 and 5 only: below, configs are plain dataclasses
BANNED = {"pickle", "cloudpickle", "dill", "torchvision"}  # weights are safetensors; torchvision must fit torch exactly
# need not be installed
EXTRAS = {
    "accelerate", "datasets", "gradio", "matplotlib", "mkdocs", "onnx", "onnxruntime", "optuna", "starlette",
    "tensorboard", "tokenizers", "torchao", "transformer_engine", "wandb",
}  # fmt: skip

FILES = [*ROOT.glob("*.py"), *(file for name in FLOORS for file in sorted((ROOT / name).rglob("*.py")))]
SOURCES = pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())


def home(file: Path) -> str:
    """The folder on the table that a file belongs to, or the module itself at the top."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Top-level names of the modules a file imports, wherever in it, its own folder and Python's library left out."""
    found = {home(file)}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found - {home(file)} - (sys.stdlib_module_names - BANNED)


@SOURCES
def test_imports_only_go_down(file: Path):
    floor, found = FLOORS[home(file)], imports(file)
    assert not {name for name in found if FLOORS.get(name, 0) >= floor}
    assert not found & BANNED
    assert floor >= 4 or not found & HIGH
    assert home(file) != "diffusion" or found <= {"torch", "torchdiffeq"}


@SOURCES
def test_no_checkpoint_is_code(file: Path):
    """torch.load and torch.save pickle, and a pickle runs what it likes when read, unless read as data alone.

    One module knows them, for the .ckpt files that others made or need.
    """
    text = file.read_text()
    calls = re.findall(r"\btorch\.(load|save)\(([^)]*)", text)
    if file == ROOT / "models/pickled.py":
        calls = [call for call, arguments in calls if call == "load" and "weights_only=True" not in arguments]
    assert not calls
    assert not re.search(r"allow_pickle\s*=\s*True", text)


@pytest.mark.parametrize("folder", ["training", "diffusion", "models", "data"])
def test_one_loop_for_all_stages(folder: str):
    """What differs between stages is a value in a YAML, never an `if`: below floor 4 the word does not occur."""
    assert not [file for file in (ROOT / folder).rglob("*.py") if re.search("stage", file.read_text(), re.IGNORECASE)]


def test_every_folder_has_a_floor():
    sources = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("[a-z]*/**/*.py")}
    assert sources <= FLOORS.keys() | {"assets", "benchmarks", "outputs", "tests"}


def test_the_dependencies_are_the_imports():
    """pyproject's dependencies: each is imported, and each import is one of them or of an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    third_party = set().union(*map(imports, FILES)) - FLOORS.keys() - EXTRAS
    distributions = packages_distributions()
    assert {distributions[name][0].lower() for name in third_party} == declared
