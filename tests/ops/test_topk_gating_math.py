"""The shared score functions: error in units in the last place (ulp) over dense ranges, and the edges."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import mpmath
import numpy as np
import pytest

FUNCTIONS = ("exp", "log", "log1p", "sigmoid", "softplus", "sqrtsoftplus", "sigmoid_slope", "sqrtsoftplus_slope")
ROOT = Path(__file__).resolve().parents[2]
#: the stated bounds, for float32 and float64 alike
MAX_ULP = {
    "exp": 1.3,
    "log": 2.1,
    "log1p": 2.1,
    "sigmoid": 2.4,
    "softplus": 2.6,
    "sqrtsoftplus": 1.8,
    "sigmoid_slope": 4.0,
    "sqrtsoftplus_slope": 3.6,
}
Probe = Callable[[str, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler; set PATH")
    library = tmp_path_factory.mktemp("probe") / "score_math_probe.so"
    source = ROOT / "tests" / "ops" / "score_math_probe.cpp"
    flags = ["-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True, timeout=100)
    native = ctypes.CDLL(str(library))

    def call(name: str, x: np.ndarray) -> np.ndarray:
        entry = native.probe_f32 if x.dtype == np.float32 else native.probe_f64
        out = np.empty_like(x)
        entry(
            FUNCTIONS.index(name),
            ctypes.c_void_p(x.ctypes.data),
            ctypes.c_void_p(out.ctypes.data),
            ctypes.c_int64(x.size),
        )
        return out

    return call


def points(name: str, dtype: type, count: int) -> np.ndarray:
    """Dense over the function's domain, half of them spread by magnitude so that small arguments are covered too."""
    rng = np.random.default_rng(0)
    cutoff = 87.2 if dtype == np.float32 else 708.2
    small = 10.0 ** rng.uniform(-12, 0, count // 2)
    if name == "log":
        x = np.concatenate(
            [rng.uniform(1, 8192, count // 2), 1 + small, 2.0 ** rng.integers(-100, 100, count // 2) * 1.5]
        )
    elif name == "log1p":
        x = np.concatenate([rng.uniform(0, 1, count // 2), small, [0.0, 1.0]])
    elif name == "exp":
        x = -np.concatenate([rng.uniform(0, cutoff, count // 2), small, [0.0]])
    else:
        x = np.concatenate([rng.uniform(-cutoff, cutoff, count // 2), rng.uniform(-20, 20, count // 2), small, -small])
    return x.astype(dtype)


def ulp_errors(name: str, x: np.ndarray, got: np.ndarray, exact: np.ndarray, low: np.ndarray | float = 0.0) -> float:
    """The largest |got - (exact + low)| in ulp of the result."""
    spacing = np.spacing(np.abs(exact).astype(x.dtype)).astype(np.float64)
    return float((np.abs((got.astype(np.float64) - exact) - low) / spacing).max())


def exact_float64(name: str, x: np.ndarray) -> np.ndarray:
    """Accurate to float64 rounding: good enough to judge float32."""
    x = x.astype(np.float64)
    e = np.exp(-np.abs(x))
    s = np.logaddexp(0, x) if name != "log1p" else np.log1p(x)
    return {
        "exp": lambda: np.exp(x),
        "log": lambda: np.log(x),
        "log1p": lambda: s,
        "sigmoid": lambda: np.where(x > 0, 1, e) / (1 + e),
        "softplus": lambda: s,
        "sqrtsoftplus": lambda: np.sqrt(s),
        "sigmoid_slope": lambda: e / (1 + e) ** 2,
        "sqrtsoftplus_slope": lambda: np.where(x > 0, 1, e) / (1 + e) / (2 * np.sqrt(s)),
    }[name]()


def exact_mpmath(name: str, v: float) -> mpmath.mpf:
    x = mpmath.mpf(v)
    if name == "exp":
        return mpmath.exp(x)
    if name == "log":
        return mpmath.log(x)
    if name == "log1p":
        return mpmath.log1p(x)
    sigmoid, softplus = 1 / (1 + mpmath.exp(-x)), mpmath.log1p(mpmath.exp(x))
    return {
        "sigmoid": sigmoid,
        "softplus": softplus,
        "sqrtsoftplus": mpmath.sqrt(softplus),
        "sigmoid_slope": sigmoid * (1 / (1 + mpmath.exp(x))),
        "sqrtsoftplus_slope": sigmoid / (2 * mpmath.sqrt(softplus)),
    }[name]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32(probe: Probe, name: str) -> None:
    x = points(name, np.float32, 400_000)
    assert ulp_errors(name, x, probe(name, x), exact_float64(name, x)) <= MAX_ULP[name]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64(probe: Probe, name: str) -> None:
    x = points(name, np.float64, 800)
    with mpmath.workprec(2200):
        exact = [exact_mpmath(name, float(v)) for v in x]
        high = np.array([float(v) for v in exact])
        low = np.array([float(v - mpmath.mpf(h)) for v, h in zip(exact, high, strict=True)])
    assert ulp_errors(name, x, probe(name, x), high, low) <= MAX_ULP[name]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_edges(probe: Probe, dtype: type) -> None:
    inf, tiny = np.inf, np.finfo(dtype).tiny

    def at(name: str, *values: float) -> list[float]:
        return probe(name, np.array(values, dtype=dtype)).tolist()

    assert at("exp", 0.0, -0.0, -inf, -1e30) == [1, 1, 0, 0]
    assert at("log", 1.0) == [0]
    assert at("log1p", 0.0) == [0]
    assert at("sigmoid", 0.0, -0.0, inf, -inf) == [0.5, 0.5, 1, 0]
    assert at("softplus", inf, -inf, 1e30) == [inf, 0, float(dtype(1e30))]
    assert at("sqrtsoftplus", -inf, -1e30) == [0, 0]
    assert at("sigmoid_slope", 0.0, inf, -inf) == [0.25, 0, 0]
    assert at("sqrtsoftplus_slope", -inf, -1e30) == [0, 0]
    for name in ("exp", "sigmoid", "softplus", "sqrtsoftplus", "sigmoid_slope"):
        assert np.isnan(at(name, np.nan, -np.nan)).all()
    # Nothing subnormal is ever made: a device that flushes such numbers would otherwise differ.
    x = np.linspace(-800, 0, 200_001).astype(dtype)
    for name in ("exp", "sigmoid", "softplus"):
        y = probe(name, x)
        assert ((y == 0) | (y >= tiny)).all()


@pytest.mark.parametrize("name", ["sigmoid", "softplus", "sqrtsoftplus"])
def test_monotone(probe: Probe, name: str) -> None:
    """To rounding: a larger logit never gets a score that is more than 3 ulp smaller."""
    x = np.sort(points(name, np.float32, 200_000))
    y = probe(name, x).astype(np.float64)
    assert (np.diff(y) >= -3 * np.spacing(y[1:].astype(np.float32))).all()
