"""Settings: precedence, what is an error and how it reads, the signature."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("pydantic", reason="needs moeyard[train]")

from pydantic import Field

from moeyard.models.settings import Settings
from moeyard.train.config import TrainConfig, config_class, load_config, parse_value, signature
from moeyard.train.errors import UsageError


@dataclass(frozen=True)
class Shape:
    width: int = 4
    depth: int = 2

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width: expected at least 1, got {self.width}")


class Model(Settings):
    dim: int = Field(default=8, ge=1)
    kind: str = "plain"


class Own(Settings):
    model: Model = Model()
    shape: Shape = Shape()


def load(*settings: str, file: Path | None = None, **defaults: object) -> TrainConfig:
    return load_config(Own, defaults=defaults, file=file, settings=settings)


def dump(config: TrainConfig) -> dict[str, object]:
    return config.model_dump()


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('max_steps = 20\nseed = 3\n[model]\ndim = 16\nkind = "file"\n')
    got = load("model.dim=32", file=file, seed=1, precision="bf16", model={"kind": "default"})
    assert (got.max_steps, got.seed, got.precision) == (20, 3, "bf16")
    assert dump(got)["model"] == {"dim": 32, "kind": "file"}
    assert load().optimizer.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "seed = 2\n[optimizer]\nlearning_rate = 1e-4\nbetas = [0.8, 0.9]\n[shape]\nwidth = 5\n"),
        ("a.yaml", "seed: 2\noptimizer:\n  learning_rate: 1e-4\n  betas: [0.8, 0.9]\nshape: {width: 5}\n"),
        ("a.yml", "{seed: 2, optimizer: {learning_rate: .1e-3, betas: [0.8, 9e-1]}, shape: {width: 5}}"),
        ("a.json", '{"seed": 2, "optimizer": {"learning_rate": 1e-4, "betas": [0.8, 0.9]}, "shape": {"width": 5}}'),
    ],
)
def test_the_formats_agree(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    got = load(file=tmp_path / name)
    assert got.seed == 2
    assert got.optimizer.learning_rate == 1e-4
    assert got.optimizer.betas == (0.8, 0.9)
    assert dump(got)["shape"] == {"width": 5, "depth": 2}


def test_an_empty_yaml_file_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert load(file=tmp_path / "a.yaml") == load()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("true", True),
        ("null", None),
        ('"3"', "3"),
        ("cosine", "cosine"),
        ("[0.9, 0.99]", [0.9, 0.99]),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_values_of_settings(text: str, value: object) -> None:
    got = parse_value(text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.dimm=3", "--set: model.dimm: unknown key; did you mean model.dim?"),
        ("learning_rate=1e-2", "--set: learning_rate: unknown key; did you mean optimizer.learning_rate?"),
        (
            "optimizer.learningrate=1",
            "--set: optimizer.learningrate: unknown key; did you mean optimizer.learning_rate?",
        ),
        ("shape.widht=3", "--set: shape.widht: unknown key; did you mean shape.width?"),
        ("qqq=1", "--set: qqq: unknown key"),
        ("seed=many", "--set: seed: expected a valid integer, got 'many'"),
        ("seed=true", "--set: seed: expected a valid integer, got True"),
        ("seed=1.5", "--set: seed: expected a valid integer, got 1.5"),
        ("seed.x=1", "--set: seed: expected a valid integer, got {'x': 1}"),
        ("model=3", "--set: model: expected an object, got 3"),
        ("max_steps=0", "--set: max_steps: expected greater than or equal to 1, got 0"),
        ("precision=16", "--set: precision: expected '32' or 'bf16', got 16"),
        ("optimizer.learning_rate=nan", "--set: optimizer.learning_rate: expected a finite number, got nan"),
        ("shape.width=0", "--set: shape: width: expected at least 1, got 0"),
        ("model.dim", "--set: expected key=value such as optimizer.learning_rate=1e-3, got 'model.dim'"),
        ("=3", "--set: expected key=value"),
        ("a..b=3", "--set: expected key=value"),
    ],
)
def test_mistakes_say_where_what_and_what_else(setting: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        load(setting)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_mistakes_in_a_file_name_it_and_all_are_told(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('max_step = 3\n[model]\ndim = "8"\n')
    with pytest.raises(UsageError) as error:
        load(file=file)
    assert f"{file}: model.dim: expected a valid integer, got '8'" in str(error.value)
    assert f"{file}: max_step: unknown key; did you mean max_steps?" in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.toml", None, "--config: cannot read .*none.toml: No such file"),
        ("a.ini", "x", "--config: expected a .toml, .yaml, .yml or .json file"),
        ("a.toml", "seed = = 3", r"a.toml: not valid TOML: .*line 1"),
        ("a.yaml", "seed: [1", "a.yaml: not valid YAML"),
        ("a.json", "{", "a.json: not valid JSON"),
        ("a.yaml", "- 1\n- 2\n", "a.yaml: expected a table of settings, got list"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        load(file=tmp_path / name)


def test_the_signature_stands_for_what_changes_results() -> None:
    first = signature(load())
    assert len(first) == 8
    assert int(first, 16) >= 0
    assert signature(load("checkpoint_every=7", "workers=2", "device=cpu")) == first
    assert signature(load("device=cuda")) != first
    assert signature(load("optimizer.learning_rate=0.001")) == first
    # An int where a float belongs is the same number.
    assert signature(load("optimizer.weight_decay=0")) == signature(load("optimizer.weight_decay=0.0"))
    for change in ("seed=1", "model.dim=9", "shape.depth=3", "max_steps=7", "ema_decay=0.9"):
        assert signature(load(change)) != first


def test_the_signature_is_that_of_the_canonical_json() -> None:
    import hashlib
    import json

    values = load("seed=5").model_dump(mode="json")
    for name in ("checkpoint_every", "workers", "device"):
        del values[name]
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert signature(load("seed=5")) == hashlib.sha256(text.encode()).hexdigest()[:8]


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().seed = 3  # type: ignore[misc]


def test_a_system_may_not_take_the_trainers_names() -> None:
    class Clash(Settings):
        seed: int = 0

    with pytest.raises(TypeError, match="Clash: expected names that TrainConfig has not, got seed"):
        config_class(Clash)
