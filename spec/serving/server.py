"""vLLM's OpenAI-compatible server with a base and its speculator: the command, and a process that runs it.

vLLM itself is not imported here; it has to be installed next to this project.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from spec import base as bases
from spec import export, files, heads
from spec.config import Decode
from spec.drafting import Sources, sources_of
from spec.export.eagle3 import speculative
from spec.heads import SpeculatorConfig
from spec.serving import ServingError, installed_vllm, require_vllm, untested

log = logging.getLogger(__name__)

NGRAM_DRAFT = 8
"""num_speculative_tokens with n-grams, unless asked otherwise: vLLM makes room for so many in every step."""

PROPOSER = "spec.serving.vllm.SpeculatorProposer"

EXPORT = 1
"""The version of the exports in the cache folder; raised when what an export writes changes."""


def command(
    checkpoint: Path,
    decode: Decode,
    *,
    base: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    more: Sequence[str] = (),
) -> list[str]:
    """The command that serves a base with the speculator in the folder `checkpoint`: eagle3 by vLLM's own method, the
    recurrent heads by our proposer.

    Args:
        decode: where drafts come from; draft_len bounds them (default: n_predict; with n-grams at least NGRAM_DRAFT).
            eagle3 drafts alone: whatever else is set explicitly is refused.
        base: folder or hub id of the base, where it is no longer where the checkpoint says.
        dtype: of base and speculator; auto is that of the base's checkpoint.
        trust_remote_code: run code from the base's folder.
        more: vLLM's own options.

    Raises:
        FileNotFoundError, CheckpointError: no usable checkpoint.
        DecodingError: more drafts of the heads than there are heads.
        ExportError: an eagle3 that vLLM cannot load.
        BaseError, ServingError: as plain_command; or n-grams with eagle3.
    """
    config = heads.read_config(checkpoint)
    if config.method == "eagle3" and "draft" in decode.model_fields_set and decode.draft != "head":
        raise ServingError(
            f"draft {decode.draft} with eagle3: vLLM drafts with its own method eagle3, which cannot mix in n-grams. "
            "Use --draft head, or sum_rnn or sum_lstm; this project's own decoding mixes n-grams with every method"
        )
    name = base or config.base_model_name_or_path
    plain = plain_command(name, None if base else config.base_revision, dtype, trust_remote_code)
    road = _own_method if config.method == "eagle3" else _by_proposer
    return [*plain, *road(checkpoint, config, decode), *more]


def _own_method(checkpoint: Path, config: SpeculatorConfig, decode: Decode) -> list[str]:
    """vLLM's options for eagle3; the folder that it loads is written on the first call, into the cache folder."""
    if warning := untested(installed_vllm() or "of an unknown release"):
        log.warning(warning)
    identity = files.digest_json([EXPORT, files.digest_file(checkpoint / heads.WEIGHTS), config.to_json()])
    folder = files.cache_dir() / "vllm" / identity[:16]
    if not folder.exists():  # it appears whole
        export.write(checkpoint, folder, form=export.VLLM)
    return ["--speculative-config", speculative(folder, Sources(decode, "head", config).depth)]


def _by_proposer(checkpoint: Path, config: SpeculatorConfig, decode: Decode) -> list[str]:
    """vLLM's options for a recurrent head."""
    log.warning("%s drafts through our proposer, on vLLM's deprecated model runner V1", config.method)
    length = config.n_predict if decode.draft == "head" else max(config.n_predict, NGRAM_DRAFT)
    sources_of(checkpoint, config, decode)  # says what does not fit before vLLM spends a minute on starting
    method = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": decode.draft_len or length}
    chosen = decode.model_dump(exclude_none=True)
    options = {"speculator": {"checkpoint": str(checkpoint.resolve()), **chosen}}
    return ["--speculative-config", json.dumps(method), "--additional-config", json.dumps(options)]


def plain_command(
    base: str, revision: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> list[str]:
    """The command that serves a base alone, by its name as the model's, to this machine alone.

    Raises:
        BaseError: the base is not found.
        ServingError: vLLM is not installed here.
    """
    require_vllm()
    try:
        folder = bases.resolve(base, revision, trust_remote_code)
    except bases.BaseError as error:
        raise bases.BaseError(f"the base was not found; name it with --base: {error}") from None
    # What `vllm serve` runs; that command fails in the CPU build, whose package has another name than it asks for.
    run = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    run += ["--trust-remote-code"] if trust_remote_code else []
    return [*run, "--served-model-name", base, "--dtype", dtype, "--host", "127.0.0.1"]


class Server:
    """A running server on a free port of this machine; stopped at the end of the with block.

    Args:
        arguments: as command or plain_command gives them, without a port.
        log: file that takes the server's output.
        environment: variables next to this process's.
        patience: seconds until it must answer.

    Raises:
        ServingError: it ended or did not answer in time; with what its output says.
    """

    def __init__(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] = os.environ, patience: float = 600
    ) -> None:
        self._arguments, self._log, self._patience = arguments, log, patience
        self._environment = {**os.environ, **environment}

    def __enter__(self) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        with self._log.open("wb") as file:
            self._process = subprocess.Popen(
                [*self._arguments, "--port", str(port)],
                env=self._environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:  # an interrupt, too: the server has a session of its own, and would go on
            self._stop()
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + self._patience
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                lines = self._log.read_text(errors="replace").splitlines()
                # vLLM's worker says why, long before the server gives up.
                shown = dict.fromkeys([*(line for line in lines if "Error: " in line), *lines[-20:]])
                raise ServingError("\n".join([f"the server did not start; from {self._log}:", *shown]))
            time.sleep(0.5)

    def __exit__(self, *error: object) -> None:
        self._stop()

    def counters(self) -> dict[str, float]:
        """vLLM's counters by name (/metrics), each summed over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        totals: dict[str, float] = {}
        for name, value in re.findall(r"^(vllm:\w+_total)(?:\{[^}]*\})? (\S+)$", text, re.M):
            totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _stop(self) -> None:
        """Ask it to end, and end what is left of its processes."""
        self._process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its own session's group
            self._process.wait()


def mean_acceptance_length(before: dict[str, float], after: dict[str, float]) -> float:
    """vLLM's own figure between two readings of its counters: 1 + accepted drafts / drafts (vllm/v1/spec_decode)."""
    drafts, accepted = (
        after.get(name, 0.0) - before.get(name, 0.0)
        for name in ("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total")
    )
    return 1 + accepted / drafts if drafts else 1.0
