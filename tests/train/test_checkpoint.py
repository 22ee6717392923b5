"""Checkpoints: all comes back, nothing damaged is read, a full disk costs nothing."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors", reason="needs moeyard[train]")

from moeyard.train.checkpoint import Checkpoints
from moeyard.train.errors import UsageError


def checkpoint(step: int = 3) -> dict[str, Any]:
    weight = torch.arange(6.0).reshape(2, 3) + step
    return {
        # Tied weights and a transposed view: safetensors takes neither as it is.
        "state_dict": {
            "model.a": weight,
            "model.tied": weight,
            "model.turned": weight.T,
            "ema.module.a": weight / 2,
            "ema.n_averaged": torch.tensor(step),
        },
        "global_step": step,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "lr": 1e-3}],
        "position": [1, 7],
    }


def store(folder: Path, signature: str = "01234567") -> Checkpoints:
    return Checkpoints(folder / "checkpoints", system="toy", signature=signature)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_everything_comes_back(tmp_path: Path) -> None:
    kept = store(tmp_path)
    assert kept.latest() is None
    want = checkpoint()
    place = kept.save(want, 3)
    assert kept.latest() == place
    got = kept.load(place)
    assert set(got) == set(want)
    assert set(got["state_dict"]) == set(want["state_dict"])
    for name, tensor in want["state_dict"].items():
        assert torch.equal(got["state_dict"][name], tensor)
    assert torch.equal(got["optimizer_states"][0]["state"][0]["exp_avg"], torch.ones(2))
    assert (got["global_step"], got["position"]) == (3, [1, 7])
    assert torch.equal(kept.weights(place)["a"], want["state_dict"]["ema.module.a"])


def test_a_new_one_takes_the_place_of_the_old(tmp_path: Path) -> None:
    kept = store(tmp_path)
    kept.save(checkpoint(3), 3)
    kept.save(checkpoint(12), 12)
    kept.save({"state_dict": {"model.a": torch.ones(1)}}, 12, kind="best")
    again = kept.save(checkpoint(13), 12)
    assert sorted(p.name for p in kept.folder.iterdir()) == ["best-00000012", "step-00000012"]
    assert kept.load(again)["global_step"] == 13
    assert kept.latest("best") == kept.path(12, "best")
    assert torch.equal(kept.weights(kept.path(12, "best"))["a"], torch.ones(1))


@pytest.mark.parametrize("name", ["weights.safetensors", "ema.safetensors", "state.pt"])
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_a_flipped_bit_is_noticed(tmp_path: Path, name: str, place: float) -> None:
    kept = store(tmp_path)
    path = kept.save(checkpoint(), 3)
    data = bytearray((path / name).read_bytes())
    data[int(place * len(data)) if place != -1 else -1] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(UsageError, match=f"{name}: damaged: expected {len(data)} bytes with sha256"):
        kept.load(path)


def test_missing_and_short_files_are_noticed(tmp_path: Path) -> None:
    kept = store(tmp_path)
    path = kept.save(checkpoint(), 3)
    state = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(state[:-1])
    with pytest.raises(UsageError, match=r"state.pt: damaged"):
        kept.load(path)
    (path / "state.pt").unlink()
    with pytest.raises(UsageError, match=r"state.pt: cannot be read: No such file"):
        kept.load(path)
    (path / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="expected a checkpoint of format 1, got None"):
        kept.load(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="not a checkpoint"):
        kept.load(path)


def test_another_configurations_checkpoint_is_refused(tmp_path: Path) -> None:
    path = store(tmp_path).save(checkpoint(), 3)
    with pytest.raises(UsageError, match="another configuration: expected signature 76543210, got 01234567"):
        store(tmp_path, "76543210").load(path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A pickle that runs code is refused, even with the right checksum."""
    import hashlib
    import pickle

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    kept = store(tmp_path)
    path = kept.save(checkpoint(), 3)
    data = pickle.dumps(Trap())
    (path / "state.pt").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.pt"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(pickle.UnpicklingError):
        kept.load(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("nth", range(5))
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    kept = store(tmp_path)
    kept.save(checkpoint(3), 3)
    before = files(tmp_path)
    write, written = Path.write_bytes, []

    def full(path: Path, data: bytes) -> int:
        written.append(path)
        if len(written) > nth:
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    if nth == 4:  # weights, average, state, manifest: all have been written
        kept.save(checkpoint(4), 4)
        return
    with pytest.raises(
        UsageError, match=r"cannot write the checkpoint of step 4 .*step-00000003 is kept.*No space left"
    ):
        kept.save(checkpoint(4), 4)
    assert files(tmp_path) == before
    assert kept.load(kept.latest() or tmp_path)["global_step"] == 3


def test_a_half_written_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    kept = store(tmp_path)
    kept.save(checkpoint(3), 3)
    part = kept.folder / ".step-00000004.part"
    part.mkdir()
    (part / "manifest.json").write_text("{}")
    (kept.folder / "step-00000005").mkdir()
    assert kept.latest() == kept.path(3)
