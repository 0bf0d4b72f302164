"""What a run tells the loggers beside metrics.jsonl."""

import sys
from types import SimpleNamespace

from training.run import run


def test_a_run_that_continues_is_one_run_to_wandb(config, monkeypatch):
    begun, logged = [], []

    def init(**options):
        begun.append(options)
        return SimpleNamespace(log=logged.append, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    overrides = ("logger=wandb", "logger.offline=true", "train.images=32", "evaluate.count=0")
    run(config("stage1", *overrides, "train.stop_at=16"))
    run(config("stage1", *overrides))
    assert begun[0] == begun[1]
    assert (begun[0]["mode"], begun[0]["resume"], begun[0]["name"]) == ("offline", "allow", "run")
    losses = [line["images"] for line in logged if "train/loss" in line]
    assert losses == [8, 16, 24, 32]
    run(config("stage1", *overrides, name="another"))
    assert begun[2]["id"] != begun[0]["id"]
