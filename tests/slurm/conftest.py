"""A real SLURM of two nodes on this machine, with ports, keys and folders of its own; it ends with the tests.

Debian's `slurm-wlm` and `munge` suffice: its slurmd can be started several times on one host, and without cgroups.
"""

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
# cred_expire: how long a requeued job waits before it may start again, 120 s by default.
CONF = """
ClusterName=triptych
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=node1 NodeAddr=127.0.0.1 NodeHostname={host} Port={node1} CPUs=1 RealMemory=4000
NodeName=node2 NodeAddr=127.0.0.1 NodeHostname={host} Port={node2} CPUs=1 RealMemory=4000
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=10 State=UP
"""


@dataclass(slots=True)
class Slurm:
    """The cluster, as its commands see it."""

    environment: dict[str, str]

    def call(self, *command: str, **environment: str) -> str:
        """What a command prints, run in the checkout; AssertionError with its words if it fails."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment | environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job, by field."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "--oneliner", "show", "job", job)))

    def wait(self, job: str, log: Path, state: str = "COMPLETED", seconds: float = 240) -> dict[str, str]:
        """The job once it has ended for good, after checking that it did so in that state."""
        until = time.monotonic() + seconds
        while (found := self.show(job))["JobState"] not in ENDED and time.monotonic() < until:
            time.sleep(0.3)
        assert found["JobState"] == state, f"{found}\n{log.read_text() if log.exists() else ''}"
        return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in taken]


def daemon(stack: ExitStack, environment: dict[str, str], log: Path, *command: str) -> None:
    """Start a program that stays in the foreground; it is ended with the stack."""
    found = shutil.which(command[0], path=environment["PATH"])
    assert found
    with log.open("w") as file:
        process = subprocess.Popen([found, *command[1:]], env=environment, stdout=file, stderr=file)
    stack.callback(process.wait)
    stack.callback(process.terminate)


def wait_until(question, what: str, logs: Path) -> None:
    """Return as soon as the answer is yes; AssertionError with the ends of all logs after half a minute."""
    until = time.monotonic() + 30
    while not question():
        if time.monotonic() > until:
            tails = [f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(logs.glob("*.log"))]
            raise AssertionError("\n".join([what, *tails]))
        time.sleep(0.2)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two idle nodes of one core each."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [name for name in NEEDED if shutil.which(name, path=path) is None]:
        pytest.skip(f"{', '.join(missing)} not found; apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    ctld, node1, node2 = free_ports(3)
    conf, key, socket_path = folder / "slurm.conf", folder / "munge.key", folder / "munge.socket"
    host = socket.gethostname().partition(".")[0]
    values = {"host": host, "user": getpass.getuser(), "folder": folder, "ctld": ctld, "node1": node1, "node2": node2}
    conf.write_text(CONF.format(**values))
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "TRIPTYCH_"))}
    environment |= {"SLURM_CONF": str(conf), "PATH": path, "OMP_WAIT_POLICY": "PASSIVE"}
    slurm = Slurm(environment)

    def idle() -> bool:
        done = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=environment, capture_output=True, text=True)
        return done.stdout.split() == ["idle", "idle"]

    with ExitStack() as stack:
        munge = [f"--{name}-file={folder / f'munge.{name}'}" for name in ("key", "log", "pid", "seed")]
        daemon(stack, environment, folder / "munged.log", "munged", "-F", "--force", f"--socket={socket_path}", *munge)
        wait_until(socket_path.exists, "munged does not start", folder)
        daemon(stack, environment, folder / "ctld.log", "slurmctld", "-D", "-c", "-f", str(conf))
        for node in ("node1", "node2"):
            daemon(stack, environment, folder / f"{node}.out.log", "slurmd", "-D", "-N", node, "-c", "-f", str(conf))
        wait_until(idle, "the nodes do not become idle", folder)
        yield slurm
        subprocess.run(["scancel", "--full", f"--user={getpass.getuser()}"], env=environment, timeout=30)
        wait_until(idle, "the nodes do not become idle again", folder)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pictures of shapes, encoded."""
    from models.autoencoder import AutoencoderConfig
    from prepare.shapes import prepare_shapes

    made = tmp_path_factory.mktemp("datasets") / "shapes-64"
    vae = AutoencoderConfig(path=str(ROOT / "assets/shapes")).build()
    prepare_shapes(made, resolution=64, num_images=64, seed=0, vae=vae, two=0)
    return made
