"""Recurrent heads in vLLM's engine: a proposer for its ``custom_class`` speculative method.

    vllm serve BASE \
        --speculative-config '{"method": "custom_class", "model": "spec.serving.vllm.SpeculatorProposer",
                               "num_speculative_tokens": 3}' \
        --additional-config '{"speculator": {"checkpoint": "models/speculator", "draft": "head"}}'

vLLM gives such a proposer the tokens of each request, but not the hidden states that heads read. ``_hand_over_states``
is the one place that reaches into vLLM for them.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import vllm
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from spec import heads
from spec.config import Decode
from spec.drafting import Draft, Drafter, complete, sources_of
from spec.heads import Recurrent
from spec.section import explain
from spec.serving import TESTED, ServingError, untested

OPTIONS = "speculator"
"""Key of vLLM's additional_config that holds the checkpoint's folder and, by their names, the keys of decode."""

log = init_logger("vllm.speculator")  # vLLM shows loggers of its own namespace only


@dataclass(frozen=True)
class Verified:
    """What vLLM's model runner knows of the step it has just sampled.

    states: [rows, d] the base's states that its lm_head read: for each request, in the order of the batch, the one
        after its last token and those after its drafts.
    """

    states: Tensor
    drafted: Sequence[int] | None  # drafts that each request had in this step; None where no request had any
    requests: Sequence[str]  # id of each request

    def last_rows(self, sampled: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """For each request the row of `states` that gave its last token.

        `sampled` are the tokens that each request got in this step: its accepted drafts and the base's own after them.
        A request without any (a part of its prompt) gets a row of no meaning.

        Raises:
            ServingError: rows and requests do not fit each other.
        """
        rows = np.ones(len(sampled), np.int64) if self.drafted is None else np.asarray(self.drafted, np.int64) + 1
        if len(rows) != len(sampled) or rows.sum() != len(self.states):
            raise ServingError(
                f"{_changed()}: {len(self.states)} hidden states for {len(sampled)} requests with {self.drafted} drafts"
            )
        ends: NDArray[np.int64] = np.cumsum(rows) - rows + np.maximum([len(tokens) for tokens in sampled], 1) - 1
        return ends


class SpeculatorProposer:
    """Drafts for all requests of vLLM's batch from any source (spec.drafting).

    additional_config["speculator"] has ``checkpoint``, the speculator's folder, and any key of params.yaml's decode
    section. num_speculative_tokens is the most that a step drafts.

    Raises:
        ServingError: another vLLM than this was written for; missing or unknown options; a speculator of other
            widths than the base, or with fewer heads than tokens asked for.
    """

    def __init__(self, vllm_config: Any) -> None:
        _hand_over_states()
        self._checkpoint, self._decode = _options(vllm_config.additional_config)
        self._limit: int = vllm_config.speculative_config.num_speculative_tokens
        self._max_model_len: int = vllm_config.model_config.max_model_len
        self._dtype: torch.dtype = vllm_config.model_config.dtype
        try:
            self._config = heads.read_config(self._checkpoint)
        except FileNotFoundError as error:
            raise ServingError(f"additional_config.{OPTIONS}.checkpoint: {error}") from None
        base = vllm_config.model_config
        # Widths alone: the weights may be a fine-tune's, or quantised.
        heads.check_base(self._config, base.get_vocab_size(), base.get_hidden_size(), "", allow_other_weights=True)
        if self._decode.draft == "head" and self._limit > self._config.n_predict:
            raise ServingError(
                f"num_speculative_tokens is {self._limit}, but {self._checkpoint} was trained with n_predict "
                f"{self._config.n_predict}: ask for at most {self._config.n_predict}, or for draft=hybrid"
            )
        self._sources = sources_of(self._checkpoint, self._config, self._decode)
        self._drafters: dict[str, tuple[Drafter, int]] = {}  # by request, and how many tokens it has seen
        self._speculator: Recurrent | None = None
        self.verified: Verified | None = None
        """Of the step that propose is called for; see _hand_over_states."""

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Load the heads next to the base, in its dtype."""
        device = next(target_model.parameters()).device
        speculator = heads.load(self._checkpoint, device, self._dtype).eval()
        if not isinstance(speculator, Recurrent):
            raise ServingError(
                f"{self._checkpoint} is a {self._config.method}, which reads whole sequences: the proposer is for "
                "heads that read one position at a time (sum_rnn, sum_lstm)"
            )
        self._speculator = speculator
        log.info(
            "Speculator %s: %s, %d heads, draft=%s, trained on %s",
            self._checkpoint,
            self._config.method,
            self._config.n_predict,
            self._decode.draft,
            self._config.base_model_name_or_path,
        )

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft after each request's tokens; vLLM calls this after each step.

        Args:
            sampled_token_ids: what each request got in this step; nothing while its prompt is read in parts.
            num_tokens_no_spec: [requests] tokens of each, prompt and answer.
            token_ids_cpu: [requests, max_model_len] these tokens.
            slot_mappings: vLLM passes it; not read.

        Returns:
            Drafts of each request, of various lengths; none where it got no token or has no room for more.

        Raises:
            ServingError: vLLM did not hand over the states.
        """
        verified, self.verified = self.verified, None
        if verified is None or self._speculator is None:
            raise ServingError(f"{_changed()}: propose was called without the step's hidden states")
        requests = verified.requests[: len(sampled_token_ids)]
        if len(requests) < len(sampled_token_ids):
            raise ServingError(f"{_changed()}: {len(requests)} requests for {len(sampled_token_ids)} rows of tokens")
        # Ended and preempted ones; the latter are indexed anew when they come back.
        for gone in self._drafters.keys() - set(requests):
            del self._drafters[gone]
        drafts: dict[int, Draft] = {}
        for i, (request, sampled) in enumerate(zip(requests, sampled_token_ids, strict=True)):
            length = int(num_tokens_no_spec[i])
            room = min(self._limit, self._max_model_len - length - 1)
            if sampled and room > 0:
                drafts[i] = self._grown(request, token_ids_cpu[i], length).draft(room)
        asking = [i for i, draft in drafts.items() if draft.asks_heads]
        if asking:
            rows = verified.last_rows(sampled_token_ids)[asking]
            states = verified.states[torch.from_numpy(rows).to(verified.states.device)]
            tokens = torch.tensor([sampled_token_ids[i][-1] for i in asking], device=states.device)
            complete([drafts[i] for i in asking], functools.partial(self._speculator.draft, states, tokens))
        complete([draft for i, draft in drafts.items() if i not in asking])
        return [drafts[i].tokens if i in drafts else [] for i in range(len(sampled_token_ids))]

    def _grown(self, request: str, tokens: NDArray[np.int32], length: int) -> Drafter:
        """The request's drafter, which has seen its first `length` tokens."""
        drafter, seen = self._drafters.get(request, (None, 0))
        if drafter is None or seen > length:
            drafter, seen = Drafter(self._sources), 0
        drafter.extend(tokens[seen:length])
        self._drafters[request] = drafter, length
        return drafter


def _options(additional: Any) -> tuple[str, Decode]:
    """The checkpoint's folder, and where drafts come from."""
    options = dict(additional.get(OPTIONS) or {}) if isinstance(additional, dict) else {}
    checkpoint = options.pop("checkpoint", None)
    if not isinstance(checkpoint, str):
        raise ServingError(
            f'additional_config names no checkpoint: pass --additional-config \'{{"{OPTIONS}": {{"checkpoint": '
            '"models/speculator"}}\''
        )
    try:
        return checkpoint, Decode.model_validate(options)
    except ValidationError as error:
        raise ServingError(f"additional_config.{OPTIONS}: {'; '.join(explain(error))}") from None


def _changed() -> str:
    return f"vLLM {vllm.__version__} is not as spec/serving/vllm.py expects it (written for {TESTED}.*)"


def _hand_over_states() -> None:
    """Let vLLM's model runner show each step's hidden states to our proposer, and to no other.

    GPUModelRunner (the CPU's runner derives from it) has the states at hand where it asks the proposer for drafts;
    ours takes them from the arguments of that call. Nothing else in vLLM is replaced.

    Raises:
        ServingError: the runner has no such method, or it takes other arguments.
    """
    original: Callable[..., Any] | None = getattr(GPUModelRunner, "propose_draft_token_ids", None)
    if getattr(original, "hands_over_states", False):
        return
    signature = None if original is None else inspect.signature(original)
    wanted = {"sample_hidden_states", "spec_decode_metadata"}
    if original is None or signature is None or not wanted <= set(signature.parameters):
        raise ServingError(
            f"{_changed()}: GPUModelRunner.propose_draft_token_ids has the arguments {signature}, expected "
            f"{', '.join(sorted(wanted))}; install vllm {TESTED}.*"
        )
    if warning := untested(vllm.__version__):
        log.warning(warning)

    @functools.wraps(original)
    def propose_draft_token_ids(runner: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(runner.drafter, SpeculatorProposer):
            given = signature.bind(runner, *args, **kwargs).arguments
            metadata = given["spec_decode_metadata"]
            drafted = None if metadata is None else metadata.num_draft_tokens
            runner.drafter.verified = Verified(given["sample_hidden_states"], drafted, runner.input_batch.req_ids)
        return original(runner, *args, **kwargs)

    propose_draft_token_ids.hands_over_states = True  # type: ignore[attr-defined]
    GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids
