"""What a host has and how others reach it, for deepspeed.sh, which runs this on every host from its standard input.

    check_host.py same --config RECIPE [overrides...]    what must be the same on every host, a line each
    check_host.py route ADDRESS [PORT]                   address and interface of this host on the way to ADDRESS
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import sys
from importlib import metadata, util
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "transformers")


def same(arguments: list[str]) -> None:
    """Lines of name, tab, value; `address`, by which this host was reached, comes first."""
    connection = os.environ.get("SSH_CONNECTION", "- - 127.0.0.1 -")
    found = {"address": connection.split()[2], "python": platform.python_version()}
    found |= {package: _version(package) for package in PACKAGES}
    package = util.find_spec("selfgen_ds")
    if package is None or package.origin is None:
        sys.exit("selfgen_ds cannot be imported")
    # every editable installation has the same version: its source is compared
    folder = Path(package.origin).parent
    found["selfgen_ds"] = _hash(*sorted(folder.rglob("*.py")))

    from jsonargparse import ArgumentError

    from selfgen_ds.cli import recipe_of

    try:
        recipe, _ = recipe_of(arguments)
        json = Path(recipe.deepspeed)
        files = {"recipe": Path(arguments[1]), "deepspeed JSON": json}
        found |= {f"{name} {path}": _hash(path) for name, path in files.items()}
    except (ArgumentError, OSError, UnicodeDecodeError) as error:
        sys.exit(" ".join(str(error).split()))
    for name, value in found.items():
        print(name, value, sep="\t")


def route(address: str, port: str | None = None) -> None:
    """A line of address and interface, between tabs.

    Args:
        port: Must be free on this host.
    """
    import psutil

    family, *_, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing: the kernel looks up the route
        mine = probe.getsockname()[0]
    owners = [name for name, addresses in psutil.net_if_addrs().items() if mine in {a.address for a in addresses}]
    if port is not None:
        try:
            with socket.socket(family) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((mine, int(port)))
        except OSError as error:
            sys.exit(f"port {port}: {error.strerror} (--master_port takes another)")
    print("route", mine, owners[0], sep="\t")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _hash(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


{"same": lambda *rest: same(list(rest)), "route": route}[sys.argv[1]](*sys.argv[2:])
