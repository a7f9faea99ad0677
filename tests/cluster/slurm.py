"""A Slurm on the hosts of a test: slurmctld on the first host, slurmd on every host."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.hosts import Host

_CONF = """
ClusterName=selfgen
SlurmctldHost={first}
SlurmUser=root
ProctrackType=proctrack/pgid
TaskPlugin=task/none
KillWait=10
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName={names} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
PartitionName=low Nodes=ALL State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL State=UP PriorityTier=9
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=0
"""


class Slurm:
    """A Slurm that starts with this object and ends with the hosts."""

    def __init__(self, hosts: list[Host], folder: Path) -> None:
        self.first = hosts[0]
        self._hosts = hosts
        self._folders: dict[str, Path] = {}
        (folder / "state").mkdir()
        (folder / "key").write_bytes(secrets.token_bytes(128))
        (folder / "key").chmod(0o400)
        (folder / "etc").mkdir()
        names = ",".join(host.name for host in hosts)
        (folder / "etc" / "slurm.conf").write_text(_CONF.format(first=hosts[0].name, names=names, folder=folder))
        munge = f"munged --key-file={folder}/key --seed-file=/run/munge/seed --log-file=/run/munge/log"
        for host in hosts:
            controller = "&& slurmctld" if host is self.first else ""
            host.run("sh", "-ec", f"mount --bind {folder}/etc /etc/slurm && mkdir /run/munge && {munge} {controller}")
        for host in hosts:
            host.run("slurmd")
        deadline = time.monotonic() + 30
        while self.first.run("sinfo", "--noheader", "--format=%T %D").strip() != f"idle {len(hosts)}":
            assert time.monotonic() < deadline, self.first.run("sinfo", "--long", "--Node")
            time.sleep(0.2)
        for host in hosts:
            host.daemons |= set(host.processes())

    def submit(self, recipe: Path, *overrides: str, options: tuple[str, ...] = ()) -> str:
        """Submit `launch/slurm.sbatch` with one rank per node, in the recipe's folder. Return the job's id."""
        where = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--gres=none", f"--chdir={recipe.parent}")
        command = ["sbatch", "--parsable", *where, *options, "launch/slurm.sbatch", recipe, *overrides]
        job = self.first.run(*command, GLOO_SOCKET_IFNAME="eth0").strip()
        self._folders[job] = recipe.parent
        return job

    def watch(self, job: str, folder: Path) -> None:
        """Let the errors of `until` show the logs in a folder, for a job that `submit` has not started."""
        self._folders[job] = folder

    def log(self, job: str, rank: int | None = None) -> str:
        """Return the log of a job or of one of its ranks. The log is empty before the first line."""
        file = f"selfgen-ds-{job}.log" if rank is None else f"selfgen-ds-{job}/rank-{rank}.log"
        path = self._folders[job] / file
        return path.read_text() if path.exists() else ""

    def job(self, job: str) -> dict[str, str]:
        """Return the fields that `scontrol show job` prints."""
        words = self.first.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, timeout: float = 180.0) -> dict[str, str]:
        """Wait until a job is in one of the states, and return its fields."""
        deadline = time.monotonic() + timeout
        while (found := self.job(job))["JobState"] not in states:
            assert time.monotonic() < deadline, found
            time.sleep(0.3)
        return found

    def start_again(self, job: str) -> None:
        """Start a requeued job at once, instead of after the two minutes for which Slurm holds one."""
        self.until(job, lambda: not self._left())

        def runs() -> bool:
            found = self.job(job)
            if found["JobState"] == "PENDING" and found["Restarts"] != "0":
                # fails if the job has started by itself
                self.first.run("sh", "-c", f"scontrol update JobId={job} StartTime=now || true")
            return found["JobState"] == "RUNNING" and found["Restarts"] != "0"

        self.until(job, runs)

    def _left(self) -> list[list[str]]:
        """Return the command lines of all processes that are no daemons."""
        return [words for host in self._hosts for pid, words in host.processes().items() if pid not in host.daemons]

    def until(self, job: str, done: Callable[[], bool], timeout: float = 180.0) -> None:
        """Wait until `done()` is true.

        Raises:
            AssertionError: `timeout` seconds have passed. The message holds the processes and the logs of the job.
        """
        deadline = time.monotonic() + timeout
        while not done():
            if time.monotonic() > deadline:
                logs = [file.read_text()[-3000:] for file in sorted(self._folders[job].rglob("*.log"))]
                raise AssertionError("\n".join([str(self.job(job)), str(self._left()), *logs]))
            time.sleep(0.1)

    def cancel_all(self) -> None:
        """Cancel all jobs, and wait until they are gone."""
        deadline = time.monotonic() + 60
        while self.first.run("squeue", "--noheader"):
            assert time.monotonic() < deadline, self.first.run("squeue")
            self.first.run("scancel", "--user=root")
            time.sleep(0.3)
