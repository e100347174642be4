"""The verbs: one file each. VERBS is what `mae-dist --help` lists; it imports nothing."""

VERBS = {
    "pretrain": "masked autoencoder pretraining on images without labels",
    "knn": "nearest neighbours on frozen features: a measure without training",
    "probe": "linear probe: a linear head on a frozen backbone",
    "finetune": "train backbone and head on labels",
    "report": "one HTML file from one or more runs: curves, pictures, numbers",
    "runs": "a table of runs: queued, running, requeued, stopped, failed, finished; how far, how fast, what came out",
    "logs": "what the newest job of a run said, the first failing rank first",
    "ckpt": "list, look into and verify the checkpoints of a run",
    "replay": "compute a past step again and show its samples, crops, masks and losses",
    "data": "pack archives and folders into tars, index tars of others, look at a data set",
    "models": "all models: parameters, operations and activation memory",
    "import": "make a run of a checkpoint of another house: official MAE, timm, transformers, Flax",
    "export": "write a run's weights as another house's file, read it again and compare",
    "chaos": "harm a run on purpose, and compare it with an undisturbed one",
    "demo": "all of the above on the embedded data set, in minutes",
    "certify": "the same short run on 1, 2, 3, 4 ranks, DDP, FSDP2, resumed, ...: how far apart they are",
    "bench": "measure a promised cost: resuming, ordering, saving, scaling, Mixer, decoder, boards",
}
"""Verb -> one line. `mae_dist.stages.VERB` has `run(config)` if the verb has a schema, else `main(argv)`. The module of
`import`, which is Python's word, is `import_`.
"""
