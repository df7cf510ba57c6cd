"""A Slurm of two small nodes on the loopback of this machine, for `make test-slurm` alone.

All of it lies in a folder of the test; nothing in /etc is read, and the daemons are stopped by their process ids.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=3600
MaxArraySize=11
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Slurm:
    """The cluster: its folder and the environment in which its commands find it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {**os.environ, "SLURM_CONF": str(root / "slurm.conf"), "CUDA_VISIBLE_DEVICES": ""}
        self.processes: list[subprocess.Popen] = []
        self.started: list[subprocess.Popen] = []  # by tests, which may fail before these end

    def start(self) -> None:
        root = self.root
        root.chmod(0o755)
        (root / "state").mkdir()
        for node in ("one", "two"):
            (root / f"spool-{node}").mkdir()
        (root / "key").write_bytes(secrets.token_bytes(128))
        (root / "key").chmod(0o400)
        (root / "slurm.conf").write_text(CONF.format(host=socket.gethostname(), root=root, ports=free_ports(3)))
        files = {"key-file": "key", "socket": "munge.sock", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        options = [f"--{name}={root / file}" for name, file in files.items()]
        self.daemon("munged", "--foreground", "--force", *options)
        self.until(lambda: (root / "munge.sock").exists(), "munged", seconds=120)
        self.daemon("slurmctld", "-D", "-f", root / "slurm.conf")
        for node in ("one", "two"):
            self.daemon("slurmd", "-D", "-N", node, "-f", root / "slurm.conf")
        self.until(
            lambda: self.ask("sinfo", "--noheader", "--format=%D %t").split() == ["2", "idle"],
            "two idle nodes",
            seconds=300,
        )

    def daemon(self, program: str, *options: object) -> None:
        log = open(self.root / f"{program}.out", "ab")
        process = subprocess.Popen(
            [shutil.which(program), *map(str, options)], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        log.close()
        self.processes.append(process)

    def stop(self) -> None:
        """Stop what tests left, cancel the jobs, then stop the daemons, the last first; each by its process id."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        self.ask("scancel", f"--user={os.getuid()}", "--full", "--signal=KILL")
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, *command: str) -> str:
        """Return what a command of Slurm prints; nothing when it fails."""
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=300).stdout

    def until(self, condition, what: str, seconds: float = 1200, process: subprocess.Popen | None = None) -> None:
        """Wait for something, as long as ``process`` lives."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come"
            assert process is None or process.poll() is None, f"the process ended before {what}"
            time.sleep(0.1)

    def job(self, name: str, state: str = "RUNNING") -> str:
        """Return the id of a job in a state, or nothing."""
        lines = [line.split() for line in self.ask("squeue", "--noheader", "--format=%F %T %j").splitlines()]
        return next((job for job, found, *words in lines if found == state and " ".join(words) == name), "")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """Two nodes on this machine, while the tests run."""
    if not os.environ.get("ICEFALL_KD_TEST_SLURM"):
        pytest.skip("runs with make test-slurm")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    assert not missing, f"{missing} are not installed; make test-slurm installs them"
    assert os.getuid() == 0, "Slurm's daemons need root"
    # Short and outside of what pytest keeps private: the path of a socket has at most 107 characters.
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
