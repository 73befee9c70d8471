"""The base in vLLM's engine, for respond (respond.engine=vllm)."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine ends with this process, however that ends

import torch
import vllm
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.inputs import TokensPrompt

from spec import base as base_model
from spec.config import Model
from spec.device import choose_device
from spec.serving import bound_cpu_memory
from spec.workers import Worker

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def worker_with_own_device() -> Worker:
    """This process's place among the workers; it leaves their group, and sees the GPU of its local rank alone.

    To be called before anything looks at CUDA: vLLM takes the first GPU that it sees, and joins the group that the
    launcher's variables describe.
    """
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | os.environ
    rank, world, local = (int(place[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = shown.split(",") if shown else [str(local)]
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[local % len(devices)]
    for name in _LAUNCHED:
        os.environ.pop(name, None)
    return Worker(rank, world, choose_device())


class Engine:
    """An engine on the first device that this process sees, for the base in a folder.

    Of params, dtype and trust_remote_code are read; `longest` is the most tokens of a prompt and its answer together.
    """

    def __init__(self, params: Model, folder: Path, longest: int) -> None:
        bound_cpu_memory()
        device = choose_device()
        self.producer = {"vllm": vllm.__version__, **base_model.producer(device, getattr(torch, params.dtype))}
        self._stops = sorted(base_model.stop_ids(folder, params.trust_remote_code))
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(folder),
                dtype=params.dtype,
                trust_remote_code=params.trust_remote_code,
                max_model_len=longest,
                enable_prefix_caching=False,
                enforce_eager=device.type != "cuda",  # on a CPU compiling takes longer than it saves
                disable_log_stats=True,
            )
        )

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        on_tokens: Callable[[int], object],
    ) -> list[list[int]]:
        """Continue each prompt until a stop token (kept) or max_new_tokens, as spec.base.answer does.

        Sampled answers follow from prompt and seed, by another generator than spec.base.answer's.
        """
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            sampling = SamplingParams(
                temperature=temperature,
                seed=seed if temperature else None,
                max_tokens=max_new_tokens,
                stop_token_ids=self._stops,
                detokenize=False,
            )
            self._engine.add_request(str(index), TokensPrompt(prompt_token_ids=list(prompt)), sampling)
        answers: list[list[int]] = [[] for _ in prompts]
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                index, written = int(output.request_id), list(output.outputs[0].token_ids)
                on_tokens(len(written) - len(answers[index]))
                answers[index] = written
        return answers
