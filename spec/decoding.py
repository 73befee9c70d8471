"""Speculative decoding: draft, verify in one forward of the base, accept; the answer is the base's own.

The loop is LanguageModelWithSpeculator.stream; everything else is around it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from spec import acceptance, heads
from spec import base as bases
from spec.base import Base
from spec.base.taps import Tapped
from spec.config import Decode, Model
from spec.drafting import DecodingError, Drafter, Source, Sources, complete, every_source, open_lookup
from spec.heads import Speculator
from spec.kv_cache import Memory
from spec.lookup import Lookup

Pick = Callable[[Tensor, int], Tensor]
"""Logits [S, V] after S tokens, and the place in the answer of what follows the first of them -> tokens [S]."""


@dataclass(frozen=True)
class Step:
    """One forward of the base: what it added to the answer, how many drafts it had, and how many it accepted."""

    tokens: list[int]
    drafted: int
    accepted: int


@dataclass(frozen=True)
class Generation:
    """An answer and what it took. The prefill, which gives the first token, is no step."""

    tokens: list[int]  # the answer, its stop token included
    drafted: list[int]  # at each step
    accepted: list[int]  # how many of them entered the answer
    prefill_seconds: float  # wall clock to the first token
    decode_seconds: float  # from there to the last

    @property
    def tokens_per_step(self) -> float:
        """1 + accepted drafts / steps, as spec.acceptance defines it."""
        return acceptance.tokens_per_step([self.walk])

    @property
    def acceptance_rates(self) -> list[float]:
        """For i = 1, 2, .. the share of steps in which at least i drafts were accepted."""
        return acceptance.acceptance([self.walk], max(self.drafted, default=0))

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the answer by the wall clock, prefill included."""
        return len(self.tokens) / (self.prefill_seconds + self.decode_seconds)

    @property
    def walk(self) -> acceptance.Walk:
        """The steps, for the figures of spec.acceptance."""
        accepted, drafted = (np.asarray(counts, np.int64) for counts in (self.accepted, self.drafted))
        return acceptance.Walk(accepted, looping=acceptance.loops(self.tokens), drafted=drafted)


class LanguageModelWithSpeculator:
    """A base model that writes several tokens per forward if a draft predicts them.

    The answer does not depend on the draft: greedy or sampled, it is what the base alone writes (in float32 token for
    token; in bfloat16 a forward of several tokens rounds differently from one of a single token, which may decide
    between nearly equal tokens). One sequence at a time.

    The speculator is on the base's device, in the dtype in which it drafts; with None, only lookup drafts.
    """

    def __init__(
        self,
        base: Base,
        speculator: Speculator | None = None,
        decode: Decode | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        if speculator is not None:
            heads.check_base(speculator.config, base.vocab_size, base.hidden_size, "", allow_other_weights=True)
        self.base = base
        self.speculator = None if speculator is None else speculator.eval()
        self.decode, self.lookup = decode or Decode(), lookup

    @property
    def sources(self) -> dict[Source, Sources]:
        """All that can draft here; there is a speculator."""
        assert self.speculator is not None
        return every_source(self.decode, self.speculator.config, self.lookup)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        base: str | Path | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        decode: Decode | None = None,
        trust_remote_code: bool = False,
        allow_other_weights: bool = False,
    ) -> LanguageModelWithSpeculator:
        """Load a speculator and the base that it was trained for.

        Args:
            checkpoint: the speculator's folder.
            base: folder or hub id of the base, where it is no longer where the checkpoint says.
            dtype: of the weights, bfloat16 by default; spec.device.arithmetic says what they compute in.
            device: CUDA where there is one, by default.
            decode: where drafts come from.
            trust_remote_code: run code from the base's folder.
            allow_other_weights: accept a base of the same widths but other weights, such as a fine-tune.
        """
        config = heads.read_config(checkpoint)
        revision = None if base is not None else config.base_revision
        try:
            folder = bases.resolve(str(base or config.base_model_name_or_path), revision, trust_remote_code)
        except bases.BaseError as error:
            raise bases.BaseError(
                f"the base of {checkpoint} was not found; name it with --base (base= in Python): {error}"
            ) from None
        digest = bases.identify(folder, trust_remote_code)["weights"]
        name = str(dtype or torch.bfloat16).removeprefix("torch.")
        params = Model.model_validate({"dtype": name, "trust_remote_code": trust_remote_code})
        loaded = bases.load(params, folder, digest, None if device is None else torch.device(device))
        heads.check_base(config, loaded.vocab_size, loaded.hidden_size, digest, allow_other_weights=allow_other_weights)
        speculator = heads.load(checkpoint, loaded.device, loaded.model.dtype, loaded.tables)
        return cls(loaded, speculator, decode, open_lookup(checkpoint, config))

    def generate(
        self,
        input_ids: Tensor | Sequence[int],
        max_new_tokens: int = 256,
        *,
        streamer: BaseStreamer | None = None,
        **options: Any,
    ) -> Generation:
        """Answer a prompt, with the options and errors of stream; a streamer, such as transformers' TextStreamer, is
        shown the prompt and then the tokens of each step."""
        started = time.perf_counter()
        stream = self.stream(input_ids, max_new_tokens, **options)
        if streamer is not None:
            streamer.put(torch.as_tensor(input_ids).cpu())
        steps: list[Step] = []
        for step in stream:
            steps.append(step)
            if len(steps) == 1:
                prefilled = time.perf_counter()
            if streamer is not None:
                streamer.put(torch.tensor(step.tokens))
        ended = time.perf_counter()
        if streamer is not None:
            streamer.end()
        return Generation(
            tokens=[token for step in steps for token in step.tokens],
            drafted=[step.drafted for step in steps[1:]],
            accepted=[step.accepted for step in steps[1:]],
            prefill_seconds=prefilled - started,
            decode_seconds=ended - prefilled,
        )

    def stream(
        self,
        input_ids: Tensor | Sequence[int],
        max_new_tokens: int = 256,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        draft: Source | None = None,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Iterator[Step]:
        """Answer a prompt [S] or [1, S], and yield what each forward of the base adds: the prefill one token, each step
        at least one. The answer ends with a stop token, after max_new_tokens, or at the base's last position.

        Args:
            do_sample: draw from the distribution that probabilities makes of temperature, top_k and top_p; else take
                the likeliest token.
            seed: of sampling. The answer follows from it and the prompt, whatever is drafted; None draws a new one.
            draft: instead of decode.draft; "none" is plain decoding.
            attention_mask: as tokenizers give it with input_ids; all ones.
            eos_token_id: what ends an answer, instead of the base's stop tokens.

        Raises:
            DecodingError: a prompt, a parameter or a source of drafts that the base or the speculator cannot take.
        """
        ids = torch.as_tensor(input_ids)
        if ids.ndim != 1 and not (ids.ndim == 2 and len(ids) == 1):
            raise DecodingError(f"input_ids has shape {list(ids.shape)}, expected one prompt: [S] or [1, S]")
        prompt: list[int] = ids.flatten().tolist()
        if not prompt:
            raise DecodingError("the prompt is empty: the base needs a token to go on from, such as its bos token")
        if attention_mask is not None and not bool((torch.as_tensor(attention_mask) == 1).all()):
            raise DecodingError("attention_mask hides tokens: give one prompt without padding")
        stops = self.base.stop_ids
        if eos_token_id is not None:
            stops = frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
        if max_new_tokens < 1:
            raise DecodingError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        config = None if self.speculator is None else self.speculator.config
        sources = Sources(self.decode, draft or self.decode.draft, config, self.lookup)
        if not self.base.limits.takes_back and sources.source != "none":
            raise DecodingError(
                f"{type(self.base.model).__name__} keeps a recurrent state, from which rejected drafts cannot be "
                "removed: decode without drafts (draft='none')"
            )
        positions = self.base.limits.most or sys.maxsize
        if len(prompt) > positions:
            raise DecodingError(f"the prompt has {len(prompt)} tokens, but the base has {positions} positions")
        limit = min(max_new_tokens, positions - len(prompt) + 1)  # the last token of an answer is not read
        pick = _sampler(limit + 1, temperature, top_k, top_p, seed, self.base.device) if do_sample else _greedy
        return self._steps(prompt, limit, positions - len(prompt), pick, Drafter(sources), stops)

    @torch.inference_mode()
    def _steps(
        self, prompt: list[int], limit: int, room: int, pick: Pick, drafter: Drafter, stops: frozenset[int]
    ) -> Iterator[Step]:
        """The loop. At most `limit` tokens are written, and `room` read after the prompt."""
        model, device = self.base.model, self.base.device
        memory = Memory(model)
        speculator = self.speculator if drafter.sources.depth else None
        session = None if speculator is None else speculator.session()
        taps = () if speculator is None else speculator.taps
        with Tapped(model, taps) as tapped:

            def forward(tokens: Tensor, start: int, last: int) -> Tensor:  # [S] -> [last, V]
                positions = torch.arange(start, start + len(tokens), device=device)[None]
                logits = memory.forward(tokens[None], logits_to_keep=last, position_ids=positions)
                return logits[0, -last:]  # the model's own logits, after any scaling or capping

            def extend(tokens: Tensor, written: int) -> None:
                """Give the heads what the base has read, of which `written` positions lead to tokens of the answer."""
                if session is not None:
                    counts = {tap: written if tap.positions == "answers" else len(tokens) for tap in taps}
                    read = {tap: tapped.states[tap][0, : len(tokens)][-count:] for tap, count in counts.items()}
                    session.extend(read, tokens)

            inputs = torch.tensor(prompt, device=device)
            token = pick(forward(inputs, 0, 1), 0)  # [1]
            extend(torch.cat([inputs[1:], token]), 1)
            run = token.tolist()
            yield Step(run, 0, 0)
            drafter.extend(prompt)
            if self.base.limits.takes_back:
                memory.record()
            written = 1
            while written < limit and run[-1] not in stops:
                drafter.extend(run)
                # Draft: what might follow the newest token.
                draft = drafter.draft(min(limit - written, room - written))
                complete([draft], None if session is None else lambda *how: session.draft(*how)[None])
                k = len(draft.tokens)
                inputs = torch.cat([token, torch.tensor(draft.tokens, dtype=token.dtype, device=device)])  # [1 + k]
                # Verify: what the base writes after the newest token and after each draft.
                chosen = pick(forward(inputs, len(prompt) + written - 1, 1 + k), written)  # [1 + k]
                read_ids, wanted = torch.stack([inputs, chosen]).tolist()
                # Accept drafts up to the first that the base would not have written; its own token comes after them.
                accepted = acceptance.matching(read_ids[1:], wanted)
                if self.base.limits.takes_back:
                    memory.crop(accepted - k)
                if session is not None:
                    session.crop()
                extend(chosen[: accepted + 1], accepted + 1)
                token = chosen[accepted : accepted + 1]
                run = wanted[: min(accepted + 1, limit - written)]
                run = run[: next((end for end, one in enumerate(run, 1) if one in stops), None)]
                written += len(run)
                yield Step(run, k, min(accepted, len(run)))


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution that is sampled from, [.., V] -> [.., V] in float32; the filters in transformers' order: top_k
    keeps this many of the likeliest tokens (and ties with the last; 0 keeps all), then top_p the fewest of the
    likeliest that together have at least this probability."""
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        likeliest, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = likeliest.cumsum(-1) - likeliest >= top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits.softmax(-1)


def _greedy(logits: Tensor, place: int) -> Tensor:
    return logits.max(-1).indices  # argmax, a quarter of its time in bfloat16 on a CPU


def _sampler(length: int, temperature: float, top_k: int, top_p: float, seed: int | None, device: torch.device) -> Pick:
    """Sampling where the token at each place of the answer follows from a uniform number of its own.

    A token is the inverse of the cumulative distribution p at that number, and a draft d is accepted where the two
    are equal. So d is accepted with probability p(d), and else a token is drawn from p without d, renormalised:
    speculative rejection sampling (Leviathan et al. 2022, https://arxiv.org/abs/2211.17192; Chen et al. 2023,
    https://arxiv.org/abs/2302.01318) for a draft that is certain of its token, without their second draw.
    """
    if temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
        raise DecodingError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}: expected a temperature above 0 (for the "
            "likeliest token set do_sample to false), top_k of at least 0 (0: all), and 0 < top_p <= 1"
        )
    drawn = 1 - np.random.default_rng(seed).random(length)  # (0, 1]: a token of probability 0 is never met
    uniform = torch.tensor(drawn, dtype=torch.float32, device=device)

    def pick(logits: Tensor, place: int) -> Tensor:
        cumulative = probabilities(logits, temperature, top_k, top_p).cumsum(-1)  # [S, V]
        levels = uniform[place : place + len(logits), None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, levels)[:, 0]

    return pick
