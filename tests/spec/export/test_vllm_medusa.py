from pathlib import Path

import pytest
import torch

from spec import files, heads
from spec.export import FORMATS, ExportError, read, write
from tests.spec.export import engines
from tests.spec.heads.reference import config, inputs

FORM = FORMATS["vllm-medusa"]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("tied", "drafted"), [(True, None), (True, 9), (True, 23), (False, None)])
def test_vllm_drafts_the_same(tmp_path: Path, n: int, layers: int, tied: bool, drafted: int | None) -> None:
    c = config("medusa", n_predict=n, num_hidden_layers=layers, tie_weights=tied, draft_vocab_size=drafted)
    speculator = engines.checkpoint(tmp_path / "c", c)
    write(tmp_path / "c", tmp_path / "e", FORM, torch.float32)
    states, tokens = inputs(c, positions=40)
    expected = speculator.draft(states, tokens[:, 0])
    assert torch.equal(engines.vllm_medusa(tmp_path / "e")(states, tokens[:, 0]), expected)
    back = read(str(tmp_path / "e"))
    assert torch.equal(back.draft(states, tokens[:, 0]), expected)
    assert all(torch.equal(weight, back.state_dict()[name]) for name, weight in speculator.state_dict().items())
    assert back.config.draft_vocab_size == drafted
    assert back.config.base_digest == "d1"


def test_the_command(tmp_path: Path) -> None:
    engines.checkpoint(tmp_path / "c", config("medusa", base_revision="abc"))
    written = write(tmp_path / "c", tmp_path / "an export", FORM, torch.bfloat16)
    assert written.command == (
        "vllm serve some/base --revision abc \\\n"
        f'    --speculative-config \'{{"method": "medusa", "model": "{tmp_path}/an export", '
        '"num_speculative_tokens": 3}\''
    )


def test_a_draft_vocabulary_needs_an_option(tmp_path: Path) -> None:
    """vLLM 0.32 takes token_map, which it makes a parameter while it loads, for one that was not loaded."""
    engines.checkpoint(tmp_path / "c", config("medusa", draft_vocab_size=9))
    written = write(tmp_path / "c", tmp_path / "e", FORM, torch.bfloat16)
    assert "--model-loader-extra-config '{\"enable_weights_track\": false}' \\\n" in written.command


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "sum_rnn"}, r"method is sum_rnn: formats arctic and ibm-fms hold .*method=medusa"),
        ({"method": "sum_lstm"}, r"method is sum_lstm: formats arctic"),
        (
            {"method": "medusa", "tie_weights": False, "draft_vocab_size": 9},
            r"these have 9 of 23 rows\. Train with model\.speculator\.tie_weights=true",
        ),
    ],
)
def test_what_it_cannot_hold(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    engines.checkpoint(tmp_path / "c", config(**changes))
    with pytest.raises(ExportError, match=words):
        write(tmp_path / "c", tmp_path / "e", FORM, torch.float32)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"medusa_fc_bias": True}, "medusa_fc_bias is true"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5"),
        ({"vocab_size": None}, "vocab_size is None, expected a positive integer"),
        ({"num_hidden_layers": 2}, r"missing blocks\.0\.layers\.1\.weight"),
    ],
)
def test_another_network_is_not_read(tmp_path: Path, change: dict[str, object], words: str) -> None:
    engines.checkpoint(tmp_path / "c", config("medusa"))
    write(tmp_path / "c", tmp_path / "e", FORM, torch.float32)
    files.write_json(tmp_path / "e/config.json", {**engines.config_of(tmp_path / "e"), **change})
    with pytest.raises(heads.CheckpointError, match=words):
        read(str(tmp_path / "e"))
