"""A Slurm on the hosts of a test: slurmctld on the first one, slurmd on each."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from tests.cluster.hosts import Host

_CONF = """
ClusterName=selfgen
SlurmctldHost={first}
SlurmUser=root
ProctrackType=proctrack/pgid
TaskPlugin=task/none
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
"""


class Slurm:
    """Jobs are submitted on the first host, from the project's folder."""

    def __init__(self, hosts: list[Host], folder: Path) -> None:
        folder.mkdir()
        self.first = hosts[0]
        self._folder = folder
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
            host.daemons |= set(host.processes())
        deadline = time.monotonic() + 30
        while self.first.run("sinfo", "--noheader", "--format=%T %D").strip() != f"idle {len(hosts)}":
            assert time.monotonic() < deadline, self.first.run("sinfo", "--long", "--Node")
            time.sleep(0.2)

    def submit(self, *arguments: str | Path) -> str:
        """The id of a job."""
        return self.first.run("sbatch", "--parsable", *arguments).strip()

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.first.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)
