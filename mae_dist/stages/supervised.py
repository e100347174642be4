"""What probe and finetune share: training on labels, accuracy on the test split, result.json."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from mae_dist import evaluate
from mae_dist.data.loader import Source
from mae_dist.objectives.classify import Classifier
from mae_dist.stages import warn
from mae_dist.stages.setup import Setup, num_classes
from mae_dist.train import fit

K = TypeVar("K", bound=Classifier)


def train_and_test(
    setup: Setup[Any], objective: K, num_micro: int | None = None,
    adapt: Callable[[Setup[Any], K, Source], None] | None = None,
) -> None:  # fmt: skip
    """Fit the objective, in as many micro-batches as machine.micro_batch says unless they are given, and write the test
    accuracy. A new run begins with initial weights, and with ``adapt(setup, objective, training images)``.
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
    if adapt is not None:

        def load_and_adapt() -> None:
            setup.load_initial_weights(objective)
            adapt(setup, objective, train_source)

        task = dataclasses.replace(task, load_initial_weights=load_and_adapt)
    numbers = fit(task, setup.run, setup.config, setup.device)
    top1, count = numbers["test_top1"], int(numbers["num_test_images"])
    setup.warn(warn.of_chance(top1, count, test_split, num_classes(test_split), "top-1"))
    renamed = {name.removeprefix("test_"): value for name, value in numbers.items()}
    setup.run.finish({"verb": setup.verb} | renamed)
