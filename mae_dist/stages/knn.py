"""`mae-dist knn CONFIG.yaml from=RUN data.path=... out=RUN2`: weighted nearest neighbours on frozen features."""

from __future__ import annotations

import dataclasses

import torch

from mae_dist import dist, evaluate, parallel
from mae_dist.schema import KnnRun
from mae_dist.stages.opening import num_classes, open_run


def run(config: KnnRun) -> None:
    """Compute features of both splits, let the training ones vote, write result.json."""
    machine = dataclasses.replace(config.machine, parallel="ddp", shards=None)  # nothing to share
    opened = open_run("knn", dataclasses.replace(config, machine=machine), True, lambda opening: opening.backbone)
    if opened is None:
        return
    opening, backbone = opened
    assert opening.test is not None
    opening.run.note_start(0, opening.device)
    opening.begin(backbone)
    backbone = backbone.to(opening.device)
    train, test = opening.source(opening.train), opening.source(opening.test)
    with torch.no_grad(), parallel.precision(config.train.precision, opening.device):
        bank = evaluate.features(backbone, backbone.dim, opening.evaluation_batches(train), opening.device)
        queries = evaluate.features(backbone, backbone.dim, opening.evaluation_batches(test), opening.device)
    bank = (dist.gather(bank[0]), dist.gather(bank[1]))
    counts = evaluate.knn(bank, queries, num_classes(opening.train), config.knn.k, config.knn.temperature)
    opening.run.finish({"verb": "knn"} | evaluate.percentages(dist.sum_(counts)))
