"""`mae-dist recipe`: what it prints is a config file that loads and runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from running import MAE, SETTINGS, losses, refused

from mae_dist import config
from mae_dist.__main__ import main
from mae_dist.commands import recipe


def test_recipe_of_a_data_set_pretrains_on_it(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", str(tiny_data)]) == 0
    file = tmp_path / "mine.yaml"
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["model"] == {"name": "vit_ti2", "image_size": 32}
    words = [f"data.path={tiny_data}", f"out={tmp_path / 'run'}", *SETTINGS, *MAE, "train.steps=1"]
    assert main(["pretrain", str(file), *words, "optim.warmup_epochs=0"]) == 0
    assert len(losses(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    ("num_images", "side", "pixels"),
    [(11, 28, 32), (11, 375, 224), (3_000, 64, 64), (49_999, 28, 32), (49_999, 120, 112), (120_000, 64, 64),
     (120_000, 375, 224), (1_281_167, 28, 32), (1_281_167, 120, 112), (1_281_167, 375, 224)],
)  # fmt: skip
def test_recipe_is_a_config_for_any_size_of_data(num_images: int, side: int, pixels: int, tmp_path: Path) -> None:
    for verb, lines in (("pretrain", recipe.pretraining), ("finetune", recipe.finetuning)):
        text = recipe.as_yaml(lines(num_images, side))
        assert all(len(line) <= 140 and ("#" in line or line.endswith(":")) for line in text.splitlines())
        file = tmp_path / f"{verb}.yaml"
        file.write_text(text)
        loaded = config.load(verb, file, ["data.path=d", "out=o", *["init_from=r"] * (verb == "finetune")])
        assert loaded.model.image_size == pixels
        assert loaded.train.global_batch <= num_images
        assert loaded.train.global_batch % 2 == 0, "mixing takes pairs"
        assert loaded.model.name.startswith({11: "vit_ti", 120_000: "vit_s"}.get(num_images, "vit_"))


def test_recipe_of_no_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refused(capsys, "recipe", str(tmp_path / "none"))
