"""A checkpoint is a folder named by the images seen: safetensors and JSON, published whole or not at all.

    denoiser/config.json  denoiser/model.safetensors  denoiser/ema.safetensors (and ema_<sigma_rel>.safetensors)
    optimizer.safetensors (or optimizer/, in parts by rank)  guard.safetensors
    state.json  pipeline.json  config.json  manifest.json

Where adapters are trained, these files hold the adapters alone, and pipeline.json says what they stand on.
`inference.pipeline` opens it as it is; nothing is pickled. The loop waits while the state is copied to the host; a
thread writes, hashes, syncs, renames and prunes. Old folders go only after a newer one was read back whole.
"""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from inference.description import Description
from models.folder import clean, discard, fault, newest, numbered, publish, write_safetensors
from models.lora import adapters
from models.weights import check_fit, load_strict, plain_name, read_tensors, unwrap, write_config
from training import sharded

SCHEMA = 2  # 1 had neither guard nor further averages, and is read
SPARE = 1.05  # room asked for, as a share of what the tensors take
RETRY = 10.0  # seconds between tries of a last save
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """How often to save, in images, and what to keep.

    keep: the newest so many. keep_every: those at multiples of so many images are never removed. snapshot_every: the
    averages of those at multiples of it stay in `snapshots`, without the rest. background: write beside the training.
    patience: seconds that the last save of a run waits for room on the disk.
    """

    every: int = 100_000  # images between two checkpoints
    keep: int = 2
    keep_every: int | None = None
    snapshot_every: int | None = None
    background: bool = True
    patience: int = 600

    def __post_init__(self):
        if self.every <= 0 or self.keep < 1:
            raise ValueError(
                f"checkpoint.every={self.every} and checkpoint.keep={self.keep} must be positive; choose larger ones"
            )
        for key in ("keep_every", "snapshot_every"):
            value = getattr(self, key)
            if value is not None and (value <= 0 or value % self.every):
                raise ValueError(
                    f"checkpoint.{key}={value} is not a multiple of checkpoint.every={self.every};"
                    f" choose {max(1, round(value / self.every)) * self.every}, or null for none"
                )
        if self.patience < 0:
            raise ValueError(f"checkpoint.patience={self.patience} is negative; choose 0 not to wait for room")


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Where a run stands. The images seen fix data order, noise, times and learning rate; the rest is counted."""

    images_seen: int = 0
    step: int = 0
    skipped: int = 0  # updates dropped for a non-finite gradient
    damaged: int = 0  # images that could not be read
    seconds: float = 0.0


@dataclass(slots=True)
class _Snapshot:
    """What one save writes: tensors on the host by file, and the rest as it was."""

    state: dict[str, Any]
    files: dict[str, dict[str, Tensor]]
    model: Any  # its config.json
    description: Description
    config: dict[str, Any]

    def nbytes(self) -> int:
        """Of all tensors, whole."""
        return sum(tensor.numel() * tensor.itemsize for file in self.files.values() for tensor in file.values())


class Saver:
    """Writes the checkpoints of one run; use it with `with`, so that what it writes is whole before the run goes.

    All ranks call `save` and `wait`. Where state is plain, rank 0 works and the others return at once; where it is
    sharded, each writes its part. missed: saves that found no room, none of which ended the run.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, say: Callable[[str], None] = print):
        self.folder, self.config, self.say = folder, config, say
        self.missed = 0
        self.seconds = 0.0  # that the last save took beside the training
        self.stall = 0.0  # that it kept the training waiting
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._group: dist.ProcessGroup | None = None  # made with the first sharded save
        self._meshes: dict[Any, Any] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._full: tuple[_Snapshot, str] | None = None  # a save that found no room, and why

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._thread:
            self._thread.join()
        if error is None:
            self.wait()

    def check(self, denoiser: nn.Module, emas: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """Refuse to start where not even one checkpoint fits; state not made yet is counted as AdamW's."""
        weights = sum(_nbytes(kept(module).values()) for module in (denoiser, *emas.values()))
        moments = _nbytes(optimizer_tensors(denoiser, optimizer).values())
        free = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        reason = self._lacking(weights + (moments or 2 * _nbytes(free)))
        if reason and self._rank == 0:
            raise ValueError(reason)

    def save(
        self,
        state: TrainState,
        denoiser: nn.Module,
        emas: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        guard_tensors: Mapping[str, Tensor],
        description: Description,
        config: dict[str, Any],
    ) -> None:
        """Copy everything to the host and return; a thread publishes `folder`/<images seen>.

        Waits for the save before, and raises what it met. No room on the disk is said and counted instead, and the
        next save tries again.
        """
        started = time.perf_counter()
        self._join()
        inner = unwrap(denoiser)
        networks = {"denoiser/model": inner} | {f"denoiser/{name}": unwrap(ema) for name, ema in emas.items()}
        files = {name: kept(net) for name, net in networks.items()}
        files |= {"optimizer": optimizer_tensors(denoiser, optimizer), "guard": dict(guard_tensors)}
        parts = any(sharded.is_part(tensor) for file in files.values() for tensor in file.values())
        if self._rank and not parts:
            return
        if parts and self._group is None:
            self._group = sharded.new_group()
        copied = self._copy({name: tensors for name, tensors in files.items() if tensors})
        snapshot = _Snapshot(asdict(state), copied, inner.config, description, config)
        self._start(snapshot)
        if not self.config.background:
            self._join()
        self.stall = time.perf_counter() - started

    def wait(self) -> None:
        """Until all is on disk; to be called before a run ends. A last save that found no room is tried again for
        `checkpoint.patience` seconds, then an error."""
        self._join()
        for _ in range(int(self.config.patience / RETRY)):  # tries, not time: all ranks count alike
            if self._full is None:
                break
            time.sleep(RETRY)
            self._start(self._full[0])
            self._join()
        if self._full is not None:
            reason, self._full = self._full[1], None
            raise ValueError(reason)

    def _copy(self, files: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        copies: dict[str, dict[str, Tensor]] = {}
        buffers, parts = [], []
        for file, tensors in files.items():
            copies[file] = {}
            for name, tensor in tensors.items():
                part, mesh = sharded.local(tensor.detach()), None
                if sharded.is_part(tensor):
                    if tensor.device_mesh not in self._meshes:
                        self._meshes[tensor.device_mesh] = sharded.host_mesh(tensor.device_mesh)
                    mesh = self._meshes[tensor.device_mesh]
                buffer = self._buffers.get((file, name))
                if buffer is None or buffer.shape != part.shape or buffer.dtype != part.dtype:
                    buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
                    self._buffers[file, name] = buffer
                buffers.append(buffer)
                parts.append(part)
                copies[file][name] = sharded.like(tensor, buffer, mesh)
        torch._foreach_copy_(buffers, parts, non_blocking=True)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return copies

    def _start(self, snapshot: _Snapshot) -> None:
        self._full = None
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def _join(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _run(self, snapshot: _Snapshot) -> None:
        """The thread: one save from its copies to its published folder."""
        started, target = time.perf_counter(), self.folder / str(snapshot.state["images_seen"])
        try:
            if self._group is None:
                self._check_room(snapshot)
                self._publish(target, snapshot)
            else:
                self._publish_parts(target, snapshot, self._group)
        except OSError as error:
            if error.errno not in FULL:
                self._error = error
                return
            self.missed += 1
            self._full = snapshot, f"{target} was not written: {error.strerror}"
            self.say(self._full[1])
        except BaseException as error:
            self._error = error
        self.seconds = time.perf_counter() - started

    def _lacking(self, nbytes: int) -> str | None:
        place = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free
        if free >= nbytes * SPARE:
            return None
        return (
            f"checkpoint needs {_gigabytes(nbytes * SPARE)}, but {self.folder} has {_gigabytes(free)} free;"
            " make room there, lower checkpoint.keep, or give another outputs=..."
        )

    def _check_room(self, snapshot: _Snapshot) -> None:
        if reason := self._lacking(snapshot.nbytes()):
            raise OSError(errno.ENOSPC, reason)

    def _publish(self, target: Path, snapshot: _Snapshot, parts: Path | None = None) -> None:
        """Write, rename, keep the averages, prune: all that one process does."""
        if target.exists() and fault(target) is not None:  # it was passed over, and this is the same state
            self.say(f"{target} is broken and is written again")
            discard(target)
        if not target.exists():
            publish(target, partial(_write, snapshot, parts))
        if (every := self.config.snapshot_every) and snapshot.state["images_seen"] % every == 0:
            keep_averages(target, self.folder.parent / "snapshots" / target.name)
        try:
            prune(self.folder, self.config.keep, self.config.keep_every)
        except OSError as error:  # no reason to end a run
            self.say(f"an old checkpoint could not be removed: {error}")

    def _publish_parts(self, target: Path, snapshot: _Snapshot, group: dist.ProcessGroup) -> None:
        """Every rank its parts, then rank 0 the rest; all ranks agree on how each went before the next."""
        parts = self.folder / f".{target.name}.parts.tmp"
        weights = {
            f"{file}/{name}": tensor
            for file, tensors in snapshot.files.items() if file.startswith("denoiser/")
            for name, tensor in tensors.items()
        }  # fmt: skip
        optimizer = snapshot.files.get("optimizer", {})

        def prepare() -> None:
            self._check_room(snapshot)
            shutil.rmtree(parts, ignore_errors=True)
            for name in ("weights", "optimizer"):
                (parts / name).mkdir(parents=True)

        try:
            together(prepare if self._rank == 0 else None, group)
            together(lambda: sharded.write_parts(parts / "weights", weights, group), group)
            if optimizer:
                together(lambda: sharded.write_parts(parts / "optimizer", optimizer, group), group)
            together((lambda: self._publish(target, snapshot, parts)) if self._rank == 0 else None, group)
        finally:
            if self._rank == 0:
                shutil.rmtree(parts, ignore_errors=True)


def together(act: Callable[[], None] | None, group: dist.ProcessGroup) -> None:
    """Do it, and raise on all ranks what went wrong on any."""
    problem = None
    try:
        if act:
            act()
    except Exception as error:
        problem = error if isinstance(error, OSError) and error.errno else OSError(errno.EIO, repr(error))
    if problem := sharded.agree(problem, group):
        raise problem


def _write(snapshot: _Snapshot, parts: Path | None, aside: Path) -> dict[str, str]:
    """Fill a checkpoint's folder; returns the hashes of its safetensors."""
    (aside / "denoiser").mkdir()
    write_config(snapshot.model, aside / "denoiser")
    snapshot.description.save(aside)
    state = {"schema": SCHEMA, **snapshot.state}
    (aside / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    (aside / "config.json").write_text(json.dumps(snapshot.config, indent=1) + "\n")
    hashes = {}
    for file, tensors in snapshot.files.items():
        if parts is not None and file == "optimizer":
            (parts / file).rename(aside / file)
            continue
        if parts is not None and file.startswith("denoiser/"):
            tensors = dict(sharded.read_whole(parts / "weights", f"{file}/"))
        name = f"{file}.safetensors"
        hashes[name] = write_safetensors(aside / name, tensors)
    return hashes


def keep_averages(checkpoint: Path, target: Path) -> None:
    """Publish a checkpoint's averages as a folder of their own; the files are shared where links can be."""
    if target.exists():
        return
    known = {name: entry["sha256"] for name, entry in json.loads((checkpoint / "manifest.json").read_text()).items()}
    names = [name for name in known if name.startswith("denoiser/ema")] + ["denoiser/config.json", "pipeline.json"]

    def write(aside: Path) -> dict[str, str]:
        (aside / "denoiser").mkdir()
        for name in names:
            try:
                os.link(checkpoint / name, aside / name)
            except OSError:
                shutil.copy(checkpoint / name, aside / name)
        return {name: known[name] for name in names}

    publish(target, write)


def prune(folder: Path, keep: int, keep_every: int | None) -> None:
    """Remove all but the newest `keep` whole checkpoints and those at multiples of `keep_every` images.

    The newest is read back first: nothing older goes while it is not known to be good, and nothing newer ever goes.
    """
    if len(numbered(folder)) <= keep:
        return
    whole = newest(folder, warn=lambda _: None)
    if whole is None:
        return
    older = [path for path in numbered(folder) if int(path.name) < int(whole.name)]
    for path in older[keep - 1 :]:
        if not (keep_every and int(path.name) % keep_every == 0):
            discard(path)


def resume(
    folder: Path,
    denoiser: nn.Module,
    emas: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    say: Callable[[str], None],
) -> TrainState | None:
    """Load the newest whole checkpoint of `folder` into everything; None if nothing was ever saved there.

    A folder with checkpoints of which none can be read is an error, never a fresh start. Rank 0 looks and verifies,
    all ranks take the same; modules may be sharded, and the checkpoint of any number of ranks.
    """
    found = _agreed(lambda: _find(folder, say))
    if found is None:
        return None
    found = folder / str(found)
    known = json.loads((found / "config.json").read_text())
    known["model"] = config["model"] | known["model"]  # an older version had fewer keys
    for key in ("seed", "model"):
        if known[key] != config[key]:
            raise ValueError(
                f"{key}={config[key]} differs from {key}={known[key]} in {found}, which this run would continue;"
                " give the old value, or another name=... for a new run"
            )
    for line in changes(known, config):
        say(f"changed since {found.name} images: {line}")
    state = read_state(found)
    for name, module in {"model": denoiser, **emas}.items():
        if not (found / "denoiser" / f"{name}.safetensors").exists() and name.startswith("ema_"):
            raise ValueError(
                f"ema.sigma_rel has {name.removeprefix('ema_')}, but {found} was trained without that average, which"
                " must be kept from the first step; give ema.sigma_rel as it was, or another name=... for a new run"
            )
        load_whole(module, read_tensors(found / "denoiser", name), str(found))
    load_optimizer(denoiser, optimizer, read_optimizer(found, denoiser))
    return state


def _find(folder: Path, say: Callable[[str], None]) -> int | None:
    """Images seen of the newest whole checkpoint; what killed writers left is removed."""
    clean(folder)
    found = newest(folder, warn=say)
    if found is None and numbered(folder):
        raise ValueError(
            f"{folder} holds checkpoints, but none is whole; move the folder away to start again, or restore one"
        )
    return int(found.name) if found else None


def _agreed(look: Callable[[], int | None]) -> int | None:
    """What rank 0 finds, on all ranks; its error is everyone's."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return look()
    answer, error = torch.tensor(-2), None  # on the CPU, so over gloo
    if dist.get_rank() == 0:
        try:
            found = look()
            answer = torch.tensor(-1 if found is None else found)
        except ValueError as refused:
            error = refused
    dist.broadcast(answer, 0)
    if answer == -2:
        raise error or ValueError("rank 0 found no whole checkpoint; its message says why")
    return None if answer == -1 else int(answer)


def read_state(checkpoint: Path) -> TrainState:
    """Where the run stood; ValueError if a newer version wrote it."""
    saved = json.loads((checkpoint / "state.json").read_text())
    if (schema := saved.pop("schema")) > SCHEMA:
        raise ValueError(
            f"{checkpoint} has the state schema {schema}, and this version reads up to {SCHEMA}; continue with the"
            " version that wrote it"
        )
    return TrainState(**{key: saved[key] for key in (f.name for f in fields(TrainState)) if key in saved})


def read_guard(checkpoint: Path) -> dict[str, Tensor]:
    """The guard's tensors; none if it had none."""
    path = checkpoint / "guard.safetensors"
    return load_file(path) if path.exists() else {}


def kept(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a module: its adapters where it has some, else everything."""
    return adapters(module) or {plain_name(name): tensor for name, tensor in module.state_dict().items()}


def load_whole(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load whole tensors into what a checkpoint keeps of a module, sharded or not, strictly."""
    own = adapters(module)
    if not own:
        load_strict(module, sharded.spread(tensors, module.state_dict()), source)
        return
    check_fit(type(module.config).__name__.removesuffix("Config"), own, tensors, source)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def read_optimizer(checkpoint: Path, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by name; of one in parts, each rank reads what it needs of it."""
    if (checkpoint / "optimizer.safetensors").exists():
        return load_file(checkpoint / "optimizer.safetensors")
    if not (checkpoint / "optimizer").is_dir():  # saved before the first step
        return {}
    parameters = dict(module.named_parameters())

    def empty(key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        parameter = parameters.get(key.partition("/")[2])
        if parameter is not None and sharded.is_part(parameter) and parameter.shape == shape:
            return torch.empty_like(parameter, dtype=dtype).detach()
        return torch.empty(shape, dtype=dtype)

    wanted = {key: empty(key, *about) for key, about in sharded.names_of(checkpoint / "optimizer").items()}
    return sharded.read_parts(checkpoint / "optimizer", wanted)


def changes(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Each value of two nested configs that differs, as `key: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in new if key in old] + sorted(new.keys() ^ old.keys())
        return [line for key in keys for line in changes(old.get(key), new.get(key), f"{prefix}.{key}".strip("."))]
    return [] if old == new else [f"{prefix}: {old} -> {new}"]


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `exp_avg/blocks.0.attn.qkv.weight` and so on."""
    names: dict[Any, str] = {parameter: name for name, parameter in module.named_parameters()}
    return {
        f"{kind}/{names[parameter]}": tensor
        for parameter, entries in optimizer.state.items()
        for kind, tensor in entries.items()
    }


def load_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; names must agree with the free parameters."""
    free = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        saved.setdefault(name, {})[kind] = tensor
    if saved and saved.keys() != free:
        odd = sorted(saved.keys() ^ free)[:10]
        raise ValueError(
            f"the checkpoint's optimizer state and optim.groups disagree on {odd}; give the groups of that run"
        )
    for name, parameter in module.named_parameters():
        if name in saved:
            # the fused kernel wants the step count beside the parameter, and all in float32
            beside = {kind: tensor.to(parameter.device) for kind, tensor in saved[name].items()}
            optimizer.state[parameter] = sharded.spread(beside, dict.fromkeys(beside, parameter))


def _nbytes(tensors) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
