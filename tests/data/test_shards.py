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

from data import shards
from data.shards import ShardReader, ShardWriter
from tests.data.conftest import CAPTIONS, COUNT, SHAPE, latent, write


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def edit_index(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what is written is read --------------------------------------------------------------------------------


def test_reads_what_was_written(folder):
    reader = ShardReader(folder, verify=True)
    assert len(reader) == COUNT
    rows = np.array([36, 0, 9, 10, 0])
    latents = reader.array("latent", rows, np.float32)
    assert latents.dtype == np.float32
    assert np.array_equal(latents, np.stack([latent(row) for row in rows]))
    assert reader.array("latent", rows).dtype == np.float16
    assert reader.record(36) == {"captions": [f"36, caption {i}: ü" for i in range(CAPTIONS)], "class_id": 1}
    assert np.array_equal(reader.array("pooled", rows)[:, :, 0], rows[:, None] + np.arange(CAPTIONS) / 4)
    assert reader.array("mask", rows).dtype == np.bool_


def test_picks_one_entry_of_the_first_axis(folder):
    reader, rows, picks = ShardReader(folder), np.array([3, 30, 17]), np.array([2, 0, 1])
    for name in ("text", "mask", "pooled"):
        whole = reader.array(name, rows)
        assert np.array_equal(reader.array(name, rows, picks=picks), whole[np.arange(3), picks])


def test_index_tells_what_the_set_holds(folder):
    index = ShardReader(folder).index
    assert index["schema"] == shards.SCHEMA
    assert [shard["count"] for shard in index["shards"]] == [10, 10, 10, 7]
    assert index["bytes"] == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert index["fields"]["latent"] == {"dtype": "float16", "shape": list(SHAPE)}
    assert index["fields"]["mask"] == {"dtype": "bool", "shape": [CAPTIONS, 3]}
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
    reader.array("latent", np.arange(COUNT))  # maps are open when it is pickled and forked
    again = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(again.array("latent", np.array([36]))[0], latent(36))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(reader.record, [0, 36]) == [reader.record(0), reader.record(36)]


def test_reads_more_shards_than_are_kept_mapped(tmp_path):
    reader = ShardReader(write(tmp_path / "set", count=280, shard_size=1))
    for _ in range(2):
        assert [reader.record(row)["class_id"] for row in range(280)] == [row % 5 for row in range(280)]


# --- the tars are everyone's --------------------------------------------------------------------------------


def test_tars_are_plain_webdataset(folder):
    """As WebDataset groups them: members of one sample in a row, its key all before the first dot."""
    samples = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, field = member.name.split(".", 1)
                assert list(samples)[-1:] == [key] or key not in samples
                samples.setdefault(key, {})[field] = tar.extractfile(member).read()
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
    assert len(samples) == COUNT
    for row, sample in enumerate(samples.values()):
        assert set(sample) == {"latent.npy", "text.npy", "mask.npy", "pooled.npy", "json"}
        assert np.array_equal(np.load(io.BytesIO(sample["latent.npy"]), allow_pickle=False), latent(row))
        assert json.loads(sample["json"])["class_id"] == row % 5


def test_webdataset_reads_the_tars(folder):
    webdataset = pytest.importorskip("webdataset")
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert len(samples) == COUNT
    assert json.loads(samples[36]["json"])["class_id"] == 1


# --- broken sets --------------------------------------------------------------------------------------------


def test_missing_folder_names_the_command(tmp_path):
    with pytest.raises(ValueError, match=r"data.path=.*nowhere does not exist.*python scripts/prepare.py shapes"):
        ShardReader(tmp_path / "nowhere")


def test_missing_index_is_an_unfinished_set(own_folder):
    (own_folder / "index.json").unlink()
    with pytest.raises(ValueError, match=r"was not finished.*python scripts/prepare.py shapes"):
        ShardReader(own_folder)


def test_missing_shard(own_folder):
    (own_folder / "00002.tar").unlink()
    with pytest.raises(ValueError, match=r"00002\.tar is missing; copy it again"):
        ShardReader(own_folder)


def member_boundary(path) -> int:
    """Where the sixth sample of a tar starts: cut there, the tar reads without an error."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    return next(m.offset for m in members if m.name.startswith(members[25].name.split(".")[0]))


@pytest.mark.parametrize("cut", [member_boundary, lambda _: 5000], ids=["between members", "inside a member"])
def test_truncated_shard(own_folder, cut):
    path = own_folder / "00001.tar"
    end = cut(path)
    path.write_bytes(path.read_bytes()[:end])
    if cut is member_boundary:
        with tarfile.open(path) as tar:
            assert len(tar.getmembers()) == 25  # of 50: this is the loss that only the index sees
    with pytest.raises(ValueError, match=rf"00001\.tar has {end} bytes instead of \d+; copy it again"):
        ShardReader(own_folder)


def test_flipped_byte_is_found_by_verify(own_folder):
    path = own_folder / "00003.tar"
    content = bytearray(path.read_bytes())
    content[7000] ^= 1
    path.write_bytes(content)
    ShardReader(own_folder)  # sizes are right
    with pytest.raises(ValueError, match=r"00003\.tar is damaged: its SHA-256 .* copy it again"):
        ShardReader(own_folder, verify=True)


def test_flipped_byte_in_the_offsets_is_always_found(own_folder):
    path = own_folder / "offsets.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"offsets\.npy is damaged"):
        ShardReader(own_folder)


def test_newer_schema(own_folder):
    edit_index(own_folder, schema=shards.SCHEMA + 1)
    with pytest.raises(ValueError, match=r"has schema 2, but this version reads up to 1; update"):
        ShardReader(own_folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}"])
def test_damaged_index(own_folder, content):
    (own_folder / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        ShardReader(own_folder)


def test_field_that_contradicts_the_index(own_folder):
    fields = ShardReader(own_folder).fields
    edit_index(own_folder, fields=fields | {"latent": {"dtype": "float16", "shape": [4, 4, 2]}})
    with pytest.raises(ValueError, match=r"field latent is float16 \(2, 4, 4\), but index.json says"):
        ShardReader(own_folder)


def test_pickles_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Object arrays"):
        shards._npy(np.array([object()]))


# --- interrupted and failing writers ------------------------------------------------------------------------


def test_stale_files_of_a_killed_writer_are_cleared(folder, tmp_path):
    out = tmp_path / "set"
    out.mkdir()
    for name in ("00000.tar.tmp", "00099.tar.tmp", "offsets.npy.tmp", "index.json.tmp"):
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
    writer.add({{"captions": []}}, latent=np.zeros((2, 4, 4)))
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


@pytest.mark.parametrize("name", ["offsets.npy.tmp", "index.json.tmp"])
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
            writer.add({}, latent=np.zeros(SHAPE))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list((tmp_path / "set").iterdir()) == []


def test_existing_shards_are_not_overwritten_unasked(own_folder, folder):
    with pytest.raises(ValueError, match="already holds shards.*--overwrite"):
        write(own_folder)
    assert hashes(own_folder) == hashes(folder)
    write(own_folder, count=5, overwrite=True)
    assert {path.name for path in own_folder.iterdir()} == {"00000.tar", "offsets.npy", "index.json"}
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
        ({"latent": np.zeros((2, 4, 5))}, r"record 1 has the arrays .*\[2, 4, 5\].*but the set needs .*\[2, 4, 4\]"),
        ({"latent": np.zeros(SHAPE), "text": np.zeros(3)}, "record 1 has the arrays"),
        ({}, "record 1 has the arrays"),
        ({"latent": np.full(SHAPE, 1e6)}, "field latent has values that are not finite in float16"),
        ({"latent": np.full(SHAPE, np.nan)}, "field latent has values that are not finite"),
    ],
)
def test_records_that_do_not_fit(tmp_path, arrays, message):
    writer = ShardWriter(tmp_path, resolution=32, vae={})
    writer.add({}, latent=np.zeros(SHAPE))
    with pytest.raises(ValueError, match=message):
        writer.add({}, **arrays)


def test_empty_set(tmp_path):
    with pytest.raises(ValueError, match="no record was added"):
        write(tmp_path, count=0)
