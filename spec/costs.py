"""What a run will cost: bytes of the store and seconds of each stage, by the formulas of docs/scaling.md."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from spec import heads
from spec.config import Config
from spec.device import synchronize
from spec.errors import SpecError
from spec.heads import LAST, Layer, OnBase
from spec.store.codecs import CODECS

SIZE = {"none": 1.0, "zstd": 0.69, "fp8": 0.85}
"""What compression leaves of Codec.position_bytes, as measured on real states (docs/store.md)."""

BYTES_A_TOKEN = 5
"""Its id and its mask."""

LAYERS = 32
"""Of a base that is planned for; which layers a head reads does not change what they cost."""


@dataclass(frozen=True)
class Machine:
    """One device, or several of the same kind; rates are of each, a second."""

    flops: float  # of matrix products in what the base computes in
    bandwidth: float  # bytes read from memory
    weight_bytes: int = 2  # of one of the base's weights in what it computes in
    devices: int = 1


@dataclass(frozen=True)
class Job:
    """A run."""

    base_params: float  # parameters N of the base that a token passes through
    hidden_size: int  # d
    tokens: float  # of all sequences, prompts included
    positions: float  # stored states; about the tokens of the answers
    answers: float  # tokens that the base has yet to write
    rows: int  # answers that are written together (respond.batch_size)
    head_operations: float  # weights that the heads multiply for a position (Speculator.operations)
    # Weights that are multiplied to make the base's logits after a position (optim.loss=kl): its lm_head, once for
    # heads that share their output matrix, else once a head; never with ce.
    teacher_operations: float = 0
    layer_vectors: float = 0  # stored vectors of the base's layers


def make_job(
    config: Config,
    base_params: float,
    hidden: int,
    vocab: int,
    tokens: float,
    positions: float,
    answers: float,
    layers: int = LAYERS,
) -> Job:
    """What the parameters make of a base and its data; a SpecError says that this base cannot have such heads."""
    params = config.model.speculator
    base = OnBase(hidden_size=hidden, vocab_size=vocab, layers=layers, base_model_name_or_path="", base_digest="")
    shape = heads.on_base(params, base, Layer.at(hidden))
    try:
        others = [tap for tap in shape.taps(layers) if tap != LAST]
    except ValueError as error:
        raise SpecError(f"model.speculator.{error}") from None
    teachers = params.output_matrices if config.optim.loss == "kl" else 0
    return Job(
        base_params=base_params,
        hidden_size=hidden,
        tokens=tokens,
        positions=positions,
        answers=answers,
        rows=config.respond.batch_size,
        head_operations=heads.method(params.method).operations(shape),
        teacher_operations=teachers * shape.head_rows * hidden,
        layer_vectors=sum(tokens if tap.positions == "all" else positions for tap in others),
    )


def passed_params(model: Any) -> int:
    """Parameters of a causal model that a token passes through: all but the embedding, which is looked up (and counts
    where it is lm_head as well)."""
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    return sum(p.numel() for p in model.parameters() if tied or p is not embedding)


def stored_bytes(job: Job, dtype: str, codec: str, layer_codec: str) -> float:
    """Bytes on the disk: vectors x bytes of each x what compression leaves, and ids and masks."""
    found = job.tokens * BYTES_A_TOKEN
    for vectors, name in ((job.positions, codec), (job.layer_vectors, layer_codec)):
        found += vectors * CODECS[name].position_bytes(job.hidden_size, dtype) * SIZE[name]
    return found


def prefill_seconds(job: Job, machine: Machine) -> float:
    """Seconds of one pass of the base over every sequence (cache): 2 N operations a token."""
    return 2 * job.base_params * job.tokens / (machine.flops * machine.devices)


def answer_seconds(job: Job, machine: Machine) -> float:
    """Seconds in which the base writes the answers (respond), attention left out.

    A step of `rows` answers reads all weights once and does 2 N operations a row; it takes the longer of the two.
    """
    reading = machine.weight_bytes * job.base_params / machine.bandwidth
    step = max(reading, 2 * job.base_params * job.rows / machine.flops)
    return job.answers / job.rows * step / machine.devices


def epoch_seconds(job: Job, machine: Machine) -> float:
    """Seconds of one epoch over the cached positions (train).

    Forward and backward are 6 operations a weight that the heads multiply; a teacher's logits are made forward alone.
    """
    operations = 6 * job.head_operations + 2 * job.teacher_operations
    return operations * job.positions / (machine.flops * machine.devices)


def loop_epoch_seconds(job: Job, machine: Machine) -> float:
    """Seconds of one epoch with the base in the loop, as trainers without a cache have it.

    The first epoch over a cache costs as much; every further epoch, head and run saves prefill_seconds.
    """
    return prefill_seconds(job, machine) + epoch_seconds(job, machine)


def measure(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Machine:
    """The device's rates, from products of square matrices that fill it and from copies of 256 MiB.

    The matrices are random, because a GPU multiplies ones and zeros faster.
    """
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    flops = 2 * side**3 * _times_a_second(lambda: a @ b, device, seconds / 2)
    block, copy = torch.ones(2, 2**26, device=device)
    bandwidth = 2 * block.nbytes * _times_a_second(lambda: copy.copy_(block), device, seconds / 2)
    return Machine(flops, bandwidth, dtype.itemsize)


def _times_a_second(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            work()
        synchronize(device)
        return time.perf_counter() - began

    run(1)  # first calls allocate and choose kernels
    count = max(1, int(seconds / max(run(1), 1e-6)))
    return count / run(count)
