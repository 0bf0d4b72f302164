"""State that is spread over ranks (DTensors of FSDP2): to the host, to disk and back, at any number of ranks.

Every rank writes its part with torch.distributed.checkpoint over safetensors, where each file's header names the
offsets of its slices; there is no `.metadata`, which would be a pickle. Weights are then put together by one rank,
so that what is published opens anywhere; the optimizer's state stays in parts.

torch.distributed.tensor and .checkpoint take seconds to import and are not, where nothing is sharded.
"""

import errno
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PATIENCE = timedelta(hours=6)  # of ranks whose part is on disk with those whose part is not


def is_part(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is spread over ranks."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory; a plain tensor is itself."""
    return tensor.to_local() if is_part(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor on every rank; of one that is spread a new copy, by a collective."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def like(tensor: Tensor, part: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """`part` in the place that `local(tensor)` has in `tensor`; mesh: the same ranks, on `part`'s device."""
    if not is_part(tensor) or mesh is None:
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def host_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks on the CPU; all ranks must call it together."""
    return mesh if mesh.device_type == "cpu" else DeviceMesh("cpu", mesh.mesh)


def spread(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, each cut as the DTensor of its name and shape in `wanted` is; others as they are."""
    return {name: _spread(tensor, wanted[name]) if name in wanted else tensor for name, tensor in tensors.items()}


def _spread(tensor: Tensor, model: Tensor) -> Tensor:
    if not is_part(model) or is_part(tensor) or model.shape != tensor.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # every rank has read the whole: nothing is sent
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def new_group() -> dist.ProcessGroup:
    """A group for a thread that writes, so that its messages never meet the training's."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


def agree(problem: OSError | None, group: dist.ProcessGroup) -> OSError | None:
    """The problem of the first rank that has one, on all ranks."""
    problems: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem and (problem.errno, str(problem.strerror)), group=group)
    first = next(filter(None, problems), None)
    return OSError(*first) if first else None


def write_parts(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Write this rank's parts of `tensors` into `folder`; all ranks of `group` together."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:  # the errors of several ranks
        cause = next(iter(error.failures.values()))[0]
        raise cause if isinstance(cause, OSError) else OSError(errno.EIO, repr(cause)) from error


def names_of(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor whose parts lie in `folder`."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (meta.size, meta.properties.dtype) for name, meta in known.items()}  # pyright: ignore[reportAttributeAccessIssue]


def read_parts(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fill `tensors`, plain or DTensors, from the parts in `folder`; each rank reads for itself what it needs."""
    import torch.distributed.checkpoint as dcp

    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist is what is meant
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def read_whole(folder: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Each tensor whose name starts with `prefix`, without it, put together from its parts in `folder`."""
    known = names_of(folder)
    wanted = {name: torch.empty(*known[name][:1], dtype=known[name][1]) for name in known if name.startswith(prefix)}
    for name, tensor in read_parts(folder, wanted).items():
        yield name.removeprefix(prefix), tensor
