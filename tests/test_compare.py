"""The comparisons measure what they say: a teacher in new terms, lengths on a curve, commands that compose."""

import pytest
import torch

from benchmarks import compare
from benchmarks.distil import converted
from configs.schema import compose
from diffusion.objective import Objective, ObjectiveConfig, Prediction
from diffusion.schedule import Path
from diffusion.timesteps import TimeLaw


@pytest.mark.parametrize(("prediction", "path"), [(Prediction.flow, Path.linear), (Prediction.v, Path.vp)])
def test_a_teacher_that_is_right_gives_the_targets_of_the_data(prediction, path):
    torch.manual_seed(0)
    old = Objective(ObjectiveConfig())  # eps
    new = Objective(ObjectiveConfig(prediction=prediction, path=path, times=TimeLaw.uniform))
    x0, eps = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.05, 0.3, 0.6, 0.9, 0.95, 0.999], dtype=torch.float64)  # the last two beyond the table
    found = converted(lambda x, t, cond: eps, old, new, x0, eps, t, None)
    torch.testing.assert_close(found, new.target(x0, eps, t), atol=1e-9, rtol=1e-9)


def test_what_the_teacher_does_not_know_is_the_data_and_the_rest_is_the_teacher():
    torch.manual_seed(0)
    old = Objective(ObjectiveConfig())
    new = Objective(ObjectiveConfig(prediction=Prediction.flow, path=Path.linear, times=TimeLaw.uniform))
    x0, eps, wrong = torch.randn(3, 2, 3, 4, 4)
    t = torch.tensor([0.5, 0.99])
    found, data = converted(lambda x, t, cond: wrong, old, new, x0, eps, t, None), new.target(x0, eps, t)
    assert (found[0] - data[0]).abs().mean() > 0.1
    torch.testing.assert_close(found[1], data[1], atol=1e-5, rtol=1e-5)


def test_a_length_is_read_off_a_curve():
    curve = {0: 0.0, 1000: 0.2, 2000: 0.4, 4000: 0.3, 8000: 0.8}
    assert compare.equivalent(0.2, curve) == pytest.approx(1000)
    assert compare.equivalent(0.3, curve) == pytest.approx(1000 * 2**0.5)
    assert compare.equivalent(0.6, curve) == pytest.approx(4000 * 2**0.5)  # a curve that falls counts as flat
    assert compare.equivalent(0.1, curve) != compare.equivalent(0.1, curve)  # NaN: before the first
    assert compare.reached(curve, 0.1) == "under 1,000"
    assert compare.reached(curve, 0.9) == "over 8,000"


@pytest.mark.parametrize("name", compare.STUDIES)
def test_every_variant_is_a_command_that_composes(name, tmp_path):
    for training in compare.trainings(name, 1):
        script, *overrides = compare.command(training, tmp_path)[1:]
        assert compose(script.removeprefix("train_").removesuffix(".py"), overrides).name == training.name
