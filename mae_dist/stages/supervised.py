"""What probe and finetune share: training on labels, accuracy on the test split, result.json."""

from __future__ import annotations

from mae_dist import evaluate
from mae_dist.objectives.classify import Classifier
from mae_dist.stages.opening import Opening
from mae_dist.train import fit


def train_and_test(verb: str, opening: Opening, objective: Classifier, num_micro: int) -> None:
    """Fit the objective and write the test accuracy."""
    assert opening.test is not None
    config = opening.config
    train, test = opening.source(opening.train, training=True), opening.source(opening.test)

    def look(_: int) -> dict[str, float]:
        counts = evaluate.accuracy(objective, opening.evaluation_batches(test), opening.device)
        return {"test_top1": counts["top1"], "test_top5": counts["top5"], "num_test_images": counts["num_test_images"]}

    numbers = fit(
        run=opening.run, verb=verb, config=config, objective=objective,
        spare_tokens=True, begin=lambda: opening.begin(objective.backbone),
        batches=lambda steps: opening.training_batches(train, num_micro, steps), num_micro=num_micro,
        num_samples=len(opening.train), describe=opening.train.describe, evaluate=look, device=opening.device,
    )  # fmt: skip
    renamed = {name.removeprefix("test_"): value for name, value in numbers.items()}
    opening.run.finish({"verb": verb} | renamed)
