"""On the embedded base itself, in float32: what is written with drafts is what plain greedy decoding writes."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from spec import base, heads
from spec.config import Decode, Model
from spec.decoding import LanguageModelWithSpeculator
from spec.heads import CheckpointError, Speculator, build
from stages import embedded
from tests.spec.heads.reference import config
from tests.workspace import REPOSITORY

TOKENS = 32


def speculator_for(model: base.Base) -> Speculator:
    """The one that `make repro` has left in this checkout, else one that starts from the base's own matrices."""
    trained = REPOSITORY / "models/speculator"
    try:
        found = heads.load(trained, model.device, torch.float32)
        heads.check_base(found.config, model.vocab_size, model.hidden_size, model.digest)
        return found
    except (FileNotFoundError, CheckpointError):
        pass
    widths: dict[str, Any] = dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), (576,))
    made = build(config(hidden_size=model.hidden_size, vocab_size=model.vocab_size, **widths))
    made.initialise(model.tables)
    return made


@pytest.mark.slow
def test_a_hundred_held_out_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 prompts of eval, 32 of val, and the last 4 of train, which no default run reads."""
    monkeypatch.chdir(tmp_path)
    embedded.ensure(embedded.BASE, embedded.PROMPTS["eval"])
    tables = (pq.read_table(embedded.PROMPTS[split]) for split in ("eval", "val", "train"))
    rows = [question for table in tables for question in table["question"].to_pylist()[-64:]]
    questions = [*rows[:96], *rows[-4:]]
    assert len(set(questions)) == 100

    folder = Path(embedded.BASE)
    model = base.load(Model(dtype="float32"), folder, base.identify(folder)["weights"])
    lm = LanguageModelWithSpeculator(model, speculator_for(model), Decode())
    differ, accepted = [], dict.fromkeys(lm.sources, 0)
    for number, question in enumerate(questions):
        prompt = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        plain = lm.generate(prompt, TOKENS, draft="none").tokens
        for source in lm.sources:
            made = lm.generate(prompt, TOKENS, draft=source)
            accepted[source] += sum(made.accepted)
            if made.tokens != plain:
                differ.append((number, source))
    assert not differ
    assert min(accepted.values()) > 100, f"hardly a draft was accepted: {accepted}"
