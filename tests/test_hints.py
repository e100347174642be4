"""Names and values of other codebases, and former ones of our own: each is answered with ours."""

import re
from pathlib import Path

import pytest

from mae_dist import config, hints

NEEDED = ["data.path=d", "out=o", "model.name=vit_ti4"]
READERS = config.readers()
MEANINGS = {verb: {name: item.help for name, item in config.settings_of(verb).items()} for verb in config.SCHEMAS}
FOREIGN = [(word, setting) for setting, words in hints.words("names").items() for word in words.split()]


@pytest.mark.parametrize(("word", "setting"), FOREIGN, ids=[f"{word}-{setting}" for word, setting in FOREIGN])
def test_name_of_another_codebase_is_answered_with_our_setting(word: str, setting: str) -> None:
    """Alone, with a section, and as a flag; for a verb without the setting, with the verbs that have it."""
    for name in {word, *([] if "." in word else [f"cfg.{word}", word.replace("_", "-")])}:
        for verb, meanings in MEANINGS.items():
            text = hints.wrong_name(name, "x", meanings, READERS)
            assert text.startswith(f"{name}: ")
            if verb in READERS[setting]:
                assert f" {setting} ({meanings[setting]})" in text
            else:
                assert text.endswith("; leave it out") or "; use " in text


@pytest.mark.parametrize(("answer", "words"), hints.words("no_setting").items(), ids=lambda text: text.split()[0])
def test_name_without_a_setting_is_answered_with_what_to_do(answer: str, words: str) -> None:
    for word in words.split():
        for name in (word, f"cfg.{word}"):
            text = hints.wrong_name(name, 1, MEANINGS["finetune"], READERS)
            assert text == f"{name}: there is no such setting; {answer}"


def test_names_of_other_codebases_are_none_of_ours() -> None:
    keys = {name.rpartition(".")[2] for name in READERS}
    tables = (hints.words(name).values() for name in ("names", "no_setting"))
    words = [word for table in tables for row in table for word in row.split()]
    assert not keys & set(words)
    assert {*hints.words("names"), *hints.words("values")} <= set(READERS)
    doubled = {word for word in words if words.count(word) > 1}
    assert doubled == {"decay"}


CHOICES = [
    (name, word, ours)
    for name, table in hints.words("values").items()
    for ours, words in table.items()
    for word in words.split()
]


@pytest.mark.parametrize(("name", "word", "ours"), CHOICES, ids=[f"{name}-{word}" for name, word, _ in CHOICES])
def test_value_of_another_codebase_is_answered_with_our_value(name: str, word: str, ours: str) -> None:
    choices = hints.choices_of(config.settings_of(READERS[name][0])[name].kind)
    assert hints.wrong_value(name, word, choices) == f"{name}={word}: must be one of {', '.join(choices)}; use {ours}"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lr=1e-3", "optim.lr: there is no such setting; use optim.base_lr (lr per 256 images; "),
        ("lr=1e-3", "lr: there is no such setting; use optim.base_lr (lr per 256 images; "),
        ("train.batch_size=64", "train.batch_size: there is no such setting; use train.global_batch (images per "),
        ("strategy=zero3", "strategy: there is no such setting; use machine.strategy=fsdp ("),
        ("machine.parallel=fsdp2", "machine.parallel: there is no such setting; use machine.strategy=fsdp ("),
        ("train.precision=16-mixed", "train.precision=16-mixed: must be one of auto, fp32, bf16, fp16; use fp16"),
        ("machine.strategy=zero3", "machine.strategy=zero3: must be one of ddp, fsdp, hsdp; use fsdp"),
        ("heads.features=[cls,gap]", "heads.features=[cls, gap]: must be one of cls, mean, both; use mean"),
        (
            "accum_iter=4",
            "accum_iter: there is no such setting; each rank splits its share of train.global_batch into ",
        ),
        ("trainer.precision=16-mixed", "trainer.precision: there is no such setting; use train.precision=fp16 ("),
        ("optim.decay=linear", "optim.decay: there is no such setting; use optim.schedule ("),
        ("machine.recompute=1", "machine.recompute: there is no such setting; use machine.activation_checkpointing ("),
        ("board.weight_decay=[0]", "board.weight_decay: there is no such setting; use heads.weight_decay (weight"),
        ("view.erase=0.25", "view.erase: there is no such setting; use view.random_erasing ("),
        ("train.reduce=bf16", "train.reduce: there is no such setting; use train.reduce_dtype ("),
        ("train.clip=1", "train.clip: there is no such setting; use train.clip_grad ("),
        ("from=random", "from: there is no such setting; use init_from ("),
        ("model=vit_b16", "model: is a section of settings; use model.name (model, for example vit_b16; "),
        (
            "every=1",
            "every: there is no such setting; use checkpoint.every (steps between checkpoints) or track.every (",
        ),
    ],
)
def test_former_and_foreign_names_get_one_sentence_with_the_meaning(word: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        config.load("probe", None, [*NEEDED, "init_from=random", word])


def test_name_of_another_codebase_in_a_file_is_answered_with_our_setting(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("optimizer: {lr: 1.0e-3}")
    with pytest.raises(ValueError, match=rf"^{file}: optimizer\.lr: there is no such setting; use optim\.base_lr "):
        config.load("pretrain", file, NEEDED)
    file.write_text("machine: {strategy: deepspeed}")
    with pytest.raises(ValueError, match=rf"^{file}: machine\.strategy=deepspeed: must be one of .*; use fsdp$"):
        config.load("pretrain", file, NEEDED)
