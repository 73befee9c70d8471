"""fetch: find the base and the files of every split, download what is missing, and record their digests."""

from __future__ import annotations

from spec import base, corpus, files
from spec.config import Config
from stages import common, embedded


@common.stage
def fetch(config: Config) -> None:
    """Find the base and the data, download what is missing, check the base, and write data/sources.json."""
    model = config.model
    embedded.ensure(*(path for split in common.SPLITS for path in config.data.files(split)))
    folder = embedded.find_base(config)
    found = {split: corpus.list_files(config.data.files(split), split=split) for split in common.SPLITS}
    splits = {split: files.digest_files(paths) for split, paths in found.items()}
    corpus.check_apart(splits)
    identity = base.identify(folder, model.trust_remote_code)
    findings = base.examine_once(identity, folder, config.data.max_length, model.trust_remote_code)
    for note in findings.notes:
        common.say(f"fetch: {note}")
    if findings.answering:
        identity["generation"] = files.digest_json([identity["generation"], findings.answering])
    source = {"name": model.partial_pretrain, "revision": base.downloaded_revision(folder, model), **identity}
    files.write_json(common.SOURCES, {"base": source, "files": splits})
    count = sum(map(len, splits.values()))
    common.say(f"fetch: base {model.partial_pretrain} and {count} data files are here -> {common.SOURCES}")


if __name__ == "__main__":
    fetch()
