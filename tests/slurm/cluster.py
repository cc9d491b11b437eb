"""A real Slurm on one machine: a controller, two virtual nodes with fake GPUs, and munge, all in one folder.

Every node's daemon runs in namespaces of its own (mounts, host name, processes), so that killing it is a power cut:
nothing of it goes on. Needs root and Debian's slurmctld, slurmd, slurm-client and munge; nothing outside the folder is
touched, and all ports are on loopback.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NODES = 2
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "unshare")


def why_not() -> str | None:
    """What this machine lacks for a cluster; None if it can have one."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"no Slurm here: {', '.join(missing)} missing (Debian: slurmctld slurmd slurm-client munge)"
    if os.geteuid():
        return "a Slurm on one machine needs root, for namespaces and fake GPUs"
    probe = subprocess.run(
        ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "true"],
        capture_output=True,
        check=False,
    )
    return None if probe.returncode == 0 else "namespaces are not allowed here (unshare)"


@contextlib.contextmanager
def running(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster from its start to its stop; its folder is made."""
    cluster.folder.mkdir()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Cluster:
    """Runs from `start` to `stop`; commands see it by `environment`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._host = socket.gethostname().split(".")[0]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start everything and wait until the nodes are idle."""
        for name in ("state", *(f"spool{node}" for node in range(1, NODES + 1))):
            (self.folder / name).mkdir(parents=True)
        self._write_configuration()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._spawn(
            "munged", "munged", "--foreground", f"--key-file={key}", f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munge.pid", f"--log-file={self.folder}/munge.log",
            f"--seed-file={self.folder}/munge.seed", "--force",
        )  # fmt: skip
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._spawn("slurmctld", "slurmctld", "-D", "-c")
        for node in range(1, NODES + 1):
            self.start_node(node)
        self._wait(
            lambda: self.run("sinfo", "-h", "-o", "%T %D").stdout.strip() == f"idle {NODES}", "the nodes"
        )

    def start_node(self, node: int) -> None:
        """Start a node's daemon in its namespaces."""
        script = (
            f"hostname node{node} && mount --bind {self.folder}/hosts /etc/hosts "
            f"&& exec slurmd -D -N node{node}"
        )
        self._spawn(
            f"node{node}", "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "bash",
            "-c", script,
        )  # fmt: skip

    def cut_power(self, node: int) -> None:
        """Kill a node with everything that runs on it."""
        process = self._daemons.pop(f"node{node}")
        process.kill()
        process.wait()

    def stop(self) -> None:
        """End every daemon that was started, and what runs below it."""
        for name in sorted(self._daemons, key=lambda name: not name.startswith("node")):
            process = self._daemons[name]
            process.kill() if name.startswith("node") else process.terminate()
        for process in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()
        self._daemons.clear()

    def run(self, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
        """A client command."""
        settings = {"env": self.environment, "capture_output": True, "text": True, "check": False, **options}
        return subprocess.run(words, **settings)  # type: ignore[call-overload, no-any-return]

    def state(self, job: str) -> str:
        """A job's state, such as RUNNING, PENDING or COMPLETED; it is remembered for an hour."""
        found = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return next((word.split("=")[1] for word in found.split() if word.startswith("JobState=")), "UNKNOWN")

    def wait_for(self, job: str, *states: str, timeout: float = 240) -> str:
        """Wait until a job is in one of the states, and give that."""
        self._wait(lambda: self.state(job) in states, f"job {job} to be {' or '.join(states)}", timeout)
        return self.state(job)

    def _spawn(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                words, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def _wait(self, done: Callable[[], bool], what: str, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            if time.monotonic() > deadline:
                logs = "".join(path.read_text(errors="replace")[-1500:] for path in self.folder.glob("*.out"))
                raise TimeoutError(f"waited {timeout:.0f} s for {what}\n{logs}")
            time.sleep(0.1)

    def _write_configuration(self) -> None:
        controller, *ports = _free_ports(NODES + 1)
        folder = self.folder
        nodes = "\n".join(
            f"NodeName=node{number} NodeHostname={self._host} NodeAddr=127.0.0.1 Port={port} CPUs=64 "
            "RealMemory=1000000 Gres=gpu:8 State=UNKNOWN"
            for number, port in enumerate(ports, start=1)
        )
        (folder / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost={self._host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=2
SlurmdParameters=config_overrides
SlurmdTimeout=5
MessageTimeout=3
KillWait=5
JobRequeue=1
ReturnToService=2
MinJobAge=3600
EnforcePartLimits=ALL
GresTypes=gpu
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=node[1-{NODES}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node[1-{NODES}] MaxTime=INFINITE State=UP PriorityTier=2
"""
        )
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for number in range(8):
            subprocess.run(["mknod", str(folder / f"gpu{number}"), "c", "1", "3"], check=True)
        (folder / "gres.conf").write_text(f"NodeName=node[1-{NODES}] Name=gpu File={folder}/gpu[0-7]\n")
        names = " ".join(["localhost", self._host, *(f"node{number}" for number in range(1, NODES + 1))])
        (folder / "hosts").write_text(f"127.0.0.1 {names}\n")
