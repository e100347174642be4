"""`mae-dist probe CONFIG.yaml init_from=RUN data.path=... out=RUN2`: one head or many on a frozen backbone."""

from mae_dist import parallel
from mae_dist.objectives import classify
from mae_dist.objectives.probe_heads import ProbeHeads
from mae_dist.schema import ProbeConfig
from mae_dist.stages import probe_heads
from mae_dist.stages.setup import Setup, num_classes, prepare_run
from mae_dist.stages.supervised import train_and_test


def run(config: ProbeConfig) -> None:
    """Probe to the end; the same call resumes."""
    if config.heads.active:
        probe_heads.run(config)
        return
    opened = prepare_run("probe", config, needs_labels=True, build=build)
    if opened is None:
        return
    setup, objective = opened
    assert isinstance(objective, classify.Probe)
    # the objective itself cuts the batch for the backbone, so that its batch norm sees all of it
    with setup.recorded():
        train_and_test(setup, objective, num_micro=1)


def build(setup: Setup[ProbeConfig]) -> classify.Probe | ProbeHeads:
    """The objective that the settings describe."""
    if setup.config.heads.active:
        return probe_heads.build(setup)
    with parallel.meta_init(setup.config.machine):
        return classify.Probe(
            setup.backbone, num_classes(setup.train_split), chunk=setup.micro_batch, seed=setup.config.train.seed
        )
