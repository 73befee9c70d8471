"""check: whether the base of params.yaml can be used as it stands, from its config and headers alone."""

from spec import base
from spec.config import Config
from stages import common, embedded


@common.stage
def check(config: Config) -> None:
    """Say what of params.yaml does not go with its base; loads no weights and writes nothing."""
    folder = embedded.find_base(config)
    for note in base.examine(folder, config.data.max_length, config.model.trust_remote_code).notes:
        common.say(f"check: {note}")
    common.say(f"check: base {config.model.partial_pretrain} can be used")
