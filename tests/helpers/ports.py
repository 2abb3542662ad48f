"""Ports for the launches of tests."""

import secrets
import socket

PORTS = range(10_000, 20_000)
"""Below those that the kernel gives to connections and that jobs of SLURM meet at."""
_held: list[socket.socket] = []


def free_port() -> str:
    """A port that nobody listens on, and that nobody takes in the seconds before the launch does.

    The kernel gives none of `PORTS` to a connection of a test beside this one. Tests in other processes leave it alone
    because this one holds the UDP port of the same number for as long as it lives, in which no launch is interested.
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
