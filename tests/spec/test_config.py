"""Parameters: the guide's defaults, overrides, and every kind of value that stops a stage."""

import datetime
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from spec import config as config_module
from spec.config import Config, ConfigError, _leaves, defaults, flatten, from_mapping, load, save
from spec.section import Section, format_dims, parse_dims

ROOT = Path(__file__).resolve().parents[2]

SPECULATOR = {"method": "sum_rnn", "n_predict": 5, "inner_dim": 1024, "emb_dim": 1024, "proj_dim": 1024}
SPECULATOR |= {"scale_input": False, "tie_weights": True, "tie_lstm_embs": False}
GUIDE = {f"model.speculator.{key}": value for key, value in SPECULATOR.items()}
GUIDE |= {"model.speculator_loss_coeff": 1.0, "model.freeze_base_model": True, "optim.lr": 1e-4}
GUIDE |= {"trainer.total_epochs": 1, "trainer.save_freq": 1000, "trainer.test_freq": 500}
GUIDE |= {"data.micro_batch_size_per_gpu": 4}


def from_overrides(overrides: list[str]) -> Config:
    return from_mapping({}, overrides=overrides)


def written(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", ["", "model:\n  speculator:\noptim:\n"])
def test_the_guides_defaults_hold_where_a_file_lacks_a_key(text: str, tmp_path: Path) -> None:
    assert (defaults() | flatten(load(written(tmp_path, text)))).items() >= GUIDE.items()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.speculator.n_predict=3", 3),
        ("model.speculator.inner_dim=512", 512),
        ("model.speculator.inner_dim=1024.2560", "1024.2560"),
        ('model.speculator.inner_dim="1024.2048"', "1024.2048"),
        ("model.speculator.method=sum_lstm", "sum_lstm"),
        ("model.trust_remote_code=true", True),
        ("model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("model.revision=null", None),
        ("optim.lr=5e-05", 5e-5),
        ("optim.lr=1", 1.0),
        ("optim.head_weights=[1, 0.8, 0.6, 0.4, 0.2]", [1.0, 0.8, 0.6, 0.4, 0.2]),
        (" optim.schedule = wsd", "wsd"),
        ("decode.draft_len=9", 9),  # of which the heads' are n_predict at most
        ("data.max_samples=", None),
        ("data.train_files=a.parquet", ["a.parquet"]),
        ("data.train_files=[a", ["[a"]),
        ("data.ignore_columns=tools", ["tools"]),
        ("trainer.logger=console", ["console"]),
        ("trainer.launcher=srun -N 2 'a b'", "srun -N 2 'a b'"),
        ("trainer.tracking_uri=http://host:5000/?a=b", "http://host:5000/?a=b"),
    ],
)
def test_overrides_reach_any_key(override: str, value: object, tmp_path: Path) -> None:
    key = override.partition("=")[0].strip()
    changed = defaults() | {key: value}
    assert defaults() | flatten(from_overrides([override])) == changed
    assert defaults() | flatten(load(written(tmp_path, "optim:\nmodel: {speculator: null}\n"), [override])) == changed


def test_the_last_override_wins_over_the_file_and_the_ones_before(tmp_path: Path) -> None:
    found = load(written(tmp_path, "optim: {lr: 1, clip_grad: 2}\n"), ["optim.lr=2", "optim.lr=3"])
    assert flatten(found) == flatten(Config()) | {"optim.lr": 3.0, "optim.clip_grad": 2.0}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"optim": {"learning_rate": 1}}, ["optim.learning_rate: unknown key", "known here: lr, base_lr"]),
        ({"model": {"speculator": {"n_predct": 3}}}, ["model.speculator.n_predct", "did you mean n_predict?"]),
        ({"optimm": {"lr": 1}}, ["optimm: unknown key", "did you mean optim?"]),
        ({"model": {"speculator": {"n_predict": "3"}}}, ["model.speculator.n_predict", "integer", "found '3'"]),
        ({"model": {"speculator": {"n_predict": 3.5}}}, ["model.speculator.n_predict", "found 3.5"]),
        ({"model": {"speculator": {"tie_weights": "yes"}}}, ["tie_weights", "boolean", "found 'yes'"]),
        ({"model": {"speculator": {"method": "sum_mlp"}}}, ["model.speculator: method 'sum_mlp'", "sum_rnn, sum_lstm"]),
        ({"model": {"dtype": "int8"}}, ["model.dtype", "bfloat16", "found 'int8'"]),
        ({"optim": {"lr": "fast"}}, ["optim.lr", "number", "found 'fast'"]),
        ({"optim": {"loss": "mse"}}, ["optim.loss", "'ce' or 'kl'", "found 'mse'"]),
        ({"optim": {"head_weights": [1.0, 0.0, 1.0, 1.0, 1.0]}}, ["optim.head_weights.1", "greater than 0"]),
        ({"optim": {"head_weights": 0.5}}, ["optim.head_weights", "found 0.5"]),
        ({"features": {"codec": "lzma"}}, ["features.codec", "'fp8'", "found 'lzma'"]),
        ({"features": {"store": "s3://b/x"}}, ["features.store", "'s3://b/x' is not a folder", "pull s3://b/x"]),
        ({"optim": {"lr": float("inf")}}, ["optim.lr", "finite", "found inf"]),
        ({"optim": {"betas": [0.9, 1.5]}}, ["optim.betas.1", "found 1.5"]),
        ({"data": {"train_files": 3}}, ["data.train_files", "tuple, found 3"]),
        ({"data": {"train_files": ["a", ""]}}, ["data.train_files.1", "at least 1 character, found ''"]),
        ({"trainer": {"logger": "tensorboard"}}, ["trainer.logger", "console", "found 'tensorboard'"]),
        ({"trainer": {"launcher": "srun 'a"}}, ["trainer.launcher", "o closing quotation"]),
        ({"decode": {"ngram_min": 9}}, ["decode", "ngram_min 9 is above ngram_max 8"]),
        ({"data": 5}, ["data", "found 5"]),
        ({"model": {"speculator": {"method": "medusa"}}}, ["model.speculator: method medusa is gone"]),
        ({"model": {"speculator": {"emb_dim": "1024.512"}}}, ["emb_dim ends in 512 and proj_dim in 1024", "added"]),
        ({"model": {"speculator": {"method": "sum_lstm", "tie_weights": False}}}, ["sum_lstm", "tie_weights to true"]),
        ({"optim": {"head_weights": [1.0]}}, ["\n  optim.head_weights has 1 numbers and", "n_predict is 5"]),
        ({"decode": {"draft": "head", "draft_len": 6}}, ["decode.draft_len is 6", "heads", "draft at most 5"]),
        ({"model": {"freeze_base_model": False}, "optim": {"loss": "kl"}}, ["loss=kl", "freeze_base_model to true"]),
    ],
)
def test_what_cannot_be_used_is_named_with_what_would_fit(tree: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        from_mapping(tree, "here.yaml")
    message = str(error.value)
    assert message.startswith("here.yaml:\n")
    for word in words:
        assert word in message


def test_all_errors_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        from_mapping({"optim": {"lr": -1, "clip": 2}, "dat": {}})
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert all(sum(key in line for line in lines) == 1 for key in ("optim.lr", "optim.clip", "dat"))


def test_widths_that_yaml_read_as_a_fraction_are_refused(tmp_path: Path) -> None:
    """An unquoted 1024.2560 would silently become 1024.256."""
    with pytest.raises(ConfigError, match=r"emb_dim: 1024.256 is a number.*must be quoted.*\"1024.2048\""):
        load(written(tmp_path, "model: {speculator: {emb_dim: 1024.2560}}"))


@pytest.mark.parametrize(
    "value", [0, -1, "", "0", "512.", ".512", "512.x", "512.0", "512,1024", True, None, {}, [], [512, 1.5], 1024.0]
)
def test_widths_that_make_no_network(value: object) -> None:
    with pytest.raises(ValueError, match=r"width|integer|quoted"):
        parse_dims(value)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=4).map(tuple))
def test_widths_are_read_as_they_are_written(dims: tuple[int, ...]) -> None:
    assert parse_dims(format_dims(dims)) == parse_dims(list(dims)) == dims


def test_a_day_is_read_as_yaml_and_people_write_it() -> None:
    for config in (from_overrides(["data.date=2026-03-01"]), from_mapping({"data": {"date": "2026-03-01"}})):
        assert config.data.date == datetime.date(2026, 3, 1)
    assert from_overrides(["data.date=null"]).data.date is None
    with pytest.raises(ConfigError, match=r"data\.date: '1 March' is not a date; write it as 2026-01-31"):
        from_overrides(["data.date=1 March"])


def numbers(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every numeric parameter by its dotted key, and the schema of its values."""
    schema = section.model_json_schema(mode="validation")["properties"]
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from numbers(field.annotation, f"{prefix}{name}.")
            continue
        for choice in schema[name].get("anyOf", [schema[name]]):
            if choice.get("type") in ("integer", "number"):
                yield f"{prefix}{name}", choice


@pytest.mark.parametrize(("key", "schema"), list(numbers(Config)))
def test_every_number_is_refused_just_outside_its_bounds(key: str, schema: dict[str, Any]) -> None:
    step = 1 if schema["type"] == "integer" else 1e-9
    outside = {
        "minimum": lambda bound: bound - step,
        "exclusiveMinimum": lambda bound: bound,
        "maximum": lambda bound: bound + step,
        "exclusiveMaximum": lambda bound: bound,
    }
    bounds = {name: schema[name] for name in outside if name in schema}
    assert {"minimum", "exclusiveMinimum"} & set(bounds), f"{key} has no lower bound"
    for name, bound in bounds.items():
        with pytest.raises(ConfigError, match=re.escape(key)):
            from_overrides([f"{key}={outside[name](bound)!r}"])
    if schema["type"] == "number":
        for value in (".inf", ".nan"):
            with pytest.raises(ConfigError, match=re.escape(key)):
                from_overrides([f"{key}={value}"])


@pytest.mark.parametrize(("frozen", "source"), [(True, "base"), (True, "data"), (False, "base"), (False, "data")])
def test_joint_training_learns_the_datas_own_answers(frozen: bool, source: str) -> None:
    config = from_mapping({"model": {"freeze_base_model": frozen}, "respond": {"source": source}})
    assert config.base_answers == (frozen and source == "base")


def test_home_and_variables_expand_where_paths_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    overrides = ["data.val_files=[~/b.parquet, '${HOME}/c']", "features.store=$HOME/store"]
    config = from_overrides([*overrides, "model.partial_pretrain=~/models/base"])
    assert config.data.files("val") == ("/home/someone/b.parquet", "/home/someone/c")
    assert config.model.partial_pretrain == "/home/someone/models/base"
    assert config.features.store == "/home/someone/store"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n", "must hold a mapping.*list"),
        ("a: [1\n", "not valid YAML"),
        ("a: 1\na: 2\n", "not valid YAML"),
        (None, r"params\.yaml: no such parameter file.*--params"),
    ],
)
def test_files_that_are_no_parameters(text: str | None, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load(tmp_path / "params.yaml" if text is None else written(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr", "not an override; write key=value"),
        ("=3", "not an override"),
        ("optim.lr.x=1", "lr is a value, not a section"),
        ("model.speculator.inner_dim=", "'' is not an integer"),
        ("optimizer.lr=1", "did you mean optim"),
    ],
)
def test_overrides_that_cannot_be_used(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_mapping({"optim": {"lr": 1}}, overrides=[override])


nasty = st.sampled_from(
    ["null", "yes", "1e5", "5e-05", "0o7", "1_000", "a: b", "# x", "- a", "'", '"', "{a}", "%a", "!"]
)
printable = st.characters(exclude_categories=["C", "Zl", "Zp"], exclude_characters="$~")
words = nasty | st.text(printable, min_size=1, max_size=8)
dims = st.lists(st.integers(1, 4096), min_size=1, max_size=3).map(lambda dims: ".".join(map(str, dims)))
group = st.fixed_dictionaries


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValidationError):
        Config().optim.lr = 1.0  # type: ignore[misc]


some = st.lists(words | st.just(""), max_size=3)
data = group({"train_files": words | st.lists(words, max_size=3) | st.none(), "prompt_key": st.none() | words})
model = group({"partial_pretrain": words, "speculator": group({"inner_dim": dims, "init": words})})
optim = group({"lr": st.floats(1e-9, 1e3), "betas": st.lists(st.floats(0, 0.999), min_size=2, max_size=2)})
stops = {"early_stop": st.none() | st.integers(1, 10**7), "seed": st.integers(0, 2**63 - 1)}
loggers = st.lists(st.sampled_from(["console", "mlflow"]), max_size=2)
trainer = group({"launcher": some.map(shlex.join), "logger": loggers, **stops})


@settings(max_examples=40)
@given(tree=group({"data": data, "model": model, "optim": optim, "trainer": trainer}))
def test_what_is_saved_loads_back_equal(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    config, path = from_mapping(tree), tmp_path_factory.getbasetemp() / "saved.yaml"
    save(config, path)
    assert load(path) == config


def test_params_yaml_lists_every_key_and_no_other() -> None:
    """dvc's -S refuses a key that the file lacks."""
    tree = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    assert set(dict(_leaves("", tree))) == set(defaults())
    load(ROOT / "params.yaml")


def test_dvc_yaml_names_parameters_that_exist() -> None:
    stages = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
    named = {param for stage in stages.values() for param in stage["params"]}
    assert named
    assert {param for param in named if not any(f"{key}.".startswith(f"{param}.") for key in defaults())} == set()


def test_what_the_method_does_not_use_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config_module._say_once.cache_clear()  # another test may have said it
    for value in (False, True, True):
        section = {"method": "sum_rnn", "tie_lstm_embs": value}
        assert from_mapping({"model": {"speculator": section}}) == Config()
    assert caplog.messages == ["model.speculator: method sum_rnn ignores tie_lstm_embs=True"]
