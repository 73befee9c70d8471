"""check: whether the base of params.yaml can be used, from its config, tokenizer and the headers of its weights."""

from spec import base
from spec.config import Config
from stages import common, embedded


@common.stage
def check(config: Config) -> None:
    """Say whether the base of params.yaml can be used, without loading its weights."""
    folder = embedded.find_base(config)
    for note in base.examine(folder, config.data.max_length, config.model.trust_remote_code).notes:
        common.say(f"check: {note}")
    common.say(f"check: base {config.model.partial_pretrain} can be used")
