"""A long network cable: a frame that arrives at one interface leaves at the other, some time later.

`python relay.py INTERFACE INTERFACE SECONDS`. Linux's netem does the same, but not every kernel has netem.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections import deque

_ALL_PROTOCOLS = socket.htons(3)
_IGNORE_OUTGOING = 23  # PACKET_IGNORE_OUTGOING of linux/if_packet.h: receive no frames that this script sends
_SOL_PACKET = 263


def relay(first: str, second: str, delay: float) -> None:
    """Relay frames until the process is killed."""
    ends = []
    for name in (first, second):
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, _ALL_PROTOCOLS)
        end.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        end.bind((name, 0))
        ends.append(end)
    other = dict(zip(ends, reversed(ends), strict=True))
    under_way: deque[tuple[float, socket.socket, bytes]] = deque()
    print("ready", flush=True)
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for end in select.select(ends, [], [], wait)[0]:
            under_way.append((time.monotonic() + delay, other[end], end.recv(1 << 16)))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, frame = under_way.popleft()
            end.send(frame)


if __name__ == "__main__":
    relay(sys.argv[1], sys.argv[2], float(sys.argv[3]))
