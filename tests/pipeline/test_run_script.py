"""The guide's script, called as the guide calls it."""

import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from spec import heads
from tests.tiny import make_base
from tests.workspace import REPOSITORY, environment

SCRIPT = REPOSITORY / "run_speculator_training.sh"
SMALL = ["data.max_length=96", "data.train_batch_size=4", "respond.max_new_tokens=12", "features.segment_tokens=256"]
SMALL += ["trainer.save_freq=2", "trainer.logger=console", "model.dtype=float32"]
SMALL += ["evaluate.max_prompts=2", "evaluate.max_new_tokens=8"]


def verl_gsm8k(folder: Path, split: str, rows: int) -> None:
    """A file as verl's examples/data_preprocess/gsm8k.py writes it."""
    records = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"What is {i} plus {i}? Let's think step by step."}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"index": i, "answer": f"It is {2 * i}. #### {2 * i}", "question": f"{i}+{i}"},
        }
        for i in range(rows)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), folder / f"{split}.parquet")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("home")
    for split, rows in (("train", 14), ("test", 6)):
        verl_gsm8k(root / "data/gsm8k", split, rows)
    make_base(root / "base")
    return root


def call(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options: dict[str, Any] = {"env": environment(home) | {"HOME": str(home)}, "capture_output": True, "text": True}
    return subprocess.run([SCRIPT, *arguments], cwd=home, **options)


def test_the_guides_first_example(home: Path) -> None:
    done = call(
        home, "2", "./speculator-checkpoints",
        f"data.train_files={home}/data/gsm8k/train.parquet",
        "data.val_files=$HOME/data/gsm8k/test.parquet",
        "model.partial_pretrain=base",
        "model.speculator.n_predict=3", "model.speculator.inner_dim=24", "model.speculator.emb_dim=24",
        "model.speculator.proj_dim=24", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    saved = home / "speculator-checkpoints"
    speculator = heads.load(saved)
    assert speculator.config.n_predict == 3
    assert (saved / "global_step_2/pytorch_model.bin").is_file()
    assert (saved / "global_step_4/config.json").is_file()
    assert "even rows" in done.stdout
    assert not (saved / "mlflow.db").exists()


def test_the_guides_lstm_example(home: Path) -> None:
    """Stacks of widths, quoted as the guide quotes them; the shell takes the quotes off."""
    done = call(
        home, "1", "./speculator-lstm", "model.partial_pretrain=base", "model.speculator.n_predict=5",
        "model.speculator.inner_dim=10.20", "model.speculator.emb_dim=10.20", 'model.speculator.proj_dim="10.20"',
        "model.speculator.method=sum_lstm", "model.speculator.tie_lstm_embs=true", "optim.lr=5e-5",
        "trainer.total_epochs=3", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    speculator = heads.load(home / "speculator-lstm")
    assert speculator.config.inner_dim == (10, 20)
    assert speculator.config.method == "sum_lstm"
    drafts = speculator.draft(torch.zeros(2, speculator.config.hidden_size), torch.zeros(2, dtype=torch.long))
    assert drafts.shape == (2, 5)
    assert f"run: data defaults to {home}/data/gsm8k" in done.stdout


def test_usage(home: Path) -> None:
    done = call(home, "2")
    assert done.returncode == 2
    assert "Usage" in done.stderr


def test_a_wrong_key_stops_before_any_work(home: Path) -> None:
    done = call(home, "1", "./nothing", "model.speculator.n_predictt=3")
    assert done.returncode == 1
    assert "did you mean n_predict" in done.stderr
    assert not (home / "nothing").exists()
