"""A run that is interrupted, however often and wherever, comes out as one that is not, bit for bit."""

import re
import signal
import time
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from spec.training import loop
from spec.training.loop import Progress, StoppedError
from spec.training.resume import Checkpoints
from spec.workers import joined
from tests.spec.training import runs
from tests.spec.training.runs import ALONE, TOTAL, frozen_task, make_config, outcome, run, together


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_store(tmp_path_factory.mktemp("store"))


def whole(store: Path, folder: Path, method: str = "sum_rnn") -> dict[str, Any]:
    """The outcome of a run in this process, from its newest checkpoint on."""
    return outcome(frozen_task(make_config(), store, ALONE, runs.make_speculator(method)), folder)


@pytest.mark.parametrize(
    ("method", "stops"),
    [
        ("sum_rnn", [("train", 1)]),  # before the first checkpoint
        ("sum_rnn", [("val", 10)]),
        ("sum_rnn", [("train", 8), ("train", 9), ("val", 16)]),  # at the end of an epoch, behind it, at the very end
        ("sum_lstm", [("train", 14)]),
    ],
)
def test_interrupted_runs_come_out_the_same(
    store: Path, tmp_path: Path, method: str, stops: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    expected = whole(store, tmp_path / "whole", method)
    assert [step for split, step, *_ in expected["history"] if split == "train"] == list(range(1, TOTAL + 1))
    for split, step in stops:
        with pytest.raises(runs.InterruptedRunError):
            run(store, tmp_path / "parts", speculator=runs.make_speculator(method), listen=runs.interrupt(split, step))
    runs.assert_same_outcome(whole(store, tmp_path / "parts", method), expected)


@pytest.mark.parametrize("step", [1, 2, 5, 6, 7, 12, 13, 14, 15])
def test_sums_between_logs_are_kept(store: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever step a run is asked to stop at: it goes one further, saves and leaves."""
    monkeypatch.setattr(loop, "LOG_EVERY", 7)
    expected = whole(store, tmp_path / "whole")
    begun = iter(range(1, TOTAL + 1))
    checkpoints = Checkpoints(tmp_path / "parts", "key")

    def go() -> loop.Result:
        task = frozen_task(make_config(), store, ALONE)
        return loop.run(task, checkpoints, stopping=lambda: next(begun) == step)

    if step == TOTAL - 1:  # one further is the end
        assert go().steps == TOTAL
    else:
        with pytest.raises(StoppedError, match=f"stopped at step {step + 1} of 16, and saved in .*; run the same"):
            go()
        found = checkpoints.newest()
        assert found["step"] == step + 1
    runs.assert_same_outcome(whole(store, tmp_path / "parts"), expected)


def test_a_run_killed_while_saving_goes_on(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = torch.save, list[object]()

    def fail(value: Any, path: Any) -> None:
        calls.append(path)
        if len(calls) == 4:  # the second checkpoint's optimizer
            raise runs.InterruptedRunError
        save(value, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(runs.InterruptedRunError):
            run(store, tmp_path / "parts")
    runs.assert_same_outcome(whole(store, tmp_path / "parts"), whole(store, tmp_path / "whole"))


def test_points_of_before_an_interruption_keep_their_times(store: Path, tmp_path: Path) -> None:
    before: list[Progress] = []
    after: list[Progress] = []

    def listen(progress: Progress) -> None:
        before.append(progress)
        runs.interrupt("val", 10)(progress)

    with pytest.raises(runs.InterruptedRunError):
        run(store, tmp_path, listen=listen)
    resumed = time.time()
    run(store, tmp_path, listen=after.append)
    kept = [point for point in after if point.time < resumed]
    assert kept
    assert kept == before[: len(kept)]


def test_one_worker_alone_holds_a_copy_of_the_best_weights(store: Path, tmp_path: Path) -> None:
    """Of a base that is trained too, each copy is as large as the base."""
    second = replace(ALONE, rank=1)
    task = frozen_task(make_config(), store, second)
    result = loop.run(task, Checkpoints(tmp_path, "key"))
    assert result.step > 0
    assert result.weights == {}


def test_a_complete_run_is_not_trained_further(store: Path, tmp_path: Path) -> None:
    runs.assert_same_outcome(whole(store, tmp_path), whole(store, tmp_path))


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_killed_processes_come_out_where_a_whole_one_does(store: Path, tmp_path: Path, sent: signal.Signals) -> None:
    """With a signal at random moments of each; a fast machine is done before the last ones."""
    make = partial(runs.make_frozen, store)
    ends = runs.interrupted(make, tmp_path / "parts", sent)
    stopped = [message for code, message in ends if code != 0]
    assert ends[len(stopped) :] == [(0, ends[-1][1])] * (len(ends) - len(stopped))
    assert len(stopped) >= 5
    assert {code for code, _ in ends[: len(stopped)]} == {-sent if sent == signal.SIGKILL else 1}
    if sent == signal.SIGTERM:
        for message in stopped:
            assert re.fullmatch(r"stopped at step \d+ of \d+, and saved in .*; run the same command again .*", message)
        steps = [int(message.split()[3]) for message in stopped]
        assert steps == sorted(set(steps))
        for step in steps:  # each of them is a checkpoint of its own
            assert (tmp_path / f"parts/checkpoints/global_step_{step}/pytorch_model.bin").is_file()
        assert any(step % 3 for step in steps)
    runs.assert_same_outcome(runs.load_outcome(tmp_path / "parts"), outcome(make(ALONE), tmp_path / "uninterrupted"))


def stop_one(connection: Connection, arguments: tuple[Path, Path, int | None]) -> None:
    """What each of two workers runs; the second one alone is asked to stop, when it begins this step."""
    store, folder, step = arguments
    config = make_config(data={"micro_batch_size_per_gpu": 1})
    told: list[Progress] = []
    begun = iter(range(1, TOTAL + 1))
    with joined() as me:
        task = frozen_task(config, store, me)

        def stopping() -> bool:
            return next(begun) == step and me.rank == 1

        try:
            result = loop.run(task, Checkpoints(folder, "key"), told.append, stopping)
        except StoppedError as error:
            connection.send(str(error))
        else:
            connection.send({"losses": runs.losses_of(told), "step": result.step})
            torch.save(runs.weights_of(task), folder / f"weights-{me.rank}.pt")


def test_one_workers_signal_stops_all_of_them_at_one_step(store: Path, tmp_path: Path) -> None:
    (code, (message,)), other = together(2, stop_one, (store, tmp_path / "parts", 6))
    assert (code, [message]) == (0, other[1])
    assert message.startswith("stopped at step 7 of 16, and saved in ")
    found = Checkpoints(tmp_path / "parts", "key").newest()
    assert found["step"] == 7
    resumed = together(2, stop_one, (store, tmp_path / "parts", None))
    expected = together(2, stop_one, (store, tmp_path / "whole", None))
    ((losses,), (wanted,)) = ([sent for _, sent in ends[:1]] for ends in (resumed, expected))
    assert losses[0]["losses"] == pytest.approx(wanted[0]["losses"], rel=1e-12)
    assert losses[0]["step"] == wanted[0]["step"]
    for rank in range(2):
        paths = [tmp_path / part / f"weights-{rank}.pt" for part in ("parts", "whole")]
        weights, others = (torch.load(path, weights_only=True) for path in paths)
        assert all(torch.equal(weights[name], other) for name, other in others.items())
