"""Nothing that is written holds a secret of the environment, of the working folder or of the home."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from running import MAE, SETTINGS

from launch import snapshot, submit
from mae_dist.__main__ import main

SECRET = "canary-0d1f6b"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder and a home with secrets in files, and an environment with secrets in variables."""
    work, home = tmp_path / "work", tmp_path / "home"
    for folder in (work, home, home / ".aws", home / ".config" / "wandb"):
        folder.mkdir(parents=True)
    for file in (work / ".env", work / "key.pem", home / ".netrc", home / ".aws" / "credentials", work / "secret.yaml"):
        file.write_text(f"password: {SECRET}\n")
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "GITHUB_TOKEN", "SLURM_JWT", "MY_PASSWORD"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    return work


def test_no_secret_is_written(planted: Path, tiny_data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [*SETTINGS, *MAE, f"data.path={tiny_data}"]
    Path("cluster.yaml").write_text(yaml.safe_dump({"time": "1:00:00", "setup": ["true"]}))
    for argv in (
        ["preflight", "pretrain", *words, "out=run", "train.steps=1"], ["recipe", str(tiny_data)],
        ["pretrain", *words, "out=run", "train.steps=1"], ["runs", ".", "--results", "results.md"], ["logs", "run"],
        ["finetune", *SETTINGS, f"data.path={tiny_data}", "init_from=run", "out=tuned", "train.steps=1"],
        ["embed", "run", str(tiny_data), "--out", "features"], ["predict", "tuned", str(tiny_data), "--out", "classes"],
        ["report", "run", "tuned", "classes"],
        ["export", "run", "--to", "timm", "--out", "x.pth"], ["export", "run", "--to", "hf", "--out", "hf"],
        ["export", "run", "--to", "safetensors", "--out", "own"], ["import", "x.pth", "--out", "imported"],
        ["ckpt", "verify", "run"], ["data", "show", str(tiny_data), "--out", "sheet.png"],
    ):  # fmt: skip
        assert main([str(word) for word in argv]) in ((0, 1) if argv[0] == "preflight" else (0,))
    assert submit.main(["pretrain", *words, "out=job", "--cluster", "cluster.yaml", "--dry-run"]) == 0
    snapshot.copy_code(Path("code"))
    output = "".join(capfd.readouterr())
    written = [
        file for file in planted.rglob("*") if file.is_file() and file.name not in (".env", "key.pem", "secret.yaml")
    ]
    assert len(written) > 100
    assert [file for file in written if SECRET.encode() in file.read_bytes()] == []
    assert SECRET not in output
