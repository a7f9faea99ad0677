"""Several hosts on one machine. Each is a set of namespaces with its own name, network, processes, home and sshd.

Namespaces, interfaces and mounts live as long as processes that die with this one, so nothing outlasts the tests,
however the tests end.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import mkstemp

import psutil

from tests.ranks import ENVIRONMENT, ROOT, Launched

PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PACKAGES = {"sshd": "openssh-server", "ssh": "openssh-client", "ip": "iproute2", "tc": "iproute2"}
_PACKAGES["ethtool"] = "ethtool"
_SLURM_PACKAGES = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "munged": "munge"}


def why_not(slurm: bool = False) -> str | None:
    """Return why this machine cannot make such hosts, or None if it can."""
    if os.geteuid() != 0:
        return "hosts on one machine are namespaces, and those need root"
    needed = _PACKAGES | (_SLURM_PACKAGES if slurm else {})
    if missing := {package for name, package in needed.items() if shutil.which(name, path=PATH) is None}:
        return f"not installed: {' '.join(sorted(missing))} (make cluster-packages)"
    try:
        with _namespaces("ip link add bridge type bridge && ip link add one type veth peer name other"):
            return None
    except OSError as error:
        return f"this machine makes no namespaces: {error}"


class Host:
    """A host with its own processes, network interface `eth0`, home, `/run`, and disk `local`."""

    def __init__(self, name: str, address: str, folder: Path, init: int, switch: int) -> None:
        self.name = name
        self.address = address
        self.home = folder / name
        self.local = folder / "local"
        self.init = init
        self.switch = switch
        self.daemons: set[int] = set()
        """Processes that keep running between tests."""

    def command(self, *command: object, **variables: str) -> list[str]:
        """Return a command line that runs `command` on this host, in the project's folder and environment."""
        mine = {"HOME": str(self.home), "PATH": PATH, "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", **ENVIRONMENT}
        kept = {name: value for name, value in os.environ.items() if name.startswith("HF_")}
        settings = [f"{name}={value}" for name, value in (kept | mine | variables).items()]
        namespaces = ["nsenter", f"--target={self.init}", "--net", "--uts", "--mount", "--pid"]
        # a test suite in the background may ignore SIGINT; shells inherit that, and then cannot trap the signal
        clean = ["env", "--ignore-environment", "--default-signal=INT", f"--chdir={ROOT}"]
        return [*namespaces, *clean, *settings, *map(str, command)]

    def run(self, *command: object, **variables: str) -> str:
        """Run a command, and return what it prints."""
        done = subprocess.run(self.command(*command, **variables), capture_output=True, text=True, timeout=30.0)
        assert done.returncode == 0, f"{self.name}: {shlex.join(map(str, command))}: {done.stderr}"
        return done.stdout

    def launch(self, *command: object, log: Path, **variables: str) -> Launched:
        """Start a command."""
        return Launched(self.command(*command, **variables), log, timeout=240.0)

    def signal(self, run: Launched, number: signal.Signals) -> None:
        """Send a signal to a launched command. The process that `launch` starts waits outside and forwards nothing."""
        os.kill(_child(run.process.pid), number)

    def processes(self) -> dict[int, list[str]]:
        """Return the command lines of this host's processes, by process id outside of the namespace."""
        namespace = os.readlink(f"/proc/{self.init}/ns/pid")
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(entry / "ns" / "pid") == namespace:
                    words = (entry / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
                    if words != [""]:  # a zombie has no command line
                        found[int(entry.name)] = words
            except OSError:  # the process has just ended
                continue
        return found

    def ranks(self) -> list[int]:
        """Return the processes of ranks that a script of `launch/` has started.

        A rank that starts a program is there twice for a moment.
        """
        found = [pid for pid, words in self.processes().items() if words[1:4] == ["-u", "-m", "selfgen_ds"]]
        children = {child.pid for pid in found if psutil.pid_exists(pid) for child in psutil.Process(pid).children()}
        return [pid for pid in found if pid not in children]

    def link(self, state: str) -> None:
        """Set the state of the network interface: `down` or `up`."""
        self.run("ip", "link", "set", "eth0", state)

    @contextmanager
    def replaced(self, file: Path, content: str) -> Iterator[None]:
        """Replace the content of a file on this host alone, while in the context."""
        other = Path(mkstemp(dir=self.home)[1])
        other.write_text(content)
        self.run("mount", "--bind", other, file)
        try:
            yield
        finally:
            self.run("umount", file)

    def reset(self) -> None:
        """Kill the processes that a test left, and set the network interface up."""
        for pid in self.processes().keys() - self.daemons:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.link("up")


@contextmanager
def far_apart(hosts: list[Host], rate: str, delay: float) -> Iterator[None]:
    """Limit the rate between two hosts, and delay every frame by `delay` seconds, while in the context."""
    names, at_the_switch = [host.name for host in hosts], ["nsenter", f"--target={hosts[0].switch}", "--net"]
    plug = "; ".join(f"ip link set {name} {{0}}" for name in names)
    for host in hosts:
        # without offloads, frames are as on a wire: not merged, and with checksums
        host.run(
            "sh", "-ec", f"ethtool -K eth0 tx off; tc qdisc add dev eth0 root tbf rate {rate} burst 32kb latency 1s"
        )
    subprocess.run([*at_the_switch, "sh", "-ec", plug.format("nomaster")], check=True)
    relay = [*at_the_switch, sys.executable, str(Path(__file__).with_name("relay.py")), *names, str(delay)]
    cable = subprocess.Popen(["setpriv", "--pdeathsig=KILL", *relay], stdout=subprocess.PIPE)
    try:
        assert cable.stdout is not None
        assert cable.stdout.readline() == b"ready\n"
        yield
    finally:
        cable.kill()
        cable.wait()
        subprocess.run([*at_the_switch, "sh", "-ec", plug.format("master bridge")], check=True)
        for host in hosts:
            host.run("sh", "-ec", "tc qdisc del dev eth0 root; ethtool -K eth0 tx on")


@contextmanager
def hosts(folder: Path, number: int) -> Iterator[list[Host]]:
    """Make hosts on one switch, named node1, node2, and so on. Every host can log in to every host by name."""
    names = {f"node{n}": f"10.77.0.{n}" for n in range(1, number + 1)}
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    (folder / "local").mkdir()
    with ExitStack() as stack:
        switch = stack.enter_context(_namespaces("ip link add bridge type bridge && ip link set bridge up"))
        found = []
        for name, address in names.items():
            init = stack.enter_context(_namespaces(_boot(name, names, folder)))
            host = Host(name, address, folder, init, switch)
            port = f"{name} type veth peer name eth0 netns {host.init}"
            connect = f"ip link add {port} && ip link set {name} master bridge up"
            subprocess.run(["nsenter", f"--target={switch}", "--net", "sh", "-ec", connect], check=True)
            host.run("sh", "-ec", f"ip address add {address}/24 dev eth0 && ip link set eth0 up")
            host.daemons = set(host.processes())
            found.append(host)
        yield found


def _boot(name: str, names: dict[str, str], folder: Path) -> str:
    """Return the shell commands that turn new namespaces into a host."""
    home = folder / name
    (home / ".ssh").mkdir(parents=True)
    settings = {"IdentityFile": folder / "key", "UserKnownHostsFile": home / "known_hosts", "LogLevel": "ERROR"}
    lines = [f"{key} {value}" for key, value in (settings | {"StrictHostKeyChecking": "accept-new"}).items()]
    (home / ".ssh" / "config").write_text("\n".join(lines) + "\n")
    # as Debian's installer writes the file: the host's own name is a loopback address
    known = ["127.0.0.1 localhost", f"127.0.1.1 {name}"]
    known += [f"{address} {other}" for other, address in names.items() if other != name]
    (home / "hosts").write_text("\n".join(known) + "\n")
    users = Path("/etc/passwd").read_text().splitlines()
    root = f"root:*:0:0:root:{home}:/bin/bash"  # ssh and sshd find the home here
    (home / "passwd").write_text("\n".join([root, *(u for u in users if not u.startswith("root:"))]) + "\n")
    options = [f"AuthorizedKeysFile={folder / 'key.pub'}", "StrictModes=no", "UsePAM=no", "PidFile=none"]
    daemon = ["/usr/sbin/sshd", "-f", "/dev/null", "-h", folder / "key", *(o for x in options for o in ("-o", x))]
    return f"""
        hostname {name}
        ip link set lo up
        mount -t tmpfs tmpfs /run
        mkdir /run/sshd
        mount -t tmpfs tmpfs {folder / "local"}
        for file in passwd hosts; do mount --bind {home}/$file /etc/$file; done
        {shlex.join(map(str, daemon))}
    """


@contextmanager
def _namespaces(boot: str) -> Iterator[int]:
    """Make namespaces in which a shell has run `boot`. Yield their first process, with which all others end."""
    kinds = ["--net", "--uts", "--mount", "--pid", "--mount-proc"]
    # the shell keeps running, and adopts processes whose parents have ended
    script = f"set -e\n{boot}\necho ready\nwhile :; do sleep 1000 & wait; done"
    command = ["setpriv", "--pdeathsig=KILL", "unshare", *kinds, "--fork", "--kill-child", "bash", "-c", script]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert holder.stdout is not None
        if (said := holder.stdout.readline()) != "ready\n":
            raise OSError(said.strip())
        yield _child(holder.pid)
    finally:
        holder.kill()
        holder.wait()


def _child(parent: int) -> int:
    return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])
