"""Other processes, made by fork so that they start at once; what they run must touch neither Zarr nor torch."""

import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def forked(body: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """Run `body` in another process, which then sleeps; gives what kills it with SIGKILL, as does leaving the block."""
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            held = body()
            os.write(tell, b"." if held is not False else b"")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(tell)
    alive = [pid]

    def kill() -> None:
        if alive:
            os.kill(alive.pop(), signal.SIGKILL)
            os.waitpid(pid, 0)

    try:
        assert os.read(ready, 1) == b".", "the other process failed"
        yield kill
    finally:
        kill()
        os.close(ready)


def run_killing(body: Callable[[], None], delay: float | None = None) -> dict[str, Any]:
    """Run a body in a child, and kill it after `delay` seconds: its status, -9 where it was killed, and its seconds."""
    began = time.monotonic()
    child = os.fork()
    if not child:
        try:
            body()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"status": status, "seconds": time.monotonic() - began}


def free_port() -> int:
    """A port of this host at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]
