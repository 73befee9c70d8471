"""fetch: resolve the base and the files of every split, download what is missing, write down what they are."""

from __future__ import annotations

from typing import Any

from spec import base, corpus, files
from spec.config import Config
from stages import common, embedded


@common.stage
def fetch(config: Config) -> None:
    """Resolve the base and the data, download what is missing, and write data/sources.json."""
    model = config.model
    embedded.ensure(model.partial_pretrain, *(path for split in common.SPLITS for path in config.data.files(split)))
    try:
        folder = base.resolve(model.partial_pretrain, model.revision)
    except base.BaseError as error:
        raise base.BaseError(f"model.partial_pretrain: {error}") from None
    splits: dict[str, dict[str, str]] = {}
    for split in common.SPLITS:
        found = corpus.list_files(config.data.files(split), split=split)
        splits[split] = files.digest_files(found)
    corpus.check_apart(splits)
    sources: dict[str, Any] = {
        "base": {
            "name": model.partial_pretrain,
            "revision": base.downloaded_revision(folder, model),
            **base.identify(folder),
        },
        "files": splits,
    }
    files.write_json(common.SOURCES, sources)
    count = sum(map(len, splits.values()))
    common.say(f"fetch: base {model.partial_pretrain} and {count} data files are here -> {common.SOURCES}")


if __name__ == "__main__":
    fetch()
