"""One bit of a checkpoint of any format changed: refused, or harmless since the same tensors are read."""

from __future__ import annotations

import random
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mae_dist.weights import files

TENSORS = {"a": torch.arange(600, dtype=torch.float32), "b.weight": torch.ones(8, 8)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_bit_flips_in_pth_and_npz_are_found_or_harmless(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.pth")
    np.savez(tmp_path / "x.npz", **{name: tensor.numpy() for name, tensor in TENSORS.items()})  # pyright: ignore
    chance, num_harmless = random.Random(0), 0
    for name, read in (("x.pth", files.read_pth), ("x.npz", files.read_npz)):
        content = (tmp_path / name).read_bytes()
        for _ in range(50):
            flipped = bytearray(content)
            flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            (tmp_path / f"flipped-{name}").write_bytes(flipped)
            with suppress(ValueError):
                assert same(read(tmp_path / f"flipped-{name}"))
                num_harmless += 1
    assert num_harmless < 50


def test_pth_without_checksums_is_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(TENSORS, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(files.read_pth(tmp_path / "x.pth"))


@pytest.mark.parametrize("name", ["x.npz", "x.pth"])
def test_archive_that_unpacks_to_gigabytes_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy" if name == "x.npz" else "x/data.pkl", bytes(2**20))
        archive.infolist()[0].file_size = 2**34
    with pytest.raises(ValueError, match=f"{name}: damaged: unpacks to"):
        (files.read_npz if name == "x.npz" else files.read_pth)(tmp_path / name)


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_TENSORS", 1)
    save_file(TENSORS, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="2 tensors, more than 1"):
        files.read_safetensors(tmp_path / "x.safetensors")


def test_bit_flips_in_our_safetensors_are_found_or_harmless(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", {files.DIGEST: files.digest(TENSORS)})
    content, chance = (tmp_path / "x.safetensors").read_bytes(), random.Random(0)
    assert same(files.read_safetensors(tmp_path / "x.safetensors")[0])
    for _ in range(50):
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        (tmp_path / "flipped.safetensors").write_bytes(flipped)
        with suppress(ValueError):
            assert same(files.read_safetensors(tmp_path / "flipped.safetensors")[0])
