"""SIGKILL at random moments: nothing half-written is ever seen, and little is done twice."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spec.store import upkeep
from tests.spec.store import producer

KILLS = 20
IN_FLIGHT = 3
"""Segments that a worker may have begun and not committed: one computed, one that waits, one that is written."""

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(base_folder: Path) -> Iterator[Run]:
    """Lets another process run a task, as producer.run takes it."""
    with producer.serving(producer.__name__, str(base_folder)) as task:
        yield task


def begun(log: Path) -> list[str]:
    """Names of the segments that were begun, and forget them."""
    if not log.is_file():
        return []
    names = log.read_text().split()
    log.unlink()
    return names


def digests(root: Path, kind: str) -> dict[str, str]:
    """Of all segments, none of which may show damage."""
    good, damaged = producer.collection(root, kind).survey()
    assert damaged == {}
    return {name: record.digest for name, record in good.items()}


@pytest.mark.parametrize("kind", ["states", "answers"])
def test_a_killed_run_goes_on_where_it_was(run: Run, tmp_path: Path, kind: str) -> None:
    root, log = tmp_path / "whole", tmp_path / "log"
    run(root=str(tmp_path / "warm"), kind=kind, log=str(log))
    log.unlink()
    whole = run(root=str(root), kind=kind, log=str(log))
    assert whole["status"] == 0
    expected, duration = digests(root, kind), whole["seconds"]
    assert len(expected) == producer.COUNT
    assert sorted(begun(log)) == sorted(expected)
    generator = random.Random(kind)
    kills = in_the_middle = 0
    for number in range(4 * KILLS):
        if kills >= KILLS:
            break
        root = tmp_path / f"{number}"
        for _ in range(generator.choice([1, 1, 1, 2, 3])):  # the run that goes on may be killed, too
            before = digests(root, kind)
            delay = duration * generator.random()
            killed = run(root=str(root), kind=kind, log=str(log), delay=delay)
            after, names = digests(root, kind), begun(log)
            assert before.items() <= after.items() <= expected.items()
            assert set(names) >= set(after) - set(before)
            assert len(names) - (len(after) - len(before)) <= IN_FLIGHT
            if killed["status"] == 0:  # it was faster than the first one
                assert after == expected
                duration = min(duration, killed["seconds"])
                break
            assert killed["status"] == -9
            kills += 1
            in_the_middle += 0 < len(after) < len(expected)
        before = digests(root, kind)
        assert run(root=str(root), kind=kind, log=str(log))["status"] == 0
        assert digests(root, kind) == expected
        assert sorted(begun(log)) == sorted(expected.keys() - before.keys())  # nothing that was there is done again
        assert upkeep.verify(root, set_aside=False) == (len(expected), [])
        left = {path.name for path in producer.collection(root, kind).folder.iterdir()}
        # A kill within the first millisecond of the first run leaves an empty file, which nobody takes for anything.
        assert {name for name in left if not name.startswith(".identity.json.")} == {"identity.json", *expected}
    assert kills >= KILLS
    assert in_the_middle >= KILLS // 3
