"""Gives processes that work together the environment variables that torchrun gives to those it starts."""

import socket


def torchrun_variables(processes: int) -> list[dict[str, str]]:
    """Return the variables of every process, in the order of the ranks. All processes are on this machine.

    The port is free at the time of the call. Another program may take it before the first process listens on it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
