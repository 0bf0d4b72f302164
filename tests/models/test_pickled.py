"""A .ckpt file is data or it is refused; it never runs."""

import os

import pytest
import torch

from models.pickled import read_pickled, write_pickled


class Code:
    """What a pickle may hold: a call made when it is read."""

    def __init__(self, made: str):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (self.made,)


def test_a_round_trip_keeps_every_bit(tmp_path):
    tensors = {"a": torch.randn(3, 2).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    write_pickled(tensors, {"title": "A model"}, tmp_path / "file.ckpt")
    read, metadata = read_pickled(tmp_path / "file.ckpt")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert metadata == {"title": "A model"}
    assert os.listdir(tmp_path) == ["file.ckpt"]


@pytest.mark.parametrize("trainer", [{}, {"state_dict": 1, "global_step": 470000, "epoch": 3, "metadata": None}])
def test_counters_of_a_trainer_are_left(trainer, tmp_path):
    tensors = {"a": torch.ones(2)}
    torch.save(trainer | {"state_dict": tensors} if trainer else tensors, tmp_path / "file.ckpt")
    read, metadata = read_pickled(tmp_path / "file.ckpt")
    assert read.keys() == {"a"}
    assert metadata == {}


def test_code_is_refused_and_does_not_run(tmp_path):
    content = {"state_dict": {"a": torch.ones(2)}, "callbacks": Code(str(tmp_path / "ran"))}
    torch.save(content, tmp_path / "file.ckpt")
    with pytest.raises(
        ValueError, match=r"holds posix.mkdir, which is code; only data .* ask for the file as .safetensors"
    ):
        read_pickled(tmp_path / "file.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"state_dict": {"a": torch.ones(1), "b": 3}}, r"no tensors at b \(int\); give a checkpoint with a state_dict"),
        ({"model": {"a": torch.ones(1)}}, r"no tensors at model \(dict\)"),
        ({"state_dict": [1, 2]}, r"no tensors at state_dict \(list\)"),
        ([1, 2], r"no tensors at its top \(list\)"),
    ],
)
def test_other_data_is_refused(content, sentence, tmp_path):
    torch.save(content, tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match=sentence):
        read_pickled(tmp_path / "file.ckpt")


def test_what_is_no_file_of_tensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="file.ckpt does not exist"):
        read_pickled(tmp_path / "file.ckpt")
    (tmp_path / "file.ckpt").write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="is no file of tensors, or a damaged one"):
        read_pickled(tmp_path / "file.ckpt")
