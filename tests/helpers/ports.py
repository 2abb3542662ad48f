"""Ports for the launches of tests."""

import secrets
import socket

PORTS = range(10_000, 20_000)
"""Ports below those that the kernel gives to connections and below the rendezvous ports of SLURM jobs."""
_held: list[socket.socket] = []


def free_port() -> str:
    """Return a port without a listener, reserved until the launch uses it.

    The kernel never gives one of `PORTS` to a connection of another test. Tests in other processes skip it because this
    process binds the UDP port of the same number for its lifetime, which no launch uses.
    """
    while True:
        port = secrets.choice(PORTS)
        sign = socket.socket(type=socket.SOCK_DGRAM)
        try:
            sign.bind(("", port))
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            sign.close()
            continue
        _held.append(sign)
        return str(port)
