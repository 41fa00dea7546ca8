"""A Slurm of two nodes on this machine, for the tests alone: all in one folder, on 127.0.0.1, ended by pid.

Nothing here imitates Slurm: these are its own daemons. The nodes are called 127.0.0.1 and 127.0.0.2, because
the name of a node must resolve to its address wherever the tests run. Each claims 128 processors and 8 GPUs
(plain files), so that a job may ask for what it would ask for on a real cluster.
"""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fd_scale.run.world import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "setpriv")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
USER = pwd.getpwuid(os.getuid()).pw_name
NODES = ("127.0.0.1", "127.0.0.2")

OURS = ("SLURM_", "SBATCH_", "SRUN_", "FD_SCALE_", "OMP_")
"""Variables that a test sets itself or goes without, whatever the shell around it holds."""

KILL_WAIT_S = 3
"""Between TERM and KILL when Slurm ends a job (30 by default)."""

SLURM_CONF = """\
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits as long as a credential lives: 120 s by default, and less than 5 counts as 120.
AuthInfo=socket={root}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait={kill_wait}
# Ports follow from job numbers, and another cluster of these tests may run on this machine.
FirstJobId={first_job}
ReturnToService=2
NodeName={nodes[0]} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=128 RealMemory=100000 Gres=gpu:8
NodeName={nodes[1]} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=128 RealMemory=100000 Gres=gpu:8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 MaxTime=INFINITE State=UP
"""


def absent() -> str | None:
    """Why there can be no cluster here, and what would make one possible; ``None`` where there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return (
        f"no {', '.join(missing)} on this machine: run tests/cluster/install.sh as root" if missing else None
    )


def wait_until(
    what: str, condition: Callable[[], object], timeout_s: float, detail: Callable[[], str] = str
) -> None:
    """Poll ``condition`` until it holds; an AssertionError says ``what`` did not come, and ``detail``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s} s\n{detail()}")
        time.sleep(0.1)


@dataclass(frozen=True)
class Job:
    """A submitted job; ``number`` is ``12`` or, for a task of an array, ``12_3``."""

    cluster: Cluster
    number: str
    log_path: Path

    def facts(self) -> dict[str, str]:
        """What ``scontrol show job`` says: JobState, Reason, Restarts, ..."""
        text = self.cluster.command("scontrol", "show", "job", "--oneliner", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def state(self) -> str:
        return self.facts()["JobState"]

    def wait_for(self, *states: str, timeout_s: float = 60) -> str:
        """The first of ``states`` that the job is seen in."""
        wait_until(f"job {self.number} {states}", lambda: self.state() in states, timeout_s, self.report)
        return self.state()

    def wait_for_text(self, text: str, count: int = 1, timeout_s: float = 60) -> None:
        """Until the log holds ``text`` so many times; fails at once when the job ends before."""

        def settled() -> bool:
            return self.log().count(text) >= count or self.state() in ("COMPLETED", "FAILED")

        wait_until(f"{count} x {text!r}", settled, timeout_s, self.report)
        if self.log().count(text) < count:
            raise AssertionError(f"{count} x {text!r} did not come\n{self.report()}")

    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def report(self) -> str:
        facts = self.facts()
        return f"{[facts[name] for name in ('JobState', 'Reason', 'Restarts', 'ExitCode')]}\n{self.log()}"

    def scancel(self, *options: str) -> None:
        self.cluster.command("scancel", *options, self.number)

    def warn(self) -> None:
        """Send the script what ``--signal=B:USR1@600`` sends it ten minutes before the time limit."""
        # To a task of an array, Slurm 22.05 sends it several times, and complains once the task is gone.
        words = ["scancel", "--batch", "--signal=USR1", self.number]
        subprocess.run(words, env=self.cluster.environment, capture_output=True, timeout=60, check=False)

    def end_in(self, seconds: int) -> None:
        """Move the time limit of the running job to so many seconds from now."""
        end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))
        self.cluster.command("scontrol", "update", f"jobid={self.number}", f"endtime={end}")

    def reach_time_limit(self, minutes: int) -> None:
        """Let Slurm send the warning of a limit that is 60 s ahead, until the job is back in the queue; the
        next start has so many minutes."""
        self.end_in(50)
        self.wait_for("PENDING", timeout_s=90)
        self.cluster.command("scontrol", "update", f"jobid={self.number}", f"timelimit={minutes}")


class Cluster:
    """munged, slurmctld and two slurmd; made by ``start`` and ended by ``stop``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(OURS)},
            "PATH": PATH,
            "SLURM_CONF": str(root / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Configure, start the daemons and wait until both nodes are idle."""
        self._configure()
        files = {name: self.root / f"munge.{name}" for name in ("key", "socket", "pid", "seed", "log")}
        munge_options = [f"--{name}-file={files[name]}" for name in ("key", "pid", "seed", "log")]
        self._daemon("munged", "--foreground", f"--socket={files['socket']}", *munge_options)
        wait_until("the socket of munged", files["socket"].exists, 10, self._logs)
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        wait_until("two idle nodes", self._idle, 30, self._logs)

    def clear(self) -> None:
        """Kill all jobs and wait until they are gone."""
        wait_until("an empty queue", self._emptied, 30, self._logs)

    def _emptied(self) -> bool:
        """Ends what there is, again at every call: a script may have asked for a requeue just before."""
        self.command("scancel", f"--user={USER}")
        self.command("scancel", "--signal=KILL", "--full", f"--user={USER}")
        return not self.command("squeue", "--noheader")

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        try:
            if self._daemons:
                self.clear()
        finally:
            self._end_daemons()

    def _end_daemons(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def submit(
        self, folder: Path, *arguments: str | Path, environment: Mapping[str, str] | None = None
    ) -> Job:
        """``sbatch arguments`` in ``folder``, with ``environment`` added; the log lies in ``folder``.

        The log's name is that of the templates; another script must set ``--output=%x-%j.out`` too.
        """
        text = self.command("sbatch", "--parsable", *map(str, arguments), cwd=folder, environment=environment)
        number = text.strip()
        name = re.search(r"JobName=(\S+)", self.command("scontrol", "show", "job", number))
        assert name is not None
        return Job(self, number, folder / f"{name[1]}-{number}.out")

    def task(self, array: Job, index: int) -> Job:
        """A task of a job array that has started."""
        number = f"{array.number}_{index}"
        facts = dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", number)))
        return Job(self, number, array.log_path.parent / f"{facts['JobName']}-{facts['JobId']}.out")

    def command(
        self, *words: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> str:
        """The output of a Slurm command; an AssertionError shows what it complained of."""
        done = subprocess.run(
            words,
            env={**self.environment, **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise AssertionError(f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def _configure(self) -> None:
        self.root.chmod(0o755)  # munged refuses a socket that not everybody can reach
        (self.root / "state").mkdir()
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        for index in range(8):
            (self.root / f"gpu{index}").touch()
        for node in NODES:
            (self.root / f"spool-{node}").mkdir()
        ports: list[int] = []
        while len(ports) < 3:
            ports = list({*ports, free_port()})
        settings = SLURM_CONF.format(
            root=self.root,
            user=USER,
            nodes=NODES,
            controller_port=ports.pop(),
            ports=ports,
            kill_wait=KILL_WAIT_S,
            first_job=1 + secrets.randbelow(60_000),
        )
        (self.root / "slurm.conf").write_text(settings)
        gpus = "".join(f"NodeName={node} Name=gpu File={self.root}/gpu[0-7]\n" for node in NODES)
        (self.root / "gres.conf").write_text(gpus)

    def _daemon(self, *words: str) -> None:
        # Even if this process is killed, its daemons end with it.
        with (self.root / f"{words[0]}-{len(self._daemons)}.out").open("wb") as output:
            command = ["setpriv", "--pdeathsig", "TERM", *words]
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=output, stderr=subprocess.STDOUT)
            )

    def _idle(self) -> bool:
        answer = subprocess.run(
            ["sinfo", "--noheader", "--format=%D %t"], env=self.environment, capture_output=True, text=True
        )
        return answer.stdout.split() == ["2", "idle"]

    def _logs(self) -> str:
        tails = [
            f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in self.root.glob("*.log")
        ]
        return "\n".join(tails)
