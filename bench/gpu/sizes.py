"""How large everything is: for a card of 80 GB, and for a dry run on a laptop."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Shapes and lengths."""

    # Of the random base, which has the shape of Llama 3.1 8B.
    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 14336
    vocabulary: int = 128256

    cached: int = 96  # sequences that it reads
    length: int = 1024  # tokens of each, half of them supervised
    segment: int = 8192  # tokens of a segment of the store
    rounds: int = 2  # of the cache and the bare forward
    answers: tuple[int, int] = (64, 256)  # sizes of the batches that it answers
    prompt: int = 128  # tokens of a prompt
    written: int = 48  # tokens of an answer

    drafted: int = 32768  # tokens of the draft vocabulary
    trained: int = 128  # sequences of the store that heads train from
    read: int = 32  # sequences of the store that eagle3 trains from, with three layers at every token
    batch: int = 8  # sequences a step
    steps: int = 12  # of training, in each form
    warmup: int = 3  # steps of them that are not timed
    default: tuple[str, ...] = ("evaluate.max_prompts=4", "evaluate.max_new_tokens=48")  # overrides of params.yaml


N_PREDICT = 3
FULL = Sizes()
_FEW = (
    "trainer.launcher=''",  # the stages' own processes are enough
    "data.max_samples=6",
    "respond.max_new_tokens=12",
    "trainer.total_epochs=1",
    "evaluate.max_prompts=1",
)
SMALL = Sizes(
    **{"hidden": 64, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 128, "vocabulary": 512, "drafted": 128},
    **{"cached": 8, "length": 64, "segment": 256, "rounds": 1, "prompt": 16, "written": 8},
    **{"trained": 96, "read": 4, "batch": 2, "steps": 3, "warmup": 1},
    answers=(8, 16),
    default=(*_FEW, "evaluate.max_new_tokens=8"),
)
