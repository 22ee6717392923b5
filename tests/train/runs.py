"""Run folders as a trainer leaves them, with generated numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = {"seed": 7, "model": {"dim": 64, "moe": {"num_experts": 4, "experts_per_token": 2}}, "optimizer": {"lr": 2e-3}}
INFO = {
    "system": "structures",
    "signature": "1a2b3c4d",
    "status": "finished",
    "versions": {"moeyard": "0.1.0", "torch": "2.13.0"},
    "machine": "Linux x86_64",
    "seed": 7,
    "started": "2026-11-20T10:00:00",
    "ended": "2026-11-20T10:10:00",
    "steps": 20,
}


def record(step: int, steps: int, usage: Any, rng: np.random.Generator) -> dict[str, Any]:
    """One training line: a falling loss with noise, rates, fill, usage."""
    part = step / max(steps, 1)
    noise = float(rng.normal(0, 0.05))
    seconds, atoms = 0.04 + 0.01 * float(rng.random()), int(rng.integers(1700, 2001))
    return {
        "step": step,
        "epoch": step // 100,
        "loss": 0.7 + 5 * math.exp(-8 * part) * (1 + noise) + 0.1 * noise,
        "loss_noise": 0.5 + math.exp(-6 * part) + 0.05 * noise,
        "loss_element": 0.1 + 4 * math.exp(-9 * part) * (1 + noise),
        "loss_balance": 1 + 0.01 * noise,
        "element_accuracy": 0.9 * (1 - math.exp(-5 * part)),
        "learning_rate": 2e-3 * min(1.0, 50 * part) * 0.5 * (1 + math.cos(math.pi * part)),
        "grad_norm": 3 * math.exp(-3 * part) * (1 + abs(noise)),
        "step_seconds": seconds,
        "data_seconds": 0.001,
        "atoms": atoms,
        "atoms_per_second": atoms / (seconds + 0.001),
        "batch_fill": atoms / 2000,
        "experts": usage,
    }


def write_run(
    folder: Path,
    steps: int,
    *,
    layers: int = 2,
    domains: int = 3,
    experts: int = 4,
    evaluate_every: int = 0,
    taste: float = 0.25,
    info: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Writes config.json, run.json and metrics.jsonl; each domain prefers some experts: `taste` at the end."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"domain-{d}" for d in range(domains)]
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "run.json").write_text(json.dumps({**INFO, "steps": steps, "domains": names, **(info or {})}))
    logits = rng.normal(size=(layers, domains, experts))
    stages = [_usage(logits * strength, rng) for strength in np.linspace(0, taste, 20)]
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = json.dumps({**record(step, steps, None, rng), "experts": 0})
            # The counts are most of a line; made once for each stage of the run.
            file.write(line[:-2] + stages[(step - 1) * 20 // steps] + "}\n")
            if evaluate_every and step % evaluate_every == 0:
                value = 0.8 + 5 * math.exp(-8 * step / steps)
                file.write(json.dumps({"step": step, "val_loss": value, "val_element_accuracy": 0.5}) + "\n")
    return folder


def _usage(logits: np.ndarray, rng: np.random.Generator) -> str:
    """[L,D,E] counts of about 1,000 slots per domain, as JSON."""
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    return json.dumps(rng.poisson(1000 * weights / weights.sum(axis=2, keepdims=True)).tolist())
