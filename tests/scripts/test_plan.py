"""The screen and the JSON say the same, and a mistake ends in one sentence."""

import json

import pytest

from scripts import plan

SMALL = ["train_stage3", "train.batch_size=8", "train.images=1000000", "--ranks", "8"]


def test_the_figures_follow_from_each_other(tmp_path, capsys):
    file = tmp_path / "plan.json"
    plan.main([*SMALL, "--gpus", "2", "--gpu", "a100", "--mfu", "0.25", "--price", "2", "--json", str(file)])
    screen, found = capsys.readouterr().out, json.loads(file.read_text())
    work = found["work"]
    rate = 2 * 312e12 * 0.25 / (work["denoiser"] + work["text"])
    assert work["images_per_s"] == pytest.approx(rate)
    assert work["days"] == pytest.approx(1e6 / rate / 86400)
    assert work["cost"] == pytest.approx(2 * 2 * 1e6 / rate / 3600)
    assert found["total"] == pytest.approx(sum(found["memory"].values()))
    assert found["way"]["micro_batch"] == 4
    assert found["fits"][0]["way"]["checkpointing"] == "none"
    assert [shards["ranks"] for shards in found["shards"]] == [8]
    assert found["disk"]["latents"] == 8 * 16 * 16 * 2
    for words in ("stage3: PixArt", "2 A100s", "train.micro_batch=4", "optimizer state", "24 GB", "a GPU hour"):
        assert words in screen
    assert max(map(len, screen.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["train_stage9"],
            "train_stage9 is no training script; choose one of train_stage1, train_stage2, train_stage3",
        ),
        ([*SMALL, "--gpus", "3"], "train.batch_size=8 is the global batch and must be divisible by the 3 ranks"),
        ([*SMALL, "--ranks", "8 64"], "--ranks=8 64 must be whole numbers with commas between; choose 8,64,1024"),
        ([*SMALL, "train.batchsize=4"], "train.batchsize is not a key of stage3; did you mean train.batch_size?"),
        ([*SMALL, "--gpu", "tpu"], "--gpu=tpu is not known; choose one of h100"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words):
    with pytest.raises(SystemExit, match="plan.py: ") as ended:
        plan.main(arguments)
    assert words in str(ended.value)
    assert "\n" not in str(ended.value)
