"""Whether a base can be used as it stands, from its config and headers alone, and what a user should know of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers

from spec import files
from spec.base.check import check_weights, skeleton
from spec.base.limits import limits_of
from spec.base.loading import unstopped_turn
from spec.base.tokenizer import check_tokenizer, load_tokenizer

RULE = 2
"""Raised when examine finds more, so that bases that passed before are looked at again."""


@dataclass(frozen=True)
class Findings:
    """What a base that can be used has about it."""

    notes: list[str]  # what the user should know, a sentence each
    answering: list[str]  # what its answers follow from beyond the files that identify it


def examine(folder: Path, max_length: int, trusted: bool = False) -> Findings:
    """Look at a base's config, tokenizer and headers; a BaseError says why it cannot be used, and what to do.

    `max_length` is data.max_length, and `trusted` says whether the base's own code may run.
    """
    model, tokenizer = skeleton(folder, trusted), load_tokenizer(folder, trusted)
    found, answering = limits_of(model), []
    notes = check_weights(folder, model)
    check_tokenizer(folder, tokenizer, model.get_input_embeddings().weight.shape[0])
    if found.positions is not None and max_length > found.positions:
        effect = "longer rows are dropped" if found.hard else "longer rows are beyond what it was trained for"
        notes.append(f"data.max_length is {max_length} and the base has {found.positions} positions: {effect}")
    end = unstopped_turn(folder, trusted)
    if end is not None:
        token = tokenizer.convert_ids_to_tokens(end)
        answering.append(f"ends at {end}")
        notes.append(
            f"the chat template closes a turn with {token!r} (id {end}), at which the base itself does not stop: "
            "answers end there all the same. Other engines need it in eos_token_id of generation_config.json"
        )
    if found.recurrent:
        answering.append("prompts of one length together")
    if not found.takes_back:
        notes.append(
            "the base keeps a recurrent state, from which rejected drafts cannot be removed: evaluate reports the "
            "exact walk and plain decoding, but no decoding with drafts"
        )
    return Findings(notes, answering)


def examine_once(identity: Mapping[str, Any], folder: Path, max_length: int, trusted: bool = False) -> Findings:
    """The findings of examine, remembered by what they follow from; `identity` is as identify gives it."""
    key = files.digest_json([RULE, transformers.__version__, dict(identity), trusted, max_length])
    path = files.cache_dir() / "checked" / f"{key[:32]}.json"
    if path.is_file():
        return Findings(**files.read_json(path))
    findings = examine(folder, max_length, trusted)
    files.write_json(path, asdict(findings))
    return findings
