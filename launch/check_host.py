"""Print facts about a host. deepspeed.sh runs this script on every host, mpirun.sh on the host where it is started.

    check_host.py same train --config RECIPE [options...]    versions and hashes that must be equal on all hosts
    check_host.py route ADDRESS                              this host's address and interface on the route to ADDRESS

Each line holds a name and a value, with a tab between. If something is wrong, the last line on standard error says it.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys


def same(arguments: list[str]) -> dict[str, str]:
    """Return what must be equal on all hosts, and `address`, at which ssh reached this host."""
    from selfgen_ds import packaged
    from selfgen_ds.cli import recipe_of
    from selfgen_ds.errors import InputError
    from selfgen_ds.versions import versions

    try:
        recipe, _ = recipe_of(arguments[1:], arguments[0])
        files = {
            f"recipe {arguments[2]}": packaged.find(arguments[2], "recipes"),
            f"DeepSpeed JSON {recipe.deepspeed}": packaged.find(recipe.deepspeed, "ds_configs"),
        }
        hashes = {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items()}
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")
    except InputError as error:
        sys.exit("; ".join(str(error).splitlines()))
    connection = os.environ.get("SSH_CONNECTION", "- - 127.0.0.1 -")
    return {"address": connection.split()[2]} | versions() | hashes


def route(address: str) -> dict[str, str]:
    """Return this host's `address` and `interface` on the route to `address`, or those of GLOO_SOCKET_IFNAME."""
    import psutil

    interfaces = psutil.net_if_addrs()
    if chosen := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        own = next((a.address for a in interfaces.get(chosen, []) if a.family == socket.AF_INET), None)
        if own is None:
            sys.exit(f"GLOO_SOCKET_IFNAME: there is no interface {chosen} with an address")
        return {"address": own, "interface": chosen}
    family, _, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # sends nothing: the kernel only looks up the route
        own = probe.getsockname()[0]
    interface = next(name for name, addresses in interfaces.items() if own in [a.address for a in addresses])
    return {"address": own, "interface": interface}


if __name__ == "__main__":
    facts = same(sys.argv[2:]) if sys.argv[1] == "same" else route(sys.argv[2])
    for name, value in facts.items():
        print(name, value, sep="\t")
