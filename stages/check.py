"""check: whether the base of params.yaml can be used as it stands, from its config and headers alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers

from spec import base, files
from spec.config import Config
from stages import common, embedded

RULE = 2
"""Raised when examine finds more, so that bases that passed before are looked at again."""


@dataclass(frozen=True)
class Findings:
    """What a base that can be used has about it.

    Attributes:
        notes: what the user should know, a sentence each.
        answering: what its answers follow from beyond the files that identify it.
    """

    notes: list[str]
    answering: list[str]


@common.stage
def check(config: Config) -> None:
    """Say what of params.yaml does not go with its base; loads no weights and writes nothing."""
    folder = find_base(config)
    for note in examine(config, folder).notes:
        common.say(f"check: {note}")
    common.say(f"check: base {config.model.partial_pretrain} can be used")


def find_base(config: Config) -> Path:
    """The folder of the base that params.yaml names; what is missing of it is made or downloaded.

    Raises:
        BaseError: there is none.
    """
    model = config.model
    embedded.ensure(model.partial_pretrain)
    try:
        return base.resolve(model.partial_pretrain, model.revision, model.trust_remote_code)
    except base.BaseError as error:
        raise base.BaseError(f"model.partial_pretrain: {error}") from None


def examine(config: Config, folder: Path) -> Findings:
    """Look at a base's config, tokenizer and headers.

    Raises:
        BaseError: it cannot be used; says why, and what to do.
    """
    trusted = config.model.trust_remote_code
    notes, answering = base.check(folder, trusted), []
    limits, length = base.limits(folder, trusted), config.data.max_length
    if limits.positions is not None and length > limits.positions:
        effect = "longer rows are dropped" if limits.hard else "longer rows are beyond what it was trained for"
        notes.append(f"data.max_length is {length} and the base has {limits.positions} positions: {effect}")
    end = base.unstopped_turn(folder, trusted)
    if end is not None:
        token = base.load_tokenizer(folder, trusted).convert_ids_to_tokens(end)
        answering.append(f"ends at {end}")
        notes.append(
            f"the chat template closes a turn with {token!r} (id {end}), at which the base itself does not stop: "
            "answers end there all the same. Other engines need it in eos_token_id of generation_config.json"
        )
    if limits.recurrent:
        answering.append("prompts of one length together")
    if not limits.takes_back:
        notes.append(
            "the base keeps a recurrent state, from which rejected drafts cannot be removed: evaluate reports the "
            "exact walk and plain decoding, but no decoding with drafts"
        )
    return Findings(notes, answering)


def examine_once(config: Config, folder: Path, identity: dict[str, Any]) -> Findings:
    """The findings of examine, remembered by what they follow from: looking again takes no time.

    Args:
        config: of the run.
        folder: of the base.
        identity: of the base, as spec.base.identify gives it.
    """
    trusted, length = config.model.trust_remote_code, config.data.max_length
    key = files.digest_json([RULE, transformers.__version__, identity, trusted, length])
    path = files.cache_dir() / "checked" / f"{key[:32]}.json"
    if path.is_file():
        return Findings(**files.read_json(path))
    found = examine(config, folder)
    files.write_json(path, asdict(found))
    return found


if __name__ == "__main__":
    check()
