"""The loader: a batch depends on the seed and the position alone, whoever reads it and wherever it began."""

import threading
from dataclasses import fields
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from data import draws
from data.loader import Batch, Batches, DataConfig, open_shards
from data.reader import ShardReader
from data.shards import ShardWriter
from data.texts import TextLayout
from tests.data.conftest import CAPTIONS, COUNT, latent, write

CONFIG = DataConfig(path="set", resolution=32, text_states=True)


@pytest.fixture(scope="module")
def reader(folder):
    return ShardReader(folder)


def read(reader, *, start=0, stop=96, batch_size=12, micro_batch=3, config=CONFIG, seed=1, **processes):
    sizes = {"batch_size": batch_size, "micro_batch": micro_batch}
    return list(Batches(config, [reader], seed, start=start, stop=stop, **sizes, **processes).loader())


def joined(batches) -> dict:
    """All micro-batches as one, sorted by position."""
    batches = [batch.to("cpu") for batch in batches]
    for batch in batches:  # what padding holds is nobody's business
        if batch.text is not None:
            batch.text = batch.text.masked_fill(~batch.text_mask[..., None], 0)
    turn = torch.cat([batch.positions for batch in batches]).argsort()
    all_of = {}
    for field in fields(Batch):
        parts = [getattr(batch, field.name) for batch in batches]
        if field.name == "damaged" or parts[0] is None:
            assert not any(parts)
            continue
        if field.name == "captions":
            captions = [caption for part in parts for caption in part]
            all_of["captions"] = [captions[i] for i in turn]
        else:
            rows = [row for part in parts for row in part]  # the texts of two batches may differ in length
            all_of[field.name] = (pad_sequence(rows, batch_first=True) if rows[0].ndim else torch.stack(rows))[turn]
    return all_of


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == b[name] if name == "captions" else torch.equal(a[name], b[name]), name


def shown(batches) -> np.ndarray:
    """Records shown, read off the captions."""
    return np.array([int(caption.split(",")[0]) for caption in joined(batches)["captions"]])


def test_batches_hold_the_records_of_their_positions(reader):
    for batch in read(reader):
        assert batch.latents.shape == (3, 2, 4, 4)
        assert batch.latents.dtype == torch.float16
        batch = batch.to("cpu")
        assert batch.latents.dtype == torch.float32
        assert batch.valid.all()
        assert batch.class_id.dtype == batch.positions.dtype == torch.int64
        assert (batch.text.dtype, batch.text_mask.dtype, batch.pooled.dtype) == (
            torch.float32,
            torch.bool,
            torch.float32,
        )
        rows = draws.rows(1, batch.positions.numpy(), COUNT)
        assert np.array_equal(batch.latents, np.stack([latent(row) for row in rows]))
        assert batch.class_id.tolist() == (rows % 5).tolist()
        for i, caption in enumerate(batch.captions):  # text states are those of the very caption
            row, pick = int(caption.split(",")[0]), int(caption.split(":")[0][-1])
            assert row == rows[i]
            assert torch.equal(batch.text[i], (row + pick / 4) * batch.text_mask[i, :, None] * torch.ones(5))
            assert (batch.pooled[i] == row + pick / 4).all()
            assert batch.text_mask[i].tolist() == [j <= pick for j in range(batch.text.shape[1])]
        assert batch.text_mask.any(0).all()  # the padding common to a batch is cut off


def test_every_epoch_shows_every_record_once(reader):
    rows = shown(read(reader, stop=3 * COUNT, batch_size=3))
    for epoch in range(3):
        assert sorted(rows[epoch * COUNT : (epoch + 1) * COUNT]) == list(range(COUNT))
    assert not np.array_equal(rows[:COUNT], rows[COUNT : 2 * COUNT])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_any_number_of_processes_shows_the_same(reader, world, micro_batch):
    size = {"stop": 108, "batch_size": 36}
    alone = read(reader, micro_batch=12, **size)
    ranks = [read(reader, micro_batch=micro_batch, rank=rank, world=world, **size) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {108 // (world * micro_batch)}
    assert_same(joined(chain(*ranks)), joined(alone))
    per_step = 36 // (world * micro_batch)
    for step in range(3):  # and step by step, each process owning one contiguous run
        positions = [torch.cat([b.positions for b in rank[step * per_step :][:per_step]]) for rank in ranks]
        assert torch.cat(positions).tolist() == list(range(step * 36, step * 36 + 36))


def test_resumes_exactly_from_any_image(reader):
    """Three resumes inside one epoch and one beyond its end, each from its number of images alone."""
    whole = joined(read(reader, stop=96))
    stops = [0, 12, 24, 36, 72, 96]
    pieces = [read(reader, start=a, stop=b) for a, b in pairwise(stops)]
    assert_same(joined(chain(*pieces)), whole)
    for start in np.random.default_rng(0).integers(0, 84, 10):  # also from no multiple of the batch
        piece = joined(read(reader, start=int(start), stop=int(start) + 12))
        assert_same(piece, {name: values[start : start + 12] for name, values in whole.items()})


def test_ends_with_a_whole_step(reader):
    assert len(read(reader, start=0, stop=13, micro_batch=12)) == 2
    assert read(reader, start=24, stop=24) == []
    assert read(reader, start=36, stop=24) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(reader, workers):
    config = DataConfig(path="set", resolution=32, text_states=True, workers=workers)
    batches = read(reader, config=config)
    assert [b.positions[0].item() for b in batches] == list(range(0, 96, 3))  # in order
    assert_same(joined(batches), joined(read(reader)))


def test_an_error_of_a_worker_is_the_readers(reader, monkeypatch):
    """And threads end with whoever reads, also when that one stops early."""
    config = DataConfig(path="set", resolution=32, workers=2)
    batches = Batches(config, [reader], 1, start=0, stop=96, batch_size=12, micro_batch=3)
    before = threading.active_count()
    iterator = batches.loader()
    next(iterator)
    assert threading.active_count() > before
    iterator.close()
    assert threading.active_count() == before
    monkeypatch.setattr(batches, "_records", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(batches.loader())


def test_leaves_global_random_numbers_alone(reader):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    read(reader)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_differ(reader):
    assert not np.array_equal(shown(read(reader, seed=1)), shown(read(reader, seed=2)))


def test_captions_follow_their_weights(reader):
    config = DataConfig(path="set", resolution=32, caption_weights={"c0": 1, "c1": 0, "c2": 3})
    batches = Batches(config, [reader], 0, start=0, stop=4000, batch_size=4000, micro_batch=4000)
    picks = np.bincount([int(c.split(":")[0][-1]) for c in batches[0].captions], minlength=3) / 4000
    assert picks == pytest.approx([0.25, 0, 0.75], abs=0.03)
    config = DataConfig(path="set", resolution=32)
    batches = Batches(config, [reader], 0, start=0, stop=4000, batch_size=4000, micro_batch=4000)
    picks = np.bincount([int(c.split(":")[0][-1]) for c in batches[0].captions], minlength=3) / 4000
    assert picks == pytest.approx(np.full(CAPTIONS, 1 / 3), abs=0.03)


def test_caption_of_a_record_changes_between_epochs(reader):
    batches = read(reader, stop=6 * COUNT, batch_size=6)
    seen = {}
    for caption in joined(batches)["captions"]:
        seen.setdefault(caption.split(",")[0], set()).add(caption)
    assert np.mean([len(captions) for captions in seen.values()]) > 2


def test_records_without_class_are_minus_one(tmp_path):
    with ShardWriter(tmp_path, resolution=32, vae={}) as writer:
        writer.add({"captions": {"alt": "a"}}, latent=np.zeros((2, 4, 4)))
        writer.add({"captions": {"alt": "b"}, "class_id": 0}, latent=np.zeros((2, 4, 4)))
    config = DataConfig(path="set", resolution=32)
    (batch,) = read(ShardReader(tmp_path), config=config, batch_size=2, micro_batch=2, stop=2)
    assert dict(zip(batch.captions, batch.class_id.tolist(), strict=True)) == {"a": -1, "b": 0}
    assert batch.text is None


def test_pictures_are_told_their_size(tmp_path):
    told = [{}, {"original_size": [600, 800], "crop": [4, 8]}, {"aesthetic": 4.5}]
    with ShardWriter(tmp_path, resolution=32, vae={}) as writer:
        for i, about in enumerate(told):
            writer.add({"captions": {"alt": str(i)}, **about}, latent=np.zeros((2, 4, 4)))
    (batch,) = read(ShardReader(tmp_path), config=DataConfig(path="set", resolution=32), batch_size=3, stop=3)
    found = dict(zip(batch.captions, batch.sizes.tolist(), strict=True))
    assert found == {
        "0": [32, 32, 0, 0, 32, 32, 6],
        "1": [600, 800, 4, 8, 32, 32, 6],
        "2": [32, 32, 0, 0, 32, 32, 4.5],
    }


@pytest.mark.parametrize("stored", [{"mask"}, {"pooled"}, {"mask", "pooled"}, set()])
def test_batches_have_the_text_states_that_are_stored(tmp_path, stored):
    """Mask and pooled are not everyone's; without a mask, all tokens are read."""
    pooled, masked = 3 if "pooled" in stored else 0, "mask" in stored
    layout = TextLayout(dtype="float16", width=5, length=6, masked=masked, encoder="fake", pooled=pooled)
    with ShardWriter(tmp_path, resolution=32, vae={}, text=layout) as writer:
        writer.add({"captions": {"alt": "a"}}, latent=np.zeros((2, 4, 4)))
        writer.add_text("a", np.ones((6, 5)), np.ones(3) if pooled else None, np.arange(6) < 2 if masked else None)
    (batch,) = read(ShardReader(tmp_path), batch_size=1, micro_batch=1, stop=1)
    assert batch.text.shape == (1, 2 if "mask" in stored else 6, 5)
    assert (batch.text_mask is not None) == ("mask" in stored)
    assert (batch.pooled is not None) == ("pooled" in stored)


def test_batch_moves_but_positions_stay(reader):
    moved = read(reader, stop=12)[0].to("meta")
    names = ("latents", "class_id", "sizes", "text", "text_mask", "pooled")
    assert {getattr(moved, name).device.type for name in names} == {"meta"}
    assert moved.positions.device.type == "cpu"


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_weights": {"a": 0.0, "b": 0.0}}, r"data.caption_weights=\{.*\} has weights that must be at least 0"),
        ({"caption_weights": {"a": -1.0, "b": 2.0}}, "must be at least 0"),
        ({"caption_weights": {"a": float("nan")}}, "must be at least 0"),
        ({"path": None, "mix": {"a": -1.0, "b": 2.0}}, r"data.mix=\{.*\} has weights that must be at least 0"),
        ({"path": None, "mix": {"a": 0.0, "b": 2.0}}, "a share above 0 of each"),
        ({"mix": {"a": 1.0}}, r"data.path=set and data.mix=\{'a': 1.0\}: give the folder of one data set"),
        ({"path": None}, r"data.path=None and data.mix=\{\}: give the folder of one data set"),
        ({"chunk": 0}, "data.chunk=0 must be positive"),
        ({"resolution": 0}, "data.resolution=0 must be positive"),
        ({"workers": -1}, "data.workers=-1 must be at least 0"),
        ({"exam": "colours"}, "data.exam=colours is unknown; choose shapes"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**({"path": "set", "resolution": 32} | changes))


@pytest.mark.parametrize(("batch_size", "world"), [(10, 1), (12, 8), (12, 3)])
def test_batch_that_does_not_divide(reader, batch_size, world):
    with pytest.raises(ValueError, match=rf"batch_size={batch_size} is not a multiple of {world} processes x micro_b"):
        read(reader, batch_size=batch_size, micro_batch=12 if world == 3 else 3, world=world)


def test_open_shards_checks_what_the_run_needs(folder, tmp_path):
    config = DataConfig(path=str(folder), resolution=32, caption_weights={"c0": 1.0, "c1": 1.0}, text_states=True)
    assert [len(reader) for reader in open_shards(config, num_classes=5)] == [COUNT]
    for changes, num_classes, message in [
        ({"resolution": 64}, None, "data.resolution=64, but .* holds pictures of 32"),
        (
            {"caption_weights": {"alt": 1.0}},
            None,
            "data.caption_weights.alt=1.0, but no record of .* has a caption of that name; there are c0, c1, c2",
        ),
        ({"flip": True}, None, "data.flip=true, but .* was prepared without; .* encode.flip=true"),
        ({"posterior": True}, None, "data.posterior=true, but .* was prepared without; .* encode.std=true"),
        ({}, 4, "has 5 classes, but the model is conditioned on 4 classes"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_shards(DataConfig(**({"path": str(folder), "resolution": 32} | changes)), num_classes=num_classes)
    bare = write(tmp_path / "bare", extra={})
    with pytest.raises(ValueError, match=r"has records without a class, but .*prepare.py shapes --two 0"):
        open_shards(DataConfig(path=str(bare), resolution=32), num_classes=48)


@pytest.mark.parametrize("about", [{"original_size": 64}, {"crop": [1, 2, 3]}, {"aesthetic": None}])
def test_a_size_that_is_none(tmp_path, about):
    with ShardWriter(tmp_path, resolution=32, vae={}) as writer:
        writer.add({"captions": {"alt": "a"}, **about}, latent=np.zeros((2, 4, 4)))
    with pytest.raises(ValueError, match=r"a record has original_size, crop and aesthetic .* but they are \[height, w"):
        read(ShardReader(tmp_path), config=DataConfig(path="set", resolution=32), batch_size=1, micro_batch=1, stop=1)


def test_missing_text_states(tmp_path):
    with ShardWriter(tmp_path, resolution=32, vae={}) as writer:
        writer.add({"captions": {"alt": "a"}}, latent=np.zeros((2, 4, 4)))
    with pytest.raises(ValueError, match=r"data.text_states=true, but .* holds no text states; set it to false"):
        open_shards(DataConfig(path=str(tmp_path), resolution=32, text_states=True))


def test_verify_can_be_left_to_the_first_process(own_folder):
    path = own_folder / "00000.tar"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    config = DataConfig(path=str(own_folder), resolution=32, verify=True)
    open_shards(config, verify=False)
    with pytest.raises(ValueError, match="00000.tar is damaged"):
        open_shards(config)
