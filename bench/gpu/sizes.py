"""How large everything is: for a card of 80 GB, and for a dry run on a laptop."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Shapes and lengths.

    Attributes:
        hidden, layers, heads, kv_heads, intermediate, vocabulary: of the random base.
        drafted: tokens of the draft vocabulary.
        n_predict: heads.
        cached: sequences that the random base reads.
        length: tokens of each, half of them supervised.
        segment: tokens of a segment of the store.
        rounds: of the cache and the bare forward.
        answers: sizes of the batches that the random base answers.
        prompt: tokens of a prompt.
        written: tokens of an answer.
        trained: sequences of the store that heads train from.
        batch: sequences a step.
        steps: of training, in each form.
        warmup: steps of them that are not timed.
        default: parameters of the embedded default that differ from params.yaml.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    drafted: int
    n_predict: int
    cached: int
    length: int
    segment: int
    rounds: int
    answers: tuple[int, int]
    prompt: int
    written: int
    trained: int
    batch: int
    steps: int
    warmup: int
    default: tuple[str, ...]


FULL = Sizes(
    hidden=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    intermediate=14336,
    vocabulary=128256,
    drafted=32768,
    n_predict=3,
    cached=96,
    length=1024,
    segment=8192,
    rounds=2,
    answers=(64, 256),
    prompt=128,
    written=48,
    trained=128,
    batch=8,
    steps=12,
    warmup=3,
    default=("evaluate.max_prompts=4", "evaluate.max_new_tokens=48"),
)
SMALL = Sizes(
    hidden=64,
    layers=2,
    heads=2,
    kv_heads=1,
    intermediate=128,
    vocabulary=512,
    drafted=128,
    n_predict=3,
    cached=8,
    length=64,
    segment=256,
    rounds=1,
    answers=(8, 16),
    prompt=16,
    written=8,
    trained=96,
    batch=2,
    steps=3,
    warmup=1,
    default=(
        "data.max_samples=6",
        "respond.max_new_tokens=12",
        "trainer.total_epochs=1",
        "evaluate.max_prompts=1",
        "evaluate.max_new_tokens=8",
    ),
)
