"""Checkpoints: whole or not there, checked when read, never unpickled.

    checkpoints/step-00000100/weights.safetensors   the model
                              ema.safetensors       its moving average, where one is kept
                              state.pt              optimizer, schedule, loops, position in the data: weights_only
                              manifest.json         system, signature, step, size and sha256 of every file
    checkpoints/best-00000080/                      weights alone, of the best evaluation

A checkpoint is written into a folder beside its place, flushed to the disk and renamed; only then does the one before
it go. Random generators have no state to keep: every batch starts them from the seed and its own number.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from moeyard.train.errors import UsageError
from moeyard.train.files import clear_disk_errors, sync

FORMAT = 1

#: Where the parts of a module's state go; everything else is in state.pt.
_WEIGHTS = {"model.": "weights.safetensors", "ema.module.": "ema.safetensors"}


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: `<run>/checkpoints`.
        system, signature: of the run; a checkpoint of another one is refused.
    """

    def __init__(self, folder: Path, *, system: str, signature: str) -> None:
        self.folder, self.system, self.signature = folder, system, signature

    def path(self, step: int, kind: str = "step") -> Path:
        return self.folder / f"{kind}-{step:08d}"

    def latest(self, kind: str = "step") -> Path | None:
        """The newest complete checkpoint, None where there is none."""
        found = sorted(path.parent for path in self.folder.glob(f"{kind}-*/manifest.json"))
        return found[-1] if found else None

    def save(self, checkpoint: Mapping[str, Any], step: int, kind: str = "step") -> Path:
        """Writes a checkpoint and then removes the older ones of its kind.

        Args:
            checkpoint: `state_dict` (keys "model.*" and "ema.*") and whatever else is to come back: tensors,
                numbers, strings, lists and dicts.
            step: optimizer steps done.
            kind: "step" or "best".

        Raises:
            UsageError: the disk is full or may not be written; the checkpoint before is still there.
        """
        place = self.path(step, kind)
        part = place.with_name(f".{place.name}.part")
        try:
            with clear_disk_errors(f"the checkpoint of step {step} to {place}{self._kept(kind)}"):
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
                self._write(part, checkpoint, step)
                # The same step again, after a resume: a folder can only take the place of none.
                shutil.rmtree(place, ignore_errors=True)
                os.rename(part, place)
                sync(self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        for old in self.folder.glob(f"{kind}-*"):
            if old != place:
                shutil.rmtree(old, ignore_errors=True)
        return place

    def _kept(self, kind: str) -> str:
        latest = self.latest(kind)
        return f" ({latest.name} is kept)" if latest is not None else ""

    def _write(self, folder: Path, checkpoint: Mapping[str, Any], step: int) -> None:
        tensors, rest = _split(checkpoint)
        contents = {name: save_tensors(table) for name, table in tensors.items()}
        buffer = io.BytesIO()
        torch.save(rest, buffer)
        contents["state.pt"] = buffer.getvalue()
        manifest = {
            "format": FORMAT,
            "system": self.system,
            "signature": self.signature,
            "step": step,
            "files": {
                name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in contents.items()
            },
        }
        contents["manifest.json"] = (json.dumps(manifest, indent=2) + "\n").encode()
        for name, data in contents.items():
            (folder / name).write_bytes(data)
            sync(folder / name)
        sync(folder)

    def load(self, place: Path) -> dict[str, Any]:
        """What `save` was given.

        Raises:
            UsageError: not a checkpoint, of another system or configuration, or damaged.
        """
        manifest = self.manifest(place)
        contents = {name: _checked(place / name, entry) for name, entry in manifest["files"].items()}
        checkpoint: dict[str, Any] = torch.load(io.BytesIO(contents["state.pt"]), weights_only=True, map_location="cpu")
        for prefix, name in _WEIGHTS.items():
            if name in contents:
                tensors = load_tensors(contents[name])
                checkpoint["state_dict"].update({prefix + key: tensor for key, tensor in tensors.items()})
        return checkpoint

    def weights(self, place: Path) -> dict[str, Tensor]:
        """The weights that evaluations use: the moving average where there is one."""
        manifest = self.manifest(place)
        name = "ema.safetensors" if "ema.safetensors" in manifest["files"] else "weights.safetensors"
        return load_tensors(_checked(place / name, manifest["files"][name]))

    def manifest(self, place: Path) -> dict[str, Any]:
        """What manifest.json says, if it is this run's."""
        try:
            manifest: dict[str, Any] = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
            missing = {"format", "system", "signature", "step", "files"} - set(manifest)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{place}: not a checkpoint: {error}") from None
        if missing or manifest["format"] != FORMAT:
            raise UsageError(f"{place}: expected a checkpoint of format {FORMAT}, got {manifest.get('format')}")
        for name in ("system", "signature"):
            if manifest[name] != getattr(self, name):
                raise UsageError(
                    f"{place}: a checkpoint of another configuration: expected {name} {getattr(self, name)}, "
                    f"got {manifest[name]}"
                )
        return manifest


def _split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors per safetensors file, and the rest."""
    tensors: dict[str, dict[str, Tensor]] = {}
    left: dict[str, Tensor] = {}
    for key, tensor in checkpoint["state_dict"].items():
        prefix = next((p for p in _WEIGHTS if key.startswith(p)), None)
        if prefix is None:
            left[key] = tensor
        else:
            # A copy each: safetensors refuses tensors that share memory, as tied weights do.
            copy = tensor.detach().cpu().contiguous().clone()
            tensors.setdefault(_WEIGHTS[prefix], {})[key.removeprefix(prefix)] = copy
    return tensors, {**checkpoint, "state_dict": left}


def _checked(path: Path, entry: Mapping[str, Any]) -> bytes:
    """A file's content, if it is what was written."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; --restart trains anew") from None
    digest = hashlib.sha256(data).hexdigest()
    if len(data) != entry["bytes"] or digest != entry["sha256"]:
        raise UsageError(
            f"{path}: damaged: expected {entry['bytes']} bytes with sha256 {entry['sha256'][:12]}..., "
            f"got {len(data)} with {digest[:12]}...; --restart trains anew"
        )
    return data
