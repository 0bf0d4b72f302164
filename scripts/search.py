"""Searches settings by trial: Optuna proposes, each trial is a training of its own.

    python scripts/search.py train_stage1 name=search/lr train.images=20000 evaluate.count=252 \\
        'optim.lr=tag(log, interval(1e-4, 1e-2))' 'optim.weight_decay=interval(0, 0.3)' optim=adamw,muon --trials 30

What is searched is written as Hydra writes sweeps: interval(a, b), range(a, b, step), choice(a, b) or a,b, and
tag(log, ...) where ratios matter; all else is passed on. The same command again goes on: trials that were killed
continue from their checkpoints. Several of these commands at once, on one machine or on many that share the folder,
work on one search. outputs/NAME has a folder a trial, and the search itself in search.jsonl.
"""

import argparse
import json
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from training.config import RunConfig

ROOT = Path(__file__).parents[1]
AGAIN = 85  # a training's exit code that asks to be started again, training.restart's
SPOILT = 3  # trials that end with an error before one has ended well: then the command is wrong, not the values


def main(arguments: list[str] | None = None) -> None:
    """Try until `--trials` have ended, then print the best; a user's error ends it with one sentence."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="search.py", description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", help="train_stage1, train_stage2 or train_stage3")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as the training script takes them, or sweeps"
    )
    parser.add_argument("--trials", type=int, default=30, help="how many, over all who search (default 30)")
    parser.add_argument(
        "--metric", default="loss_unweighted", help="of evaluation.json or the last line of training"
        " (default loss_unweighted); what is no loss is to be large",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of what is proposed (default 0)")
    options = parser.parse_intermixed_args(arguments)
    try:
        search(options)
    except (ValueError, OSError) as error:
        sys.exit(f"search.py: {error}")


def search(options: argparse.Namespace) -> None:
    """Compose once, so that a wrong command ends here; then try."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    except ImportError as error:
        raise ValueError("searching needs optuna, which is not installed: pip install 'optuna>=4'") from error
    script = f"{options.script.removesuffix('.py')}.py"
    if not (ROOT / script).is_file():
        known = ", ".join(sorted(path.stem for path in ROOT.glob("train_*.py")))
        raise ValueError(f"{options.script} is no training script; choose one of {known}")
    space, fixed = split(options.overrides)
    cfg = composed(script, [*fixed, *(f"{key}={first(values)}" for key, values in space.items())])
    folder = ROOT / cfg.outputs / cfg.name
    folder.mkdir(parents=True, exist_ok=True)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = str(folder / "search.jsonl")
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(journal, JournalFileOpenLock(journal))),
        study_name=cfg.name,
        load_if_exists=True,
        direction="minimize" if "loss" in options.metric else "maximize",
        sampler=optuna.samplers.TPESampler(seed=options.seed, multivariate=True, constant_liar=True),
    )
    check_same(study, space, options.metric)
    done = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # of one who was killed, or still works
        attempt(study, trial.number, trial.params, script, fixed, cfg, options.metric)
    while len(study.get_trials(states=done, deepcopy=False)) < options.trials:
        trial = study.ask(space)
        attempt(study, trial.number, trial.params, script, fixed, cfg, options.metric)
    report(study, script, fixed)


def attempt(
    study: "Study", number: int, params: dict[str, Any], script: str, fixed: list[str], cfg: "RunConfig", metric: str
) -> None:
    """Train one trial to its end and tell what came out, unless another process is at it."""
    from optuna.trial import TrialState

    from models.folder import hold

    name, given = f"{cfg.name}/{number}", [f"{key}={value}" for key, value in params.items()]
    folder = ROOT / cfg.outputs / name
    with ExitStack() as held:
        try:
            held.enter_context(hold(folder / "trial"))  # the training itself holds the folder
        except ValueError:
            return
        print(f"trial {number}: {' '.join(given)}", flush=True)
        code, last = trained([sys.executable, script, *others(fixed), *given, f"name={name}"], folder / "log.txt")
        if code == 0:
            value = measured(folder, metric)
            study.tell(number, value)
            print(f"trial {number}: {metric} {value:.5g}", flush=True)
            return
        study.tell(number, state=TrialState.FAIL)
        print(f"trial {number} ended with {code}: {last}", flush=True)
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        if states.count(TrialState.FAIL) >= SPOILT and TrialState.COMPLETE not in states:
            raise ValueError(f"{SPOILT} trials ended with errors before one ended well, the last with: {last}")


def trained(command: list[str], path: Path) -> tuple[int, str]:
    """A training's exit code and its last line; whoever stops the search stops it too, and both can be continued."""
    with path.open("a") as log:
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        asked: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, _: (asked.append(number), child.send_signal(number)))
        code = child.wait()
    if asked:
        sys.exit(AGAIN if code == AGAIN else 128 + asked[0])
    return code, path.read_text().strip().rpartition("\n")[2]


def split(overrides: list[str]) -> tuple[dict[str, "BaseDistribution"], list[str]]:
    """What is searched, by key, and the overrides that are the same for all."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ValueType

    parser, space, fixed = OverridesParser.create(), {}, []
    for override in overrides:
        parsed = parser.parse_override(override)
        if not parsed.is_sweep_override():
            fixed.append(override)
            continue
        if parsed.value_type is ValueType.GLOB_CHOICE_SWEEP:
            raise ValueError(f"{override} is no range to search; give interval(a, b), range(a, b) or choice(a, b)")
        space[parsed.get_key_element()] = distribution(parsed.value(), override)
    if not space:
        raise ValueError("nothing is searched; give a range such as 'optim.lr=tag(log, interval(1e-4, 1e-2))'")
    return space, fixed


def distribution(sweep: Any, override: str) -> "BaseDistribution":
    """Optuna's name for a sweep of Hydra's."""
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    log = "log" in sweep.tags
    try:
        if isinstance(sweep, ChoiceSweep):
            return CategoricalDistribution([str(choice) for choice in sweep.list])
        if isinstance(sweep, IntervalSweep):
            return FloatDistribution(float(sweep.start or 0), float(sweep.end or 0), log=log)
        whole = float(sweep.start).is_integer() and float(sweep.step).is_integer()
        if not whole:
            return FloatDistribution(sweep.start, sweep.stop - sweep.step, step=sweep.step)
        return IntDistribution(int(sweep.start), int(sweep.stop) - 1, log=log, step=1 if log else int(sweep.step))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{override} is no range to search: {error}; give interval(a, b) with a below b") from error


def first(values: "BaseDistribution") -> Any:
    """One value of a distribution, to compose with."""
    choices = getattr(values, "choices", None)
    return choices[0] if choices else getattr(values, "low")  # noqa: B009 - floats and whole numbers have it


def composed(script: str, overrides: list[str]) -> "RunConfig":
    """The run's config, or ValueError in one sentence."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from configs.schema import compose, explain

    stage = script.removeprefix("train_").removesuffix(".py")
    try:
        return compose(stage, overrides)
    except (ValueError, OmegaConfBaseException, HydraException) as error:
        raise ValueError(explain(error, stage)) from error


def check_same(study: "Study", space: dict[str, "BaseDistribution"], metric: str) -> None:
    """Refuse to go on with a search of other things."""
    asked = {"metric": metric, "space": sorted(space)}
    known = study.user_attrs.get("asked", asked)
    if known != asked:
        raise ValueError(
            f"{study.study_name} searches {', '.join(known['space'])} by {known['metric']}, and was now asked for"
            f" {', '.join(asked['space'])} by {metric}; give another name=..."
        )
    study.set_user_attr("asked", asked)


def others(fixed: list[str]) -> list[str]:
    """The overrides without the name, which each trial has its own of."""
    return [override for override in fixed if not override.startswith("name=")]


def measured(folder: Path, metric: str) -> float | None:
    """`metric` of the exam, or of the last line of training; parts of names are joined by dots."""
    found: Any = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found |= record if record["kind"] in ("train", "eval") else {}
    for part in metric.split("."):
        if not isinstance(found, dict) or part not in found:
            raise ValueError(
                f"--metric {metric} is in neither evaluation.json nor metrics.jsonl of {folder}; choose one of"
                f" {', '.join(sorted(key for key, value in found.items() if isinstance(value, float)))}"
            )
        found = found[part]
    return float(found)


def report(study: "Study", script: str, fixed: list[str]) -> None:
    """The ten best trials, and the command of the first."""
    from optuna.trial import TrialState
    from rich.console import Console
    from rich.table import Table

    trials = study.get_trials(states=[TrialState.COMPLETE], deepcopy=False)
    best = sorted(trials, key=lambda trial: trial.value or 0.0, reverse=study.direction.name == "MAXIMIZE")[:10]
    table = Table("trial", study.user_attrs["asked"]["metric"], *sorted(trials[0].params), box=None)
    for trial in best:
        table.add_row(str(trial.number), f"{trial.value:.5g}", *(shown(trial, key) for key in sorted(trial.params)))
    Console().print(table)
    given = [f"{key}={value}" for key, value in best[0].params.items()]
    print(f"the best: python {script} {' '.join([*others(fixed), *given])} name=...")


def shown(trial: "FrozenTrial", key: str) -> str:
    """A parameter of a trial, short."""
    value = trial.params[key]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # run as a file, Python looks beside it instead
    main()
