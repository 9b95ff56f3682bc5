"""A real SLURM of one machine, started by the tests that need it and stopped after them.

It has a configuration, a munge socket and ports of its own, so that it disturbs no other.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import PATIENCE, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
NODES = ("node1", "node2")
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits for its credential to expire, 120 s by default
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdSpoolDir={directory}/slurmd-%n
StateSaveLocation={directory}/state
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
SlurmctldPort={ports[0]}
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MinJobAge=3600
KillWait=5
InactiveLimit=0
SlurmdParameters=config_overrides
{nodes}
PartitionName=debug Nodes={names} Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def find_program(name: str) -> str | None:
    """Daemons lie in /usr/sbin, which not every user's path has."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def configure(directory: Path, nodes: tuple[str, ...]) -> Path:
    host, ports = socket.gethostname().partition(".")[0], free_ports(1 + len(nodes))
    line = "NodeName={} NodeHostname={} NodeAddr=127.0.0.1 Port={} CPUs=4 CoresPerSocket=4"
    line += " RealMemory=8000 State=UNKNOWN"
    described = "\n".join(line.format(n, host, p) for n, p in zip(nodes, ports[1:], strict=True))
    for name in ("state", *(f"slurmd-{node}" for node in nodes)):
        (directory / name).mkdir()
    path = directory / "slurm.conf"
    settings = {"host": host, "ports": ports, "nodes": described, "names": ",".join(nodes)}
    path.write_text(CONFIGURATION.format(directory=directory, **settings))
    return path


@contextlib.contextmanager
def running_slurm(directory: Path, nodes: tuple[str, ...] = NODES) -> Iterator[None]:
    """Start it, with SLURM_CONF set meanwhile; skip the test, with the reason, where it cannot."""
    if missing := [name for name in PROGRAMS if find_program(name) is None]:
        pytest.skip(f"no SLURM on this machine: {', '.join(missing)} not found")
    if os.geteuid():
        pytest.skip("starting SLURM needs root")
    directory.chmod(0o700)
    (directory / "munge.key").write_bytes(os.urandom(128))
    (directory / "munge.key").chmod(0o400)
    configuration = configure(directory, nodes)
    munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
    options = [f"--{option}={directory}/munge.{end}" for option, end in munge.items()]
    commands = [
        ["munged", "--foreground", "--force", f"--log-file={directory}/munge.log", *options],
        ["slurmctld", "-D", "-f", str(configuration)],
        *(["slurmd", "-D", "-f", str(configuration), "-N", node] for node in nodes),
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    with pytest.MonkeyPatch.context() as patch, (directory / "daemons.log").open("wb") as log:
        patch.setenv("SLURM_CONF", str(configuration))
        patch.setenv("MASTER_ADDR", "127.0.0.1")  # a cluster's names can be resolved, these cannot
        try:
            for command in commands:
                program = str(find_program(command[0]))
                daemons.append(
                    subprocess.Popen([program, *command[1:]], stdout=log, stderr=subprocess.STDOUT)
                )
                if command[0] == "munged":
                    wait_for((directory / "munge.socket").exists, of=daemons[0])
            if not is_idle(len(nodes)):
                pytest.skip(f"SLURM did not start; see {directory}")
            yield
        finally:
            cancel_all()
            for daemon in reversed(daemons):
                daemon.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(timeout=10)
                daemon.kill()
                daemon.wait()


def cancel_all() -> None:
    """End every job and wait for it: what still runs when the daemons end runs for ever."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        left = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True)
        if left.returncode or not left.stdout.strip():
            return
        time.sleep(1)


def is_idle(num_nodes: int) -> bool:
    """Wait until all nodes take jobs."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        command = ["sinfo", "--noheader", "--Node", "--format=%T"]
        states = subprocess.run(command, capture_output=True, text=True).stdout.split()
        if states == ["idle"] * num_nodes:
            return True
        time.sleep(0.5)
    return False
