"""What probe and finetune share: training on labels, accuracy on the test split, result.json."""

from __future__ import annotations

from mae_dist import evaluate
from mae_dist.objectives.classify import Classifier
from mae_dist.stages.setup import Setup
from mae_dist.train import fit


def train_and_test(setup: Setup, objective: Classifier, num_micro: int | None = None) -> None:
    """Fit the objective, in as many micro-batches as machine.micro_batch says unless they are given, and write the test
    accuracy.
    """
    test_split = setup.test_split
    assert test_split is not None
    train_source, test_source = setup.source(setup.train_split, training=True), setup.source(test_split)
    if num_micro is None:
        setup = setup.with_micro_batch(objective)  # beside the images that are kept on the GPU
        num_micro = setup.num_micro

    def evaluate_step(_: int) -> dict[str, float]:
        counts = evaluate.accuracy(objective, setup.evaluation_batches(test_source), setup.device)
        numbers = evaluate.percentages(counts, len(test_split))
        return {f"test_{name}" if name.startswith("top") else name: value for name, value in numbers.items()}

    task = setup.task(objective, train_source, num_micro, evaluate_step)
    numbers = fit(task, setup.run, setup.config, setup.device)
    renamed = {name.removeprefix("test_"): value for name, value in numbers.items()}
    setup.run.finish({"verb": setup.verb} | renamed)
