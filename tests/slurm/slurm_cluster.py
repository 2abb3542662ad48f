"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd as foreground children of the test.

As root, each node has its own host name and /etc/hosts (UTS and mount namespace), as on a real cluster; without root,
the nodes are two loopback addresses. No service of the system is touched: key, socket, ports and spool are in one
folder.
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
# cred_expire=5 and sched_interval=1 shorten the wait of a requeued job from three minutes to a few seconds. On a busy
# machine nodes answer late: MessageTimeout keeps SLURM from repeating messages that would reach the next launch of a
# job, and KillWait from killing ranks that are still saving.

NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=8 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000"
)


def missing_programs() -> list[str]:
    """Return the programs that must be installed before a cluster can start."""
    path = search_path()
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def search_path() -> str:
    """Return a search path with the daemons of Debian's packages, which a user's path lacks."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@dataclass
class Cluster:
    """A cluster between `start` and `stop`; `environment` has the variables that its clients need."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp")))
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # munged refuses a socket below a folder without access for others.
        self.folder.chmod(0o755)
        self.own_hosts = os.geteuid() == 0
        self.nodes = ("n1", "n2") if self.own_hosts else ("127.0.0.1", "127.0.0.2")
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": search_path()}

    def start(self) -> None:
        """Start the cluster and wait until both nodes are idle."""
        for name in ("munge", "state", "log", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        self._configure()
        self._start_munge()
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        wait_for(lambda: self.run("sinfo", "-h", "-o", "%T").stdout.split() == ["idle"], 120, "two idle nodes")

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node, for the first time or after `kill_node`."""
        command = ["slurmd", "-D", "-N", name]
        if self.own_hosts:
            script = f'mount --bind "$0" /etc/hosts && hostname {name} && exec slurmd -D -N {name}'
            command = ["unshare", "-m", "-u", "sh", "-c", script, str(self.folder / "hosts")]
        self._daemon(name, *command)

    def kill_node(self, name: str) -> None:
        """Simulate a power cut: kill every process of the node at once, slurmd, step daemons and ranks."""
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
        """Run a client command on this cluster and capture its output as text."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=CLIENT_TIMEOUT, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done

    def job(self, job_id: str) -> dict[str, str]:
        """Return the fields of a job in SLURM: JobState, Restarts, Reason, ..."""
        words = self.run("scontrol", "-o", "show", "job", job_id).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """Return the last part of every daemon's log, for a failing test."""
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
            # The rendezvous port of a job follows from its number, and another cluster may be running on this machine.
            first_job=1 + secrets.randbelow(300),
            nodes="\n".join(rows),
        )
        (self.folder / "slurm.conf").write_text(text)
        # Otherwise slurmd looks for a cgroup file system, which containers do not mount.
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
    """Poll until a condition is true; the assertion names what did not happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.2)


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _on_node(pid: int, slurmd: int, name: str) -> bool:
    """Return True for processes of a node: by UTS namespace, or, without namespaces, slurmd and those with its name."""
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
