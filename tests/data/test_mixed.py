"""Sets of several sizes, mixed: the ledger of images is one, whoever reads it; and what else a record may hold."""

from itertools import chain, pairwise

import numpy as np
import pytest
import torch

from data.loader import Batches, DataConfig, open_shards
from data.reader import ShardReader
from data.shards import ShardWriter
from data.texts import TextLayout, caption_hash, quantise, restore

SIZES = [(32, 32), (24, 40), (40, 24)]
LAYOUT = TextLayout(dtype="int8", width=130, length=9, masked=True, encoder="fake", pooled=3)


def latent(one: int, row: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng([one, row]).standard_normal((2, size[0] // 8, size[1] // 8)).astype(np.float16)


def states(caption: str) -> np.ndarray:
    return np.random.default_rng(len(caption) + sum(map(ord, caption))).standard_normal((9, 130))


def write(folder, one: int, count: int, *, bare=False):
    """Records in three shards, their sizes in turn; every third has a second caption, every fourth none."""
    options = {"resolution": 32, "vae": {"id": "fake"}, "shard_size": count // 3 + 1}
    with ShardWriter(folder, text=None if bare else LAYOUT, **options) as writer:
        for row in range(count):
            size = SIZES[(row + one) % (3 - one)]
            captions = {"alt": f"{one} {row} alt"} if row % 4 else {}
            captions |= {} if row % 3 else {"long": f"{one} {row} long"}
            mean = latent(one, row, size)
            arrays = {} if bare else {"flip": mean[..., ::-1], "std": np.full_like(mean, 0.5)}
            writer.add({"captions": captions, "class_id": row}, size=size, latent=mean, **arrays)
            for caption in [] if bare else {"", *captions.values()}:
                writer.add_text(caption, states(caption), np.full(3, row), np.arange(9) < 1 + row % 9)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    return [str(write(root / "a", 0, 50)), str(write(root / "b", 1, 14))]


def mixed(folders, weights=(0.7, 0.3), **changes) -> DataConfig:
    return DataConfig(mix=dict(zip(folders, weights, strict=True)), resolution=32, **changes)


def batches(config, *, start=0, stop=144, batch_size=24, micro_batch=1, **processes) -> Batches:
    sizes = {"batch_size": batch_size, "micro_batch": micro_batch}
    return Batches(config, open_shards(config), 7, start=start, stop=stop, **sizes, **processes)


def ledger(parts) -> list[tuple]:
    """(position, set, record, caption, first number of the latent) of each image, in the order of positions."""
    lines = []
    for batch in parts:
        batch = batch.to("cpu")
        for i, position in enumerate(batch.positions.tolist()):
            words = batch.captions[i], batch.class_id[i].item()
            lines.append((position, *words, batch.latents[i].flatten()[0].item(), *batch.sizes[i].tolist()))
    return sorted(lines)


@pytest.mark.parametrize("options", [{}, {"chunk": 3}, {"chunk": 12, "flip": True}, {"workers": 1}])
def test_any_world_sees_one_ledger(folders, options):
    """World sizes 1, 2, 3 and 8 over two epochs and more, with buckets, mixing and mirroring."""
    config = mixed(folders, **options)
    whole = ledger(batches(config, micro_batch=3).loader())
    assert [line[0] for line in whole] == list(range(144))
    for world in (2, 3, 8):
        micro = {2: 3, 3: 1, 8: 3}[world]
        ranks = [batches(config, micro_batch=micro, rank=rank, world=world) for rank in range(world)]
        assert ledger(chain(*(iter(rank.loader()) for rank in ranks))) == whole


def test_two_epochs_are_the_data_twice(folders):
    """Without weights, sets are joined: each record comes once an epoch, whichever set and size it has."""
    readers = open_shards(mixed(folders))
    counts = [len(reader) for reader in readers]
    config = DataConfig(path=folders[0], resolution=32, chunk=1)
    both = Batches(config, readers, 7, start=0, stop=128, batch_size=1, micro_batch=1)
    sets, rows = both.ledger(np.arange(2 * sum(counts)))
    for one, count in enumerate(counts):
        assert np.bincount(rows[sets == one], minlength=count).tolist() == [2] * count


def test_resumes_at_random_positions_change_nothing(folders):
    config, rng = mixed(folders, chunk=6, flip=True), np.random.default_rng(1)
    whole = ledger(batches(config, micro_batch=2).loader())
    for stops in ([0, *sorted(6 * rng.integers(1, 24, 3)), 144] for _ in range(4)):
        pieces = [batches(config, start=int(a), stop=int(b), batch_size=6) for a, b in pairwise(stops)]
        assert ledger(chain(*(iter(piece.loader()) for piece in pieces))) == whole


def test_a_batch_is_of_one_size_and_of_both_sets(folders):
    for batch in batches(mixed(folders), stop=480, micro_batch=24).loader():
        assert len({tuple(size) for size in batch.sizes[:, 4:6].tolist()}) == 1
        height, width = batch.sizes[0, 4:6].tolist()
        assert batch.latents.shape == (24, 2, height // 8, width // 8)
        if (height, width) in SIZES[:2]:  # set b has no picture of the third size
            assert {caption[:1] for caption in batch.captions if caption} == {"0", "1"}


def test_latents_and_texts_are_those_of_the_record(folders):
    """Text states in eight bits: within half a step, 1/254 of the largest of a token's 64 channels."""
    config = mixed(folders, text_states=True)
    for batch in batches(config, micro_batch=8).loader():
        batch, stored = batch.to("cpu"), batch
        assert stored.text.dtype == torch.int8
        for i, caption in enumerate(batch.captions):
            row, size = batch.class_id[i].item(), tuple(int(n) for n in batch.sizes[i, 4:6])
            one = int(np.array_equal(batch.latents[i], latent(1, row, size)))
            assert np.array_equal(batch.latents[i], latent(one, row, size))
            tokens = int(batch.text_mask[i].sum())
            off = (batch.text[i, :tokens] - torch.from_numpy(states(caption)[:tokens])).abs().max()
            assert off <= np.abs(states(caption)).max() / 254 * 1.001
            assert not batch.text[i, tokens:].any()
            if caption:
                assert caption.startswith(f"{one} {row} ")
                assert tokens == 1 + row % 9
                assert batch.pooled[i].tolist() == [row] * 3


def test_half_of_the_pictures_are_mirrored(folders):
    config = mixed(folders, flip=True)
    mirrored = []
    for batch in batches(config, stop=2400, micro_batch=24).loader():
        for i, row in enumerate(batch.class_id.tolist()):
            size = tuple(int(n) for n in batch.sizes[i, 4:6])
            whole = [latent(one, row, size) for one in (0, 1)]
            plain = any(np.array_equal(batch.latents[i], x) for x in whole)
            assert plain or any(np.array_equal(batch.latents[i], x[..., ::-1]) for x in whole)
            mirrored.append(not plain)
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.03)


def test_captions_that_a_record_lacks_leave_their_weight_to_others(folders):
    config = DataConfig(path=folders[0], resolution=32, caption_weights={"long": 3, "alt": 1})
    picked = {}
    for batch in batches(config, stop=50 * 120, batch_size=60, micro_batch=60).loader():
        for caption, row in zip(batch.captions, batch.class_id.tolist(), strict=True):
            picked.setdefault(row, []).append(caption.rsplit(" ")[-1])
    both = [word == "long" for row in picked for word in picked[row] if row % 4 and not row % 3]
    assert np.mean(both) == pytest.approx(0.75, abs=0.03)
    assert {word for row in picked for word in picked[row] if row % 4 and row % 3} == {"alt"}
    assert {word for row in picked for word in picked[row] if not row % 4 and row % 3} == {""}
    config = DataConfig(
        path=folders[0], resolution=32, caption_weights={"long": 1, "alt": 0}
    )  # better alt than nothing
    shown = {c.rsplit(" ")[-1] for batch in batches(config, stop=600, micro_batch=24).loader() for c in batch.captions}
    assert shown == {"long", "alt", ""}


def test_damaged_records_keep_their_place(folders, tmp_path):
    """The ledger is as it was, but for what is damaged: that is named, marked, and finite."""
    folder = write(tmp_path / "c", 0, 50)
    config = DataConfig(path=str(folder), resolution=32, text_states=True, chunk=1)
    before = ledger(batches(config).loader())
    at = ShardReader(folder)._records[5]
    content = bytearray((folder / "00000.tar").read_bytes())
    for start in (at["latent"], ShardReader(folder)._records[6]["json"]):
        content[start] ^= 1
    (folder / "00000.tar").write_bytes(content)
    texts = bytearray((folder / "00001.text.tar").read_bytes())
    alone = next(row for row in range(20, 30) if row % 4 and row % 3)
    caption = f"0 {alone} alt"
    reader = ShardReader(folder)
    place = reader._texts[np.searchsorted(reader._keys, np.uint64(caption_hash(caption)))]
    texts[place["start"]] ^= 1
    (folder / f"{place['shard']:05d}.text.tar").write_bytes(texts)
    bad, sentences, after = set(), set(), []
    for batch in batches(config).loader():
        if not batch.valid.all():
            bad |= set(batch.positions[~batch.valid].tolist())
            sentences |= set(batch.damaged)
            assert torch.isfinite(batch.to("cpu").text).all()
            assert batch.text_mask.any(1).all()
        after.append(batch)
    assert len(sentences) == 3
    assert any("00000.tar, record 5: its latent" in sentence for sentence in sentences)
    assert any("00000.tar, record 6: its JSON" in sentence for sentence in sentences)
    assert any(f"the states of {caption!r} are damaged" in sentence for sentence in sentences)
    rows = {position: row for position, _, row, *_ in before}
    assert {rows[position] for position in bad} == {5, 6, alone}
    assert [line for line in ledger(after) if line[0] not in bad] == [line for line in before if line[0] not in bad]


def test_eight_bits_are_enough_beside_outliers():
    """Eight bits a number, a scale for 64: with channels thirty times as large as the others, as CLIP has them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 768)).astype(np.float32)
    x[:, [133, 725]] *= 30
    q, scale = quantise(x, 64)
    back = restore(torch.from_numpy(q), torch.from_numpy(scale)).numpy()
    plain = np.delete(np.arange(768), np.r_[128:192, 704:768])
    error = np.sqrt(((back - x)[:, plain] ** 2).mean())
    assert error < 0.008
    assert np.sqrt(((back - x) ** 2).mean() / (x**2).mean()) < 0.02
    token = np.abs(x).max(1, keepdims=True) / 127  # a scale for the whole token loses ten times as much
    assert np.sqrt(((np.rint(x / token) * token - x)[:, plain] ** 2).mean()) > 10 * error


@pytest.mark.parametrize("shares", [(1.0, 1.0), (3.0, 1.0)])
def test_prior_preservation_counts_the_mean_loss_of_each_set(folders, shares):
    """mean(instance) + 0.3 mean(prior), whatever the shares, is the mean of the weighted losses of whole rounds."""
    instance, prior = folders
    config = mixed(folders, shares, losses={instance: 1.0, prior: 0.3})
    made = batches(config, stop=24 * 64)
    weights, sets = [], []
    for batch in made.loader():
        weights.append(batch.weight)
        sets.append(made.ledger(batch.positions.numpy())[0])
    weights, sets = torch.cat(weights).double().numpy(), np.concatenate(sets)
    losses = np.where(sets == 0, 2.0, 7.0) + np.random.default_rng(0).standard_normal(len(sets))
    means = [losses[sets == one].mean() for one in range(2)]
    counted = [(sets == one).mean() * weights[sets == one][0] for one in range(2)]
    assert counted == pytest.approx([1.0, 0.3], rel=0.02)
    assert (weights * losses).mean() == pytest.approx(means[0] + 0.3 * means[1], rel=0.02)
    assert (batches(mixed(folders, shares))[0].weight == 1).all()


# --- refusals -----------------------------------------------------------------------------------------------


def test_sets_must_agree(folders, tmp_path):
    bare = str(write(tmp_path / "bare", 0, 10, bare=True))
    with pytest.raises(ValueError, match=r"data.text_states=true, but .*bare holds no text states"):
        open_shards(mixed([folders[0], bare], text_states=True))
    open_shards(mixed([folders[0], bare]))
    with ShardWriter(tmp_path / "other", resolution=32, vae={"id": "other"}) as writer:
        writer.add({"captions": {}}, latent=np.zeros((2, 4, 4)))
    with pytest.raises(
        ValueError, match=r"data.mix joins .*a and .*other, which differ in autoencoder: fake and other"
    ):
        open_shards(mixed([folders[0], str(tmp_path / "other")]))


@pytest.mark.parametrize(
    ("options", "sizes"),
    [({"chunk": 5}, {}), ({"chunk": 4}, {"micro_batch": 3}), ({"chunk": 8}, {"start": 12}), ({}, {"start": 12})],
)
def test_chunks_that_do_not_fit(folders, options, sizes):
    with pytest.raises(ValueError, match=r"data.chunk=\d+ images have one size: it must divide train.batch_size=24"):
        batches(mixed(folders, **options), **sizes)


def test_a_caption_without_states(folders):
    reader = ShardReader(folders[0])
    with pytest.raises(ValueError, match=r"holds no text states of the caption 'never'; prepare the data set again"):
        reader.texts(["0 1 alt", "never"])


@pytest.mark.parametrize("losses", [{"a": 1.0}, {"a": 1.0, "c": 1.0}])
def test_losses_are_of_the_sets_of_the_mix(losses):
    with pytest.raises(
        ValueError, match=r"data.losses=.* does not weigh the sets of data.mix=.*; give a weight for each"
    ):
        DataConfig(mix={"a": 1.0, "b": 1.0}, losses=losses, resolution=32)
    with pytest.raises(ValueError, match=r"data.losses=.* has weights that must be at least 0 and not all 0"):
        DataConfig(mix={"a": 1.0, "b": 1.0}, losses={"a": -1.0, "b": 1.0}, resolution=32)
