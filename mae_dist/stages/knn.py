"""`mae-dist knn CONFIG.yaml init_from=RUN data.path=... out=RUN2`: weighted nearest neighbours on frozen features."""

import dataclasses

import torch

from mae_dist import dist, evaluate, parallel
from mae_dist.models.backbone import Backbone
from mae_dist.objectives import Objective
from mae_dist.run import tracker
from mae_dist.schema import KnnRunConfig
from mae_dist.stages.setup import Setup, num_classes, prepare_run


def run(config: KnnRunConfig) -> None:
    """Classify the test split to the end; the same call on a finished run does nothing."""
    machine = dataclasses.replace(config.machine, strategy="ddp", shards=None)  # nothing to share
    opened = prepare_run("knn", dataclasses.replace(config, machine=machine), True, lambda setup: setup.backbone)
    if opened is None:
        return
    setup, backbone = opened
    with setup.recorded():
        classify(setup, backbone)


def classify(setup: Setup[KnnRunConfig], backbone: Backbone) -> None:
    """Compute features of both splits, let the training ones vote, write result.json."""
    assert setup.test_split is not None
    config = setup.config
    setup.run.record_launch(0, setup.device)
    setup.load_initial_weights(Objective(backbone, config.train.seed))
    backbone = backbone.to(setup.device)
    train_source, test_source = setup.source(setup.train_split), setup.source(setup.test_split)
    with torch.no_grad(), parallel.autocast(config.train.precision, setup.device):
        bank = evaluate.features(backbone, backbone.dim, setup.evaluation_batches(train_source), setup.device)
        queries = evaluate.features(backbone, backbone.dim, setup.evaluation_batches(test_source), setup.device)
    setup.changes.log_new()
    bank = (dist.gather(bank[0]), dist.gather(bank[1]))
    counts = evaluate.knn(bank, queries, num_classes(setup.train_split), config.knn.k, config.knn.temperature)
    result = evaluate.percentages(dist.all_reduce_sum(counts), len(setup.test_split))
    setup.run.finish({"verb": "knn"} | result)
    tracker.mirror_result(setup.run.path, setup.config, "knn", result)
