"""What every step promises: killed at any moment it ends in the same bytes, and no row is without an account."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prepare import parts as module
from prepare.parts import Part, Tally, account, dropped, finished, run_step, write_table

NAMES = [f"{n:05d}" for n in range(8)]
ROWS = 6
SLOW = """
import sys
from functools import partial
from pathlib import Path
sys.path.insert(0, {tests!r})
from prepare.parts import run_step
from test_parts import NAMES, work
print("up", flush=True)
run_step(Path({folder!r}), NAMES, partial(work, pause={pause}), recipe={{"made": "here"}}, processes={processes})
"""


def work(part: Part, pause: float = 0.0) -> None:
    """Two files, written bit by bit, and rows of all three ends; a function of the part's name alone."""
    draw = random.Random(part.name)
    with open(part.path(".tar"), "wb") as file:
        for row in range(ROWS):
            file.write(draw.randbytes(500))
            file.flush()
            time.sleep(pause)
            key = f"{part.name}{row:04d}"
            if row % 3 == 0:
                part.drop(key, "too_small", f"{row} px")
            elif row == 1:
                part.note(key, "no_caption")
            elif row == 2:
                part.drop(key, "broken", fault=True)
            else:
                part.keep()
    write_table(part.path(".parquet"), ["key"], [(part.name,)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def make(folder: Path, **settings) -> Tally:
    return run_step(
        folder, NAMES, settings.pop("work", work), recipe=settings.pop("recipe", {"made": "here"}), **settings
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of a step that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "step"
    make(folder)
    return contents(folder)


def start(folder: Path, *, pause: float = 0.0, processes: int = 1, **environment: str) -> subprocess.Popen:
    code = SLOW.format(tests=str(Path(__file__).parent), folder=str(folder), pause=pause, processes=processes)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_the_account(whole: dict[str, bytes], tmp_path: Path):
    told: list[int] = []
    tally = make(tmp_path / "step", tick=told.append)
    rows = len(NAMES) * ROWS
    assert tally.given == rows == sum(told) == tally.kept + tally.dropped.total()
    assert tally.dropped == {"too_small": 16, "broken": 8} and tally.noted == {"no_caption": 8} and tally.faults == 16
    assert contents(tmp_path / "step") == whole
    about = finished(tmp_path / "step")
    assert Tally(**about["tally"]) == tally and about["parts"] == NAMES
    assert dropped(tmp_path / "step", "00002") == {
        "000020000": "too_small", "000020002": "broken", "000020003": "too_small",
    }  # fmt: skip
    noted = pq.read_table(tmp_path / "step/00002.noted.parquet").to_pylist()
    assert noted == [{"key": "000020001", "reason": "no_caption", "detail": ""}]
    told.clear()
    assert make(tmp_path / "step", work=None, tick=told.append) == tally  # done is done: work is not called
    assert sum(told) == rows


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment(whole: dict[str, bytes], tmp_path: Path, processes: int):
    draw = random.Random(processes)
    folder = tmp_path / "step"
    killed = 0
    for attempt in range(4):
        process = start(folder, pause=0.02, processes=processes)
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        try:
            process.wait(draw.uniform(0.05, 0.6) + (processes - 1) * (attempt % 2))  # workers need some time to start
        except subprocess.TimeoutExpired:
            killed += 1
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own session: it and its workers
            process.wait()
            process.stdout.close()
        for path in folder.glob("0000?.json"):  # what looks whole is whole
            assert path.read_bytes() == whole[path.name]
            for name in whole:
                if name.startswith(f"{path.stem}."):
                    assert (folder / name).read_bytes() == whole[name]
    assert killed
    make(folder)
    assert contents(folder) == whole


@pytest.mark.parametrize("moment", range(12))
def test_killed_at_each_step_of_writing(whole: dict[str, bytes], tmp_path: Path, moment: int):
    """The process dies before its n-th change of a name: no state in between is taken for whole."""
    folder = tmp_path / "step"
    code = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_parts import make
real, count = os.replace, 0
def replace(*paths):
    global count
    count += 1
    if count > {moment}:
        os._exit(9)
    real(*paths)
os.replace = replace
make(Path({folder!r}))
"""
    pid = os.fork()
    if pid == 0:  # quicker than a new interpreter
        try:
            signal.alarm(60)  # should a lock have been held while it forked
            exec(code.format(tests=str(Path(__file__).parent), moment=moment, folder=str(folder)), {})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    make(folder)
    assert contents(folder) == whole


def test_a_full_disk(whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "step"

    def full(part: Part) -> None:
        work(part)
        if part.name == "00003":
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        make(folder, work=full)
    assert not list(folder.glob("00003*")) and not list(folder.glob("*.tmp"))
    assert account(folder, "00002") and not account(folder, "00003")
    with pytest.raises(ValueError, match="the step step was not finished: .*run it first"):
        finished(folder)

    real = Path.write_text

    def no_room(path: Path, text: str, *args, **kwargs) -> int:
        if path.name.startswith("00005.json"):
            real(path, text[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", no_room)  # now the account itself does not fit
    with pytest.raises(OSError, match="No space left"):
        make(folder)
    monkeypatch.undo()
    assert account(folder, "00004") and not account(folder, "00005") and not list(folder.glob("*.tmp"))
    make(folder)
    assert contents(folder) == whole


def test_a_real_full_disk(whole: dict[str, bytes], tmp_path: Path):
    """A file system of 64 kB, where one may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        ballast = folder / "ballast"
        ballast.write_bytes(bytes(36 * 1024))
        with pytest.raises(OSError, match="No space left"):
            make(folder / "step")
        assert not list((folder / "step").glob("*.tmp"))
        for path in (folder / "step").glob("0*.json"):
            assert account(folder / "step", path.stem) and path.read_bytes() == whole[path.name]
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
        make(folder / "step")
        assert contents(folder / "step") == whole
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_stale_files_are_cleared(whole: dict[str, bytes], tmp_path: Path):
    folder = tmp_path / "step"
    folder.mkdir()
    for name in ("00001.tar.tmp", "00099.parquet.tmp", "step.json.12345.tmp", "00001.json.77.tmp"):
        (folder / name).write_bytes(b"half")
    make(folder)
    assert contents(folder) == whole


@pytest.mark.parametrize("harm", ["missing", "short", "no account"])
def test_a_harmed_part_is_made_again(whole: dict[str, bytes], tmp_path: Path, harm: str):
    folder = tmp_path / "step"
    make(folder)
    (folder / "step.json").write_text(json.dumps({"recipe": {"made": "here"}}))  # as if it had been stopped
    if harm == "missing":
        (folder / "00004.dropped.parquet").unlink()
    elif harm == "short":
        os.truncate(folder / "00004.tar", 100)
    else:
        (folder / "00004.json").unlink()
    made: list[str] = []

    def noticed(part: Part) -> None:
        made.append(part.name)
        work(part)

    make(folder, work=noticed)
    assert made == ["00004"] and contents(folder) == whole


def test_processes_change_no_byte(whole: dict[str, bytes], tmp_path: Path):
    told: list[int] = []
    tally = make(tmp_path / "step", processes=2, tick=told.append)
    assert sum(told) == tally.given
    assert contents(tmp_path / "step") == whole


def test_ranks_change_no_byte(whole: dict[str, bytes], tmp_path: Path):
    folder = tmp_path / "step"
    ranks = [start(folder, pause=0.005, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    for rank in ranks:
        assert rank.stdout is not None
        rank.stdout.close()
    assert contents(folder) == whole


def test_a_failed_part_leaves_those_beside_it(tmp_path: Path):
    """Part 1 fails: nothing that begins like its name, such as 10, is harmed."""
    folder = tmp_path / "step"

    def fails(part: Part) -> None:
        if part.name == "1":
            (folder / "10.tar.tmp").write_bytes(b"of another process")
            part.path(".tar").write_bytes(b"half")
            raise RuntimeError("a bug")
        work(part)

    with pytest.raises(RuntimeError, match="a bug"):
        run_step(folder, ["0", "1"], fails, recipe={})
    assert [path.name for path in folder.glob("*.tmp")] == ["10.tar.tmp"]
    assert account(folder, "0") and not list(folder.glob("1.*"))


def test_another_recipe_is_refused(whole: dict[str, bytes], tmp_path: Path):
    folder = tmp_path / "step"
    make(folder)
    message = "step was made with step.made=here, not elsewhere; choose another out=, or delete"
    with pytest.raises(ValueError, match=message):
        make(folder, recipe={"made": "elsewhere"})
    (folder / "step.json").write_text(json.dumps({"recipe": {"made": "here"}}))  # nor if it was stopped half-way
    with pytest.raises(ValueError, match=message):
        make(folder, recipe={"made": "elsewhere"})
    with pytest.raises(ValueError, match="step.size=None, not 3"):
        make(folder, recipe={"made": "here", "size": 3})
    make(folder)
    assert contents(folder) == whole


def test_too_many_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "step"
    message = (
        r"step: 16 of 48 rows failed \(.*broken 8.*\), more than step.max_faults=0.3; see .*dropped.parquet, mend"
        " the cause or raise the share"
    )
    with pytest.raises(ValueError, match=message):
        make(folder, max_faults=0.3)
    assert all(account(folder, name) for name in NAMES)  # what was made stays
    with pytest.raises(ValueError, match="not finished"):
        finished(folder)
    monkeypatch.setattr(module, "ENOUGH", 10)  # and it is not waited for the last part, if it is clear
    with pytest.raises(ValueError, match="step: 4 of 12 rows failed"):
        make(tmp_path / "early" / "step", max_faults=0.3)
    assert not account(tmp_path / "early" / "step", "00002")
    make(folder, max_faults=0.34)
    assert sum(finished(folder)["tally"]["failed"].values()) == 16


def test_nothing_to_do_and_nothing_done(tmp_path: Path):
    with pytest.raises(ValueError, match="step has nothing to work on: its input is empty; check source"):
        run_step(tmp_path / "step", [], work, recipe={})
    with pytest.raises(ValueError, match="the step none was not run: .*run it first"):
        finished(tmp_path / "none")


def test_slow_work_is_the_same_work(whole: dict[str, bytes], tmp_path: Path):
    make(tmp_path / "step", work=partial(work, pause=0.001))
    assert contents(tmp_path / "step") == whole
