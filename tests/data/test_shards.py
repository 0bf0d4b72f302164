"""Shards: what was written is read, the tars are everyone's, and each way of breaking a set is told by name."""

import hashlib
import io
import json
import multiprocessing
import pickle
import resource
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from safetensors.numpy import load

from data import shards
from data.reader import DamagedError, ShardReader
from data.shards import ShardWriter, npy
from tests.data.conftest import CAPTIONS, COUNT, SHAPE, latent, write


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def edit_index(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what is written is read --------------------------------------------------------------------------------


def latents_of(reader, rows) -> np.ndarray:
    found = np.empty((len(rows), *SHAPE), np.float16)
    assert reader.read("latent", np.asarray(rows), list(found)) == [None] * len(rows)
    return found


def test_reads_what_was_written(folder):
    reader = ShardReader(folder, verify=True)
    assert len(reader) == COUNT
    rows = np.array([36, 0, 9, 10, 0])
    assert np.array_equal(latents_of(reader, rows), np.stack([latent(row) for row in rows]))
    captions = {f"c{i}": f"36, caption {i}: ü" for i in range(CAPTIONS)}
    assert reader.record(36) == {"captions": captions, "class_id": 1}
    texts = reader.texts([reader.record(row)["captions"]["c1"] for row in rows])
    assert texts.damaged == [None] * 5
    assert texts.mask.tolist() == [[True, True]] * 5  # and no column of padding
    assert np.array_equal(texts.states, (rows + 0.25)[:, None, None] + np.zeros((5, 2, 5)))
    assert np.array_equal(texts.pooled, (rows + 0.25)[:, None] + np.zeros((5, 6)))


def test_index_tells_what_the_set_holds(folder):
    index = ShardReader(folder).index
    assert index["schema"] == shards.SCHEMA
    assert [shard["count"] for shard in index["shards"]] == [10, 10, 10, 7]
    assert index["bytes"] == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert index["fields"] == ["latent"]
    assert index["buckets"] == [{"height": 32, "width": 32, "shape": list(SHAPE), "count": COUNT}]
    assert index["captions"] == {"c0": COUNT, "c1": COUNT, "c2": COUNT}
    assert index["text"]["encoder"] == "fake"
    assert index["vae"] == {"id": "fake"}
    assert ShardReader(folder).num_classes == 5


def test_latent_statistics_match_numpy(folder):
    index = ShardReader(folder).index
    latents = np.stack([latent(row) for row in range(COUNT)]).astype(np.float64)
    assert index["latent_mean"] == pytest.approx(latents.mean((0, 2, 3)), abs=1e-12)
    assert index["latent_std"] == pytest.approx(latents.std((0, 2, 3)), abs=1e-12)


def test_same_records_give_the_same_bytes(folder, tmp_path):
    assert hashes(write(tmp_path / "again")) == hashes(folder)


def test_a_full_last_shard_leaves_no_empty_one(tmp_path):
    reader = ShardReader(write(tmp_path / "set", count=20), verify=True)
    assert [shard["count"] for shard in reader.index["shards"]] == [10, 10]


def test_readers_cross_process_boundaries(folder):
    reader = ShardReader(folder)
    latents_of(reader, np.arange(COUNT))  # files are open when it is pickled and forked
    again = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(latents_of(again, [36])[0], latent(36))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(reader.record, [0, 36]) == [reader.record(0), reader.record(36)]


def test_reads_more_shards_than_are_kept_open(tmp_path):
    reader = ShardReader(write(tmp_path / "set", count=280, shard_size=1))
    for _ in range(2):
        assert [reader.record(row)["class_id"] for row in range(280)] == [row % 5 for row in range(280)]


# --- the tars are everyone's --------------------------------------------------------------------------------


def test_tars_are_plain_webdataset(folder):
    """As WebDataset groups them: members of one sample in a row, its key all before the first dot."""
    samples = {}
    for path in sorted(folder.glob("*[0-9].tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, field = member.name.split(".", 1)
                assert list(samples)[-1:] == [key] or key not in samples
                samples.setdefault(key, {})[field] = tar.extractfile(member).read()
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
    assert len(samples) == COUNT
    for row, sample in enumerate(samples.values()):
        assert set(sample) == {"latent.npy", "json"}
        assert np.array_equal(np.load(io.BytesIO(sample["latent.npy"]), allow_pickle=False), latent(row))
        assert json.loads(sample["json"])["class_id"] == row % 5


def test_webdataset_reads_the_tars(folder):
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(f"{folder}/{{00000..00003}}.tar", shardshuffle=False))
    assert len(samples) == COUNT
    assert json.loads(samples[36]["json"])["class_id"] == 1
    texts = list(webdataset.WebDataset(f"{folder}/{{00000..00003}}.text.tar", shardshuffle=False))
    assert len(texts) == CAPTIONS * COUNT
    stored = load(texts[0]["safetensors"])
    assert [stored[name].shape for name in ("states", "mask", "pooled")] == [(1, 5), (3,), (6,)]


# --- broken sets --------------------------------------------------------------------------------------------


def test_missing_folder_names_the_command(tmp_path):
    with pytest.raises(
        ValueError, match=r"data.path=.*nowhere does not exist.*python scripts/prepare.py shapes`, or as docs/data.md"
    ):
        ShardReader(tmp_path / "nowhere")


def test_missing_index_is_an_unfinished_set(own_folder):
    (own_folder / "index.json").unlink()
    with pytest.raises(ValueError, match=r"was not finished.*python scripts/prepare.py shapes`, or as docs/data.md"):
        ShardReader(own_folder)


def test_missing_shard(own_folder):
    (own_folder / "00002.tar").unlink()
    with pytest.raises(ValueError, match=r"00002\.tar is missing; copy it again"):
        ShardReader(own_folder)


def member_boundary(path) -> int:
    """Where the sixth sample of a tar starts: cut there, the tar reads without an error."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    return members[10].offset


@pytest.mark.parametrize("cut", [member_boundary, lambda _: 3000], ids=["between members", "inside a member"])
def test_truncated_shard(own_folder, cut):
    path = own_folder / "00001.tar"
    end = cut(path)
    path.write_bytes(path.read_bytes()[:end])
    if cut is member_boundary:
        with tarfile.open(path) as tar:
            assert len(tar.getmembers()) == 10  # of 20: this is the loss that only the index sees
    with pytest.raises(ValueError, match=rf"00001\.tar has {end} bytes instead of \d+; copy it again"):
        ShardReader(own_folder)


def test_flipped_byte_is_found_by_verify(own_folder):
    path = own_folder / "00003.tar"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    ShardReader(own_folder)  # sizes are right
    with pytest.raises(ValueError, match=r"00003\.tar is damaged: its SHA-256 .* copy it again"):
        ShardReader(own_folder, verify=True)


@pytest.mark.parametrize("name", ["records.npy", "texts.npy"])
def test_flipped_byte_in_a_table_is_always_found(own_folder, name):
    path = own_folder / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        ShardReader(own_folder)


def test_newer_schema(own_folder):
    edit_index(own_folder, schema=shards.SCHEMA + 1)
    with pytest.raises(ValueError, match=r"has schema 3, but this version reads up to 2; update"):
        ShardReader(own_folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}"])
def test_damaged_index(own_folder, content):
    (own_folder / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        ShardReader(own_folder)


def test_older_schema(own_folder):
    edit_index(own_folder, schema=1)
    with pytest.raises(ValueError, match=r"has schema 1, from an older version; prepare the data set again"):
        ShardReader(own_folder)


def flip(path, at: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def test_every_flipped_bit_of_a_record_is_named(own_folder):
    """At random places of a record's arrays, JSON and text states; and no other record is touched by it."""
    rng = np.random.default_rng(0)
    reader = ShardReader(own_folder)
    at, text = reader._records[13], reader._texts[5]
    places = [("00001.tar", at["latent"], 64), ("00001.tar", at["json"], at["json_bytes"])]
    tar = f"{text['shard']:05d}.text.tar"
    places += [(tar, text["start"], 12 + 10 * text["tokens"] + 3)]  # pooled, states, mask
    for name, start, size in places:
        for offset in {0, size - 1, *rng.integers(0, size, 4)}:
            flip(own_folder / name, start + offset, 1 << int(rng.integers(8)))
            reader, found = ShardReader(own_folder), np.ones((COUNT, *SHAPE), np.float16)
            wrong = reader.read("latent", np.arange(COUNT), list(found))
            if start == at["latent"]:
                assert [row for row, sentence in enumerate(wrong) if sentence] == [13]
                assert wrong[13] == f"{own_folder}/00001.tar, record 3: its latent differs from its checksum"
                assert not found[13].any()
            elif start == at["json"]:
                with pytest.raises(DamagedError, match="00001.tar, record 3: its JSON differs from its checksum"):
                    reader.record(13)
                assert wrong == [None] * COUNT
            else:
                captions = [f"{row}, caption {i}: ü" for row in range(COUNT) for i in range(CAPTIONS)]
                texts = reader.texts(captions)
                (bad,) = [i for i, sentence in enumerate(texts.damaged) if sentence]
                assert texts.damaged[bad] == f"{own_folder}/{tar}: the states of {captions[bad]!r} are damaged"
                assert not texts.states[bad].any()
            write(own_folder, overwrite=True)


def test_a_shard_that_shrinks_or_goes_while_it_is_read_is_damaged_records(own_folder):
    """Mapped into memory, reading it would end the process."""
    reader = ShardReader(own_folder)
    found = latents_of(reader, np.arange(COUNT))
    with open(own_folder / "00001.tar", "r+b") as file:
        file.truncate(4000)
    (own_folder / "00002.tar").unlink()
    again = ShardReader.__new__(ShardReader)
    again.__dict__ = reader.__dict__
    wrong = again.read("latent", np.arange(COUNT), list(found))
    assert [row for row, sentence in enumerate(wrong) if sentence][:1] > [9]
    assert all(wrong[13:20])
    assert not any(wrong[:10] + wrong[30:])


def test_pickles_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Object arrays"):
        npy(np.array([object()]))


# --- interrupted and failing writers ------------------------------------------------------------------------


def test_stale_files_of_a_killed_writer_are_cleared(folder, tmp_path):
    out = tmp_path / "set"
    out.mkdir()
    for name in ("00000.tar.tmp", "00099.tar.tmp", "records.npy.tmp", "texts.npy.tmp", "index.json.tmp"):
        (out / name).write_bytes(b"half")
    (out / "notes.tmp").write_text("mine")  # not ours: stays
    write(out)
    (out / "notes.tmp").unlink()
    assert hashes(out) == hashes(folder)


def test_killed_writer_leaves_no_set(folder, tmp_path):
    """SIGKILL after shards were finished: nothing has its final name, and writing again just works."""
    out = tmp_path / "set"
    program = f"""
import os, signal, numpy as np
from data.shards import ShardWriter
writer = ShardWriter({str(out)!r}, resolution=32, vae={{}}, shard_size=2)
for i in range(5):
    writer.add({{"captions": {{}}}}, latent=np.zeros((2, 4, 4)))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert sorted(path.name for path in out.iterdir()) == [f"0000{i}.tar.tmp" for i in range(3)]
    with pytest.raises(ValueError, match="was not finished"):
        ShardReader(out)
    assert hashes(write(out)) == hashes(folder)


@pytest.fixture
def full_disk():
    """Files of this process may not grow past 20 kB: a real write error, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_leaves_nothing(tmp_path, full_disk):
    with pytest.raises(OSError, match="too large"):
        write(tmp_path / "set", shard_size=COUNT)
    assert list((tmp_path / "set").iterdir()) == []


@pytest.mark.parametrize("name", ["records.npy.tmp", "texts.npy.tmp", "index.json.tmp"])
def test_full_disk_at_the_very_end_leaves_nothing(tmp_path, monkeypatch, name):
    real = shards._write

    def write_or_fail(path, content):
        if path.name == name:
            path.write_bytes(content[:10])
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(shards, "_write", write_or_fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "set")
    assert list((tmp_path / "set").iterdir()) == []


def test_error_while_preparing_leaves_nothing(tmp_path):
    def fail():
        with ShardWriter(tmp_path / "set", resolution=32, vae={}) as writer:
            writer.add({"captions": {}}, latent=np.zeros(SHAPE))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list((tmp_path / "set").iterdir()) == []


def test_existing_shards_are_not_overwritten_unasked(own_folder, folder):
    with pytest.raises(ValueError, match="already holds shards.*--overwrite"):
        write(own_folder)
    assert hashes(own_folder) == hashes(folder)
    write(own_folder, count=5, overwrite=True)
    assert {path.name for path in own_folder.iterdir()} == {
        "00000.tar",
        "00000.text.tar",
        "records.npy",
        "texts.npy",
        "index.json",
    }
    assert len(ShardReader(own_folder, verify=True)) == 5


def test_failed_overwrite_leaves_no_set(own_folder):
    """The old index must be gone before the first old shard is."""
    with pytest.raises(ValueError, match="no record was added"):
        write(own_folder, count=0, overwrite=True)
    with pytest.raises(ValueError, match="was not finished"):
        ShardReader(own_folder)


def test_foreign_tars_are_not_overwritten(tmp_path):
    (tmp_path / "00000.tar").write_bytes(b"from another tool")
    with pytest.raises(ValueError, match="already holds shards"):
        write(tmp_path)
    assert (tmp_path / "00000.tar").read_bytes() == b"from another tool"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"latent": np.zeros((2, 4, 5))},
            r"record 1 of \(32, 32\) has arrays of \[\(2, 4, 5\)\], but those before had \[\(2, 4, 4\)\]",
        ),
        ({"latent": np.zeros(SHAPE), "text": np.zeros(3)}, "record 1 has the arrays"),
        ({}, "record 1 has the arrays"),
        ({"latent": np.full(SHAPE, 1e6)}, "field latent has values that are not finite in float16"),
        ({"latent": np.full(SHAPE, np.nan)}, "field latent has values that are not finite"),
    ],
)
def test_records_that_do_not_fit(tmp_path, arrays, message):
    writer = ShardWriter(tmp_path, resolution=32, vae={})
    writer.add({"captions": {}}, latent=np.zeros(SHAPE))
    with pytest.raises(ValueError, match=message):
        writer.add({"captions": {}}, **arrays)


def test_empty_set(tmp_path):
    with pytest.raises(ValueError, match="no record was added"):
        write(tmp_path, count=0)
