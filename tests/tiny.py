"""Small things that tests build: a base model with its tokenizer, prompts, a store of made-up features."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from spec.base import Base
from spec.corpus import TokenSequence
from spec.heads import LAST, Tap
from spec.store import codecs, features, identity
from spec.store.codecs import CODECS
from spec.store.collection import Collection
from spec.store.manifest import Manifest, make_manifest
from spec.store.plan import item_key, plan_groups

Family = Literal["gpt2", "qwen2"]

VOCAB_SIZE = 304
"""Rows of the tiny base's lm_head; its tokenizer has fewer tokens, as that of most bases has."""

HIDDEN_SIZE = 32
END = "<|im_end|>"
DOMAINS = ("maths", "code", "chat")
TAPS = (LAST, Tap(0, "all"), Tap(1))


def template(turn: str, generation: str = "<|im_start|>assistant\n", before: str = "") -> str:
    """A chat template from what it writes before all turns, for a turn m, and as its generation prompt."""
    return (
        f"{before}{{% for m in messages %}}{turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {generation!r} }}}}{{% endif %}}"
    )


TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"


def make_base(
    folder: Path,
    family: Family = "gpt2",
    hidden_size: int = HIDDEN_SIZE,
    layers: int = 2,
    spread: float = 0.3,
    ending: float = 1.5,
) -> Path:
    """Write a random causal language model with a tokenizer of its own, as save_pretrained lays it out.

    The spread of its weights is large enough for its answers to be varied (the smaller, the more they repeat
    themselves), and the end-of-turn token, whose row is `ending` times as large, ends some within a few dozen tokens.
    """
    tokenizer = _tokenizer()
    assert len(tokenizer) < VOCAB_SIZE
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": hidden_size, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 512, "initializer_range": spread}
    if family == "qwen2":
        sizes |= {"intermediate_size": 2 * hidden_size, "num_key_value_heads": 1, "tie_word_embeddings": True}
    config = AutoConfig.for_model(family, **sizes, **special)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= ending
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges and ChatML's special tokens."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>", "<|im_start|>", END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator((text for row in _rows(0, 24) for text in row.values()), trainer)
    special = {"eos_token": END, "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=template(TURN), **special)


def generate(base: Base, prompt: Sequence[int], count: int) -> list[int]:
    """The greedy answer by transformers' own loop."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = base.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@contextlib.contextmanager
def shapes_of(base: Base) -> Iterator[list[tuple[int, int]]]:
    """The shape of the ids of every forward pass of the block."""
    shapes: list[tuple[int, int]] = []

    def see(model: Any, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs.get("input_ids", *args[:1]).shape))

    hook = base.model.get_decoder().register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


def write_prompts(folder: Path, train: int = 24, val: int = 8, eval: int = 8) -> dict[str, Path]:
    """Write train.parquet, val.parquet and eval.parquet (question, answer, domain), no row twice."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, start = {}, 0
    for split, count in {"train": train, "val": val, "eval": eval}.items():
        paths[split] = folder / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(_rows(start, count)), paths[split])
        start += count
    return paths


def _rows(start: int, count: int) -> list[dict[str, str]]:
    """Rows start .. start + count, the domains in turn; their prompts fall into two buckets of length."""
    rows = []
    for i in range(start, start + count):
        domain = DOMAINS[i % len(DOMAINS)]
        question, answer = {
            "maths": (f"What is {i} plus {i + 3}?", f"{i} plus {i + 3} is {2 * i + 3}."),
            "code": (f"Write a function that adds {i} to its argument.", f"def add(x):\n    return x + {i}"),
            "chat": (f"Name {i} things that are as blue as the sky above the sea. " * (1 + i % 2), "The sky, the sea."),
        }[domain]
        rows.append({"question": question, "answer": answer, "domain": domain})
    return rows


def sequence(mask: Sequence[int], ids: Sequence[int] | None = None, domain: str = "a") -> TokenSequence:
    """A sequence with this mask; its last run of ones, if it reaches the end, is the last answer."""
    answer = 0
    while answer < len(mask) and mask[len(mask) - 1 - answer]:
        answer += 1
    tokens = np.arange(len(mask)) if ids is None else np.asarray(ids)
    return TokenSequence(tokens.astype(np.int32), np.asarray(mask, np.uint8), domain, len(mask) - answer)


def chain(count: int, vocab_size: int, seed: int = 0, longest: int = 24) -> list[TokenSequence]:
    """Sequences in which each token follows from the one before, so that heads can learn all there is in seconds."""
    generator = np.random.default_rng(seed)
    sequences = []
    for i in range(count):
        length, prompt = int(generator.integers(8, longest)), int(generator.integers(2, 5))
        ids = [int(generator.integers(vocab_size))]
        while len(ids) < length:
            ids.append((5 * ids[-1] + 3) % vocab_size)
        sequences.append(sequence([0] * prompt + [1] * (length - prompt), ids, DOMAINS[i % len(DOMAINS)]))
    return sequences


def states_of(row: TokenSequence, hidden_size: int = 8) -> NDArray[np.float32]:
    """Made-up states [T, hidden_size] that follow from the ids."""
    seed = [int(x) for x in row.ids]
    return np.random.default_rng([len(seed), *seed]).standard_normal((len(row), hidden_size)).astype(np.float32)


def store_features(
    root: Path,
    rows: Sequence[TokenSequence],
    *,
    vocab_size: int = 24,
    hidden_size: int = 8,
    dtype: str = "float32",
    segment_tokens: int = 64,
    codec: str = "none",
    states: Callable[[TokenSequence], NDArray[np.float32]] = states_of,
    taps: Sequence[Tap] = (LAST,),
) -> Manifest:
    """Put made-up features of rows into a store, in the layout of features.produce, and return their manifest.

    What layer k reads are the states plus k + 1.
    """
    base = {"name": "made-up", "revision": None, "weights": "w", "tokenizer": "t", "generation": "g"}
    keys, lengths = [item_key(row.ids, row.mask) for row in rows], [len(row) for row in rows]
    made = CODECS[codec]
    attributes = {"dtype": dtype, "width": hidden_size, "offsets": features.offsets(made)}
    collections = []
    for tap in taps:
        collection = Collection(root, "states", identity.states(base, dtype, tap, made, dtype))
        collection.create()
        collections.append(collection)
        for group in plan_groups(keys, lengths, collection.find(), lambda length: 0, segment_tokens):
            claim = collection.claim([keys[i] for i in group])
            stored = []
            for row in (rows[i] for i in group):
                vectors = states(row) + (0 if tap.layer is None else tap.layer + 1)
                kept = torch.from_numpy(vectors[features.kept_positions(row.mask, tap)]).to(getattr(torch, dtype))
                arrays = {name: codecs.to_numpy(tensor) for name, tensor in made.encode(kept).items()}
                stored.append({**arrays, "ids": row.ids, "mask": row.mask})
            claim.commit(stored, attributes, made)
    shape = {"dtype": dtype, "hidden_size": hidden_size, "vocab_size": vocab_size, "layers": 2}
    return make_manifest(collections, keys, rows, base=base, **shape, greedy=True)


def digests(collection: Collection) -> dict[str, str]:
    """Those of its segments, by name."""
    return {name: record.digest for name, record in collection.records().items()}


def anew(collection: Collection) -> Collection:
    """The same collection as another process sees it, which remembers nothing of it."""
    return Collection(collection.root, collection.kind, collection.identity)


def row_digests(collection: Collection) -> dict[str, str]:
    """Those of its rows, by key, as another process finds them."""
    records = anew(collection).records().values()
    return {key: found for record in records for key, found in zip(record.items, record.digests, strict=True)}


def at_once(work: Callable[[int], object], world: int) -> None:
    """Run work(rank) for every rank, each in a thread but for the first."""
    with ThreadPoolExecutor(world) as pool:
        others = [pool.submit(work, rank) for rank in range(1, world)]
        work(0)
    for other in others:
        other.result()


def with_instructions(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As on a CPU that has these."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True) | {"architecture": "any"})
