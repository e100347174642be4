"""What probe and finetune share: training on labels, accuracy on the test split, result.json."""

from __future__ import annotations

from mae_dist import evaluate
from mae_dist.objectives.classify import Classifier
from mae_dist.stages.setup import Setup
from mae_dist.train import fit


def train_and_test(verb: str, setup: Setup, objective: Classifier, num_micro: int) -> None:
    """Fit the objective and write the test accuracy."""
    assert setup.test is not None
    config = setup.config
    train, test = setup.source(setup.train, training=True), setup.source(setup.test)

    def look(_: int) -> dict[str, float]:
        counts = evaluate.accuracy(objective, setup.evaluation_batches(test), setup.device)
        return {"test_top1": counts["top1"], "test_top5": counts["top5"], "num_test_images": counts["num_test_images"]}

    numbers = fit(
        run=setup.run, verb=verb, config=config, objective=objective,
        no_decay_tokens=True, begin=lambda: setup.begin(objective.backbone),
        batches=lambda steps: setup.training_batches(train, num_micro, steps), num_micro=num_micro,
        num_samples=len(setup.train), describe=setup.train.describe, evaluate=look, device=setup.device,
    )  # fmt: skip
    renamed = {name.removeprefix("test_"): value for name, value in numbers.items()}
    setup.run.finish({"verb": verb} | renamed)
