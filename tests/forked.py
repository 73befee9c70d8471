"""Other processes, made by fork so that they start at once; what they run must touch neither Zarr nor torch."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator


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
