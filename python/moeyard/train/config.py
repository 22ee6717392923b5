"""Settings of a run: read from TOML, YAML or JSON, overridden by `a.b=c`, checked, and boiled down to a signature.

    defaults of the system  <  file  <  --set a.b=c        signature = first 8 hex digits of sha256(canonical JSON)

A system's own settings and `TrainConfig` lie side by side in one table: `seed` is the trainer's, `model.dim` the
system's.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model

from moeyard.models.settings import Settings
from moeyard.train.errors import UsageError


class OptimizerConfig(Settings):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101). The decay is for matrices only: not for norms, biases,
    embeddings."""

    learning_rate: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)


class ScheduleConfig(Settings):
    """How the learning rate moves. `warmup_steps`: a linear rise, for every kind.

    "cosine" falls from there to `min_learning_rate` at `max_steps`. "plateau" multiplies by `factor` whenever
    `patience` evaluations in a row did not improve the monitored metric by more than `min_delta`, at most
    `max_reductions` times and never below `min_learning_rate`.
    """

    name: Literal["constant", "cosine", "plateau"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    min_learning_rate: float = Field(default=0.0, ge=0)
    factor: float = Field(default=0.5, gt=0, lt=1)
    patience: int = Field(default=2, ge=1)
    min_delta: float = Field(default=0.0, ge=0)
    max_reductions: int = Field(default=5, ge=0)


class EarlyStoppingConfig(Settings):
    """Training ends when `patience` evaluations in a row (None: never) did not improve by more than `min_delta`."""

    patience: int | None = Field(default=None, ge=1)
    min_delta: float = Field(default=0.0, ge=0)


#: Settings that change no result; they are left out of the signature. A GPU's runs have signatures of their own: it
#: rounds otherwise, draws other random numbers, and data that live on it are batched there.
UNSIGNED = frozenset({"checkpoint_every", "workers"})


class TrainConfig(Settings):
    """What every system's run is told.

    `accumulate`: batches per optimizer step, over all processes together: two processes with `accumulate = 2` do what
    one does. `monitor` is the metric of evaluations that early stopping, plateau and the best weights go by; `mode`
    says whether it is to fall ("min") or to rise ("max"). `eval_every` and `checkpoint_every` count steps; the last
    step is always evaluated and kept. `ema_decay`: evaluations use an exponential moving average of the weights.
    """

    seed: int = Field(default=0, ge=0, lt=2**31)
    max_steps: int = Field(default=1000, ge=1, lt=2**31)
    accumulate: int = Field(default=1, ge=1)
    precision: Literal["32", "bf16"] = "32"
    gradient_clip: float | None = Field(default=1.0, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    eval_every: int = Field(default=100, ge=1)
    checkpoint_every: int = Field(default=100, ge=1)
    workers: int = Field(default=0, ge=0, le=256)
    device: Literal["cpu", "cuda"] = "cpu"


@functools.cache
def config_class(system: type[BaseModel]) -> type[TrainConfig]:
    """The trainer's settings and a system's in one class."""
    both = set(system.model_fields) & set(TrainConfig.model_fields)
    if both:
        raise TypeError(f"{system.__name__}: expected names that TrainConfig has not, got {', '.join(sorted(both))}")
    bases: Any = (TrainConfig, system)
    made: type[TrainConfig] = create_model(system.__name__, __base__=bases)
    return made


def load_config(
    system: type[BaseModel],
    *,
    defaults: Mapping[str, Any] | None = None,
    file: Path | None = None,
    settings: Sequence[str] = (),
) -> TrainConfig:
    """The settings of one run.

    Args:
        system: the system's own settings class.
        defaults: the system's choices for `TrainConfig`, nested like a file.
        file: .toml, .yaml, .yml or .json.
        settings: "a.b=c" each; c is read as TOML, then as JSON, else it is the string itself.

    Raises:
        UsageError: no such file, unreadable, an unknown key (with the nearest known ones) or a wrong value.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    _merge(values, dict(defaults or {}), "default", sources)
    if file is not None:
        _merge(values, read_settings(file), str(file), sources)
    for setting in settings:
        path, value = parse_setting(setting)
        _merge(values, _nested(path, value), "--set", sources)
    kind = config_class(system)
    try:
        # As JSON: strict about numbers and strings, but tables become dataclasses and lists become tuples.
        return kind.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise UsageError("; ".join(_told(kind, e, sources) for e in error.errors(include_url=False))) from None


def parse_setting(setting: str) -> tuple[str, Any]:
    """("a.b", c) of "a.b=c"."""
    path, equals, text = setting.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        raise UsageError(f"--set: expected key=value such as optimizer.learning_rate=1e-3, got {setting!r}")
    return path, parse_value(text.strip())


def parse_value(text: str) -> Any:
    """1, 1e-3, true, "x", [0.9, 0.99] and null as what they are; everything else as a string."""
    for read in (lambda: tomllib.loads(f"value = {text}")["value"], lambda: json.loads(text)):
        try:
            return read()
        except ValueError:
            continue
    return text


def signature(config: TrainConfig) -> str:
    """8 hex digits that stand for all settings that change results."""
    return hashlib.sha256(canonical(config).encode()).hexdigest()[:8]


def canonical(config: TrainConfig) -> str:
    """The settings that change results as JSON, keys sorted, no spaces."""
    values = config.model_dump(mode="json", exclude=set(UNSIGNED))
    if config.device == "cpu":
        del values["device"]
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


class _Yaml(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3 for a string; YAML 1.2, and whoever writes a learning rate, for a number."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_settings(file: Path) -> dict[str, Any]:
    """The table in a TOML, YAML or JSON file."""
    readers: dict[str, Any] = {
        ".toml": tomllib.loads,
        ".yaml": lambda text: yaml.load(text, _Yaml),
        ".yml": lambda text: yaml.load(text, _Yaml),
        ".json": json.loads,
    }
    if file.suffix not in readers:
        raise UsageError(f"--config: expected a .toml, .yaml, .yml or .json file, got {file}")
    try:
        values = readers[file.suffix](file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config: cannot read {file}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: not valid {file.suffix[1:].upper()}: {' '.join(str(error).split())}") from None
    # An empty YAML file is None: nothing set.
    if not isinstance(values, dict | None):
        raise UsageError(f"{file}: expected a table of settings, got {type(values).__name__}")
    return values or {}


def _nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return dict(value)


def _merge(into: dict[str, Any], values: Mapping[Any, Any], source: str, sources: dict[str, str], at: str = "") -> None:
    """Lays `values` over `into`, table by table, and notes for every value where it came from."""
    for key, value in values.items():
        path = f"{at}{key}"
        if isinstance(value, Mapping):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            sources.setdefault(path, source)
            _merge(into[key], value, source, sources, f"{path}.")
        else:
            into[key] = value
            sources[path] = source


def _told(kind: type[BaseModel], error: Any, sources: Mapping[str, str]) -> str:
    """One pydantic error as "where: what was expected, what came"."""
    path = ".".join(map(str, error["loc"]))
    source = next((sources[p] for p in _prefixes(path) if p in sources), "config")
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{source}: {path}: unknown key{did_you_mean(path, sorted(_paths(kind)))}"
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if expected != error["msg"] and error["type"] != "value_error":
        return f"{source}: {path}: expected {expected}, got {error['input']!r:.80}"
    return f"{source}: {path}: {expected}"


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        yield ".".join(parts[:n])


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """ "; did you mean x?", or "" where nothing is near. A known key of the same name in another table is near."""
    last = name.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == last] or difflib.get_close_matches(name, known, n=1)
    if not near:
        # A wrong table and a slip in the name, such as lr_rate for optimizer.learning_rate.
        by_last = {k.rpartition(".")[2]: k for k in reversed(known)}
        near = [by_last[m] for m in difflib.get_close_matches(last, by_last, n=1)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _paths(kind: Any, at: str = "") -> Iterator[str]:
    """Every dotted path that a settings class knows, tables and values."""
    fields: dict[str, Any] = {}
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = {name: field.annotation for name, field in kind.model_fields.items()}
    elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
        fields = typing.get_type_hints(kind)
    for name, annotation in fields.items():
        yield f"{at}{name}"
        for option in typing.get_args(annotation) or (annotation,):
            yield from _paths(option, f"{at}{name}.")
