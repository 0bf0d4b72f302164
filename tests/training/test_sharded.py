"""State spread over two ranks is saved in parts and comes back equal at two ranks, at one, and unsharded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.folder import fault, newest
from models.weights import load_denoiser
from tests.training.test_checkpoint import Training, equal, saver

RANKS = """
import sys, json
from pathlib import Path
import torch, torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from tests.training.test_checkpoint import Training, saver, optimizer_tensors, CONFIG

folder, rank, world, tasks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)

def made(seed):
    run = Training(seed)
    for module in (run.denoiser, run.ema, run.second):
        for block in module.blocks:
            fully_shard(block)
        fully_shard(module)
    run.optimizer = torch.optim.AdamW(run.denoiser.parameters(), lr=1e-2)
    return run

def stepped(run):
    torch.manual_seed(run.state.step)
    for parameter in run.denoiser.parameters():
        whole = torch.randn(parameter.shape)
        parameter.grad = torch.distributed.tensor.distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    run.optimizer.step()
    for average, weight in ((run.ema, 0.1), (run.second, 0.5)):
        mine = [p.to_local() for p in average.parameters()]
        torch._foreach_lerp_(mine, [p.to_local() for p in run.denoiser.parameters()], weight)
    run.state.images_seen += 10
    run.state.step += 1

def whole(run):
    return {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in run.tensors().items()}

with torch.no_grad():
    if "plain" in tasks:
        run = made(1)
        assert run.resume(folder / "plain")
        truth, found = load_file(folder / "plain.safetensors"), whole(run)
        assert truth.keys() == found.keys()
        assert all(torch.equal(truth[key], found[key]) for key in truth)
    if "save" in tasks:
        run = made(0)
        with saver(folder / "checkpoints", keep=5) as writer:
            for _ in range(2):
                stepped(run)
                run.save(writer)
            then = whole(run)
            stepped(run)  # goes on while the second is being written
        if rank == 0:
            save_file({key: t.clone() for key, t in then.items()}, folder / "truth.safetensors")
    dist.barrier()
    if "load" in tasks:
        run = made(1)
        assert run.resume(folder / "checkpoints")
        assert (run.state.images_seen, run.state.step) == (20, 2)
        truth, found = load_file(folder / "truth.safetensors"), whole(run)
        assert truth.keys() == found.keys()
        assert all(torch.equal(truth[key], found[key]) for key in truth)
        assert all(hasattr(t, "device_mesh") for k, t in optimizer_tensors(run.denoiser, run.optimizer).items()
                   if k.startswith("exp_avg"))
        stepped(run)  # the optimizer works with what it got
    if "full" in tasks:
        import errno, shutil
        run = made(0)
        usage = shutil.disk_usage("/")
        said = []
        writer = saver(folder / "full", said.append)
        stepped(run)
        if rank == 0:
            shutil.disk_usage = lambda _: usage._replace(free=0)
        run.save(writer)
        writer._join()
        assert writer.missed == 1, said
        try:
            writer.wait()
        except ValueError as error:
            print(rank, error, flush=True)
        else:
            raise AssertionError("the last save must be an error")
        if rank == 1:  # a disk of its own
            def broken(*_, **__):
                raise OSError(errno.ENOSPC, "No space left on device")
            import torch.distributed.checkpoint.filesystem as filesystem
            filesystem.FileSystem.create_stream = broken
        shutil.disk_usage = lambda _: usage
        run.save(writer)
        writer._join()
        assert writer.missed == 2, said
        dist.barrier()
        assert not any((folder / "full").iterdir())
dist.barrier()  # a rank that leaves while the other is at work may abort
dist.destroy_process_group()
"""


def ranks(world: int, folder: Path, *tasks: str) -> str:
    """Run `tasks` on so many gloo ranks; returns what they said."""
    code = folder / "ranks.py"
    code.write_text(RANKS)
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    started = [
        subprocess.Popen(
            [sys.executable, str(code), str(folder), str(rank), str(world), *tasks],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(said)
    return "".join(said)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints: of one process, which two ranks have read, and of those two ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    run = Training(seed=2)
    run.step()
    with saver(folder / "plain") as writer:
        run.save(writer)
    save_file(run.tensors(), folder / "plain.safetensors")
    said = ranks(2, folder, "plain", "save", "load", "full")
    (folder / "said").write_text(said)
    return folder


def test_what_two_ranks_publish_is_whole_and_holds_no_pickle(saved):
    folder = saved / "checkpoints" / "20"
    assert newest(saved / "checkpoints") == folder
    assert fault(folder) is None
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} == {".safetensors", ".json"}
    assert files - {"manifest.json"} == json.loads((folder / "manifest.json").read_text()).keys()
    assert len([name for name in files if name.startswith("optimizer/")]) == 2
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["10", "20"]
    truth = load_file(saved / "truth.safetensors")
    for name in ("model", "ema", "ema_0.100"):
        network = load_denoiser(folder / "denoiser", name)
        assert all(torch.equal(t, truth[f"{name}/{key}"]) for key, t in network.state_dict().items())


def test_two_ranks_get_back_equal_bits_and_one_rank_too(saved):
    ranks(1, saved, "load")


def test_one_process_without_shards_gets_back_equal_bits(saved):
    run = Training(seed=1)
    assert run.resume(saved / "checkpoints")
    assert equal(run.tensors(), load_file(saved / "truth.safetensors"))


def test_no_room_on_one_rank_is_agreed_on_by_both(saved):
    assert (saved / "said").read_text().count("full/10 was not written: checkpoint needs") == 2
