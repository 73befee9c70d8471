"""tokenize: parquet to token sequences, with the loss mask."""

from __future__ import annotations

from spec import base, corpus
from spec.config import Config
from stages import common


@common.stage
def tokenize(config: Config) -> None:
    """Apply the chat template and limits, mark what is supervised, and write data/tokens/SPLIT.parquet."""
    sources = common.read_sources()
    trusted = config.model.trust_remote_code
    folder = common.base_folder(config, sources)
    tokenizer = base.load_tokenizer(folder, trusted)
    limits = base.limits(folder, trusted).of_rows
    data = config.data
    paths = {split: corpus.list_files(data.files(split), split=split) for split in common.SPLITS}
    found = {split: corpus.inspect(paths[split], **config.reading) for split in common.SPLITS}
    options = {name: getattr(data, name) for name in ("date", "skip_bad_rows", "max_length", "max_samples")}
    options |= {**config.reading, **limits}
    reports = {split: corpus.Report() for split in common.SPLITS}
    for split, report in reports.items():
        target = common.tokens_path(split)
        rows = corpus.count_rows(found[split], data.max_samples)
        with common.progress(rows, "rows", f"tokenize {split}") as bar:
            sequences = corpus.stream(paths[split], tokenizer, **options, report=report, progress=bar.update)
            corpus.write(target, sequences, {"tokenizer": sources["base"]["tokenizer"]})
        *notes, total = report.lines()
        for split_before, before in reports.items():
            common_prompts = len(before.prompts & report.prompts) if split_before != split else 0
            if common_prompts:
                notes.append(f"{common_prompts:,} prompts are in {split_before} too")
        for note in notes:
            common.say(f"tokenize {split}: {note}")
        common.say(f"tokenize {split}: {total} -> {target} ({common.size(target.stat().st_size)})")


if __name__ == "__main__":
    tokenize()
