"""A process that lets children of its own copy segments, and kills them; it serves as producer does."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import s3fs  # noqa: F401  # loaded before the fork

from spec.store import transfer
from spec.store.transfer import Place, Transfer
from tests.forked import run_killing
from tests.spec.store.producer import serve


def killing(step: int) -> None:
    """Let this process kill itself at this step: before a file is copied, while it is, before a folder is renamed."""
    left = [step]

    def count() -> None:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            count()
            return real(*args)

        return run

    def half(real: Callable[..., Any]) -> Callable[..., Any]:
        def run(source: Any, target: Any, **options: Any) -> Any:
            if not left[0]:
                Path(target).write_bytes(Path(source).read_bytes()[:-3])
            count()
            return real(source, target, **options)

        return run

    for name in ("download", "upload"):
        setattr(Place, name, counted(getattr(Place, name)))
    shutil.copyfile = half(shutil.copyfile)  # type: ignore[assignment]
    Path.replace = counted(Path.replace)  # type: ignore[method-assign]
    transfer.THREADS = 1  # or the step would not be the same one each time


def run(source: str, target: str, step: int | None = None) -> dict[str, Any]:
    """Copy in a child, which is killed at a step; its status is -9 where it was killed."""

    def body() -> None:
        if step is not None:
            killing(step)
        work = Transfer(Place(source), Place(target))
        work.copy(work.look())

    return run_killing(body)


if __name__ == "__main__":
    serve(run)
