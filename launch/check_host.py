"""What a host has and how it reaches others. deepspeed.sh runs this on all of them, mpirun.sh here.

    check_host.py same --config RECIPE [overrides...]    what has to be the same on all hosts
    check_host.py route ADDRESS                          this host's address and interface on the way there

Prints lines of a name and a value with a tab between; what is wrong is the last line of the errors.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from pathlib import Path


def same(arguments: list[str]) -> dict[str, str]:
    """And `address`, at which this host was reached."""
    from jsonargparse import ArgumentError

    from selfgen_ds.cli import recipe_of
    from selfgen_ds.versions import versions

    try:
        recipe, _ = recipe_of(arguments)
        files = {"recipe": arguments[1], "DeepSpeed JSON": recipe.deepspeed}
        hashes = {f"{n} {file}": hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for n, file in files.items()}
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")
    except (ArgumentError, UnicodeDecodeError) as error:
        sys.exit(" ".join(str(error).split()))
    connection = os.environ.get("SSH_CONNECTION", "- - 127.0.0.1 -")
    return {"address": connection.split()[2]} | versions() | hashes


def route(address: str) -> dict[str, str]:
    """`address` and `interface`: those on the way to `address`, or of the interface that GLOO_SOCKET_IFNAME names."""
    import psutil

    interfaces = psutil.net_if_addrs()
    if chosen := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        mine = next((a.address for a in interfaces.get(chosen, []) if a.family == socket.AF_INET), None)
        if mine is None:
            sys.exit(f"GLOO_SOCKET_IFNAME: there is no interface {chosen} with an address")
        return {"address": mine, "interface": chosen}
    family, _, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # nothing is sent: the kernel looks up the route
        mine = probe.getsockname()[0]
    owner = next(name for name, addresses in interfaces.items() if mine in [a.address for a in addresses])
    return {"address": mine, "interface": owner}


if __name__ == "__main__":
    found = same(sys.argv[2:]) if sys.argv[1] == "same" else route(sys.argv[2])
    for name, value in found.items():
        print(name, value, sep="\t")
