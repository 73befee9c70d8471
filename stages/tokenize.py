"""tokenize: parquet to token sequences, with the loss mask."""

from __future__ import annotations

from spec import base, corpus
from spec.config import Config
from stages import common


@common.stage
def tokenize(config: Config) -> None:
    """Apply the chat template and limits, mark what is supervised, and write data/tokens/SPLIT.parquet."""
    sources = common.read_sources()
    folder = base.resolve(config.model.partial_pretrain, sources["base"]["revision"])
    tokenizer = base.load_tokenizer(folder, config.model.trust_remote_code)
    data = config.data
    keys = {"prompt_key": data.prompt_key, "response_key": data.response_key}
    need_answers = not config.base_answers
    paths = {split: corpus.list_files(data.files(split)) for split in common.SPLITS}
    found = {split: corpus.inspect(paths[split], **keys, need_answers=need_answers) for split in common.SPLITS}
    for split in common.SPLITS:
        report = corpus.Report()
        target = common.tokens_path(split)
        rows = corpus.count_rows(found[split], data.max_samples)
        with common.progress(rows, "rows", f"tokenize {split}") as bar:
            sequences = corpus.stream(
                paths[split],
                tokenizer,
                **keys,
                max_length=data.max_length,
                max_samples=data.max_samples,
                need_answers=need_answers,
                date=data.date,
                report=report,
                progress=bar.update,
            )
            corpus.write(target, sequences, {"tokenizer": sources["base"]["tokenizer"]})
        *notes, total = report.lines()
        for note in notes:
            common.say(f"tokenize {split}: {note}")
        common.say(f"tokenize {split}: {total} -> {target} ({common.size(target.stat().st_size)})")


if __name__ == "__main__":
    tokenize()
