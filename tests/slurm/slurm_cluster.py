"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd as foreground children of the test.

As root each node has a host name and an /etc/hosts of its own (UTS and mount namespace), as on a real cluster; without
root the nodes are named by two loopback addresses. No service of the system is touched: key, socket, ports and spool
live in one folder.
"""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CLIENT_TIMEOUT = 120.0

CONFIG = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
FirstJobId={first_job}
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=20
MessageTimeout=60
KillWait=60
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=01:00:00 State=UP
"""
# cred_expire=5 and sched_interval=1 bring the wait of a requeued job from three minutes to a few seconds. On a machine
# with other work nodes answer late: MessageTimeout keeps SLURM from telling them again what by then would reach the
# next life of a job, and KillWait from killing what still saves.

NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=8 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000"
)


def missing_programs() -> list[str]:
    """What has to be installed before a cluster can be started."""
    path = search_path()
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def search_path() -> str:
    """The daemons of Debian's packages are not on an ordinary user's path."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@dataclass
class Cluster:
    """Start with `start`, end with `stop`; `environment` is what clients of this cluster need."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp")))
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # munged refuses a socket below a folder that others cannot enter.
        self.folder.chmod(0o755)
        self.own_hosts = os.geteuid() == 0
        self.nodes = ("n1", "n2") if self.own_hosts else ("127.0.0.1", "127.0.0.2")
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": search_path()}

    def start(self) -> None:
        """Bring the cluster up; returns when both nodes are idle."""
        for name in ("munge", "state", "log", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        self._configure()
        self._start_munge()
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        wait_for(lambda: self.run("sinfo", "-h", "-o", "%T").stdout.split() == ["idle"], 120, "two idle nodes")

    def start_node(self, name: str) -> None:
        """Start a node's slurmd, for the first time or after `kill_node`."""
        command = ["slurmd", "-D", "-N", name]
        if self.own_hosts:
            script = f'mount --bind "$0" /etc/hosts && hostname {name} && exec slurmd -D -N {name}'
            command = ["unshare", "-m", "-u", "sh", "-c", script, str(self.folder / "hosts")]
        self._daemon(name, *command)

    def kill_node(self, name: str) -> None:
        """What a power cut does: every process of the node, slurmd, step daemons and ranks, is gone at once."""
        slurmd = self.daemons.pop(name)
        inside = [pid for pid in _processes() if _on_node(pid, slurmd.pid, name)]
        for pid in inside:
            _kill(pid)
        slurmd.wait()

    def stop(self) -> None:
        """Cancel all jobs, end the daemons and remove the folder."""
        self.run("scancel", "--user", getpass.getuser(), check=False)
        deadline = time.monotonic() + 30
        while self.run("squeue", "-h", check=False).stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A client command on this cluster, its output as text."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=CLIENT_TIMEOUT, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done

    def job(self, job_id: str) -> dict[str, str]:
        """What SLURM says about a job: JobState, Restarts, Reason, ..."""
        words = self.run("scontrol", "-o", "show", "job", job_id).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The end of every daemon's log, for a failing test."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in (self.folder / "log").iterdir())

    def _configure(self) -> None:
        ports = [free_port() for _ in range(1 + len(self.nodes))]
        hosts = [(name, f"127.0.{i}.1") for i, name in enumerate(self.nodes, 1)] if self.own_hosts else []
        rows = [
            NODE.format(
                name=name,
                host=name if self.own_hosts else "localhost",
                address=dict(hosts).get(name, "127.0.0.1"),
                port=port,
            )
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        text = CONFIG.format(
            folder=self.folder,
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            ports=ports,
            # The port that the ranks of a job meet at follows from its number: another cluster may be at work beside.
            first_job=1 + secrets.randbelow(300),
            nodes="\n".join(rows),
        )
        (self.folder / "slurm.conf").write_text(text)
        # Without this slurmd looks for a cgroup file system that containers do not mount.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        known = Path("/etc/hosts").read_text() + "".join(f"{address} {name}\n" for name, address in hosts)
        (self.folder / "hosts").write_text(known)

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        munge.chmod(0o700)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        paths = {"key-file": munge / "key", "socket": self.folder / "munge.sock", "pid-file": munge / "pid"}
        paths |= {"log-file": munge / "log", "seed-file": munge / "seed"}
        self._daemon("munged", "munged", "-F", *(f"--{name}={path}" for name, path in paths.items()))
        wait_for((self.folder / "munge.sock").exists, 120, "munge's socket")

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until a condition holds; the assertion says what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.2)


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _on_node(pid: int, slurmd: int, name: str) -> bool:
    """In the node's UTS namespace; without namespaces, slurmd itself and what carries the node's name."""
    try:
        if os.geteuid() == 0:
            return Path(f"/proc/{pid}/ns/uts").readlink() == Path(f"/proc/{slurmd}/ns/uts").readlink()
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return pid == slurmd or f"SLURMD_NODENAME={name}".encode() in variables


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
