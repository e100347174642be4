"""The resolution schedule train.resolutions=[[0,160],[0.6,192],[0.8,224]]: from each share of the steps on, images of
so many pixels a side. A pure function of the step, that ends with model.image_size, at which all evaluations are.
Imports no torch.
"""

import math

from mae_dist.model_sizes import SIZES
from mae_dist.schema import RunConfig, TrainConfig

Size = int | tuple[int, int]


def spans(train: TrainConfig, size: Size, steps: range, total: int) -> list[tuple[range, Size]]:
    """`steps` (0 for the first), cut where the resolution changes, with the image size of each part; ``size`` is that
    of the model, at which all are without a schedule, ``total`` the number of steps of the run.
    """
    pairs = train.resolutions
    if not pairs:
        return [(steps, size)]
    first = [math.ceil(round(start * total, 6)) for start, _ in pairs]
    cut = [range(max(a, steps.start), min(b, steps.stop)) for a, b in zip(first, [*first[1:], total], strict=True)]
    return [(part, int(side)) for part, (_, side) in zip(cut, pairs, strict=True) if part] or [(steps, size)]


def sides(config: RunConfig) -> list[int]:
    """All sides of the schedule in pixels, in its order; [] without one."""
    return [int(side) for _, side in config.train.resolutions]


def check(config: RunConfig) -> None:
    """Refuse a schedule that is none, or that its model cannot follow (ValueError)."""
    pairs, model = config.train.resolutions, config.model
    text = f"train.resolutions={[list(pair) for pair in pairs]}".replace(" ", "")
    numbers = all(len(pair) == 2 and all(type(n) in (int, float) and math.isfinite(n) for n in pair) for pair in pairs)
    if not numbers or any(side < 1 or not float(side).is_integer() for _, side in pairs):
        raise ValueError(f"{text}: must be pairs [share of the steps, pixels a side], for example [[0,160],[0.8,224]]")
    shares = [share for share, _ in pairs]
    if pairs and (shares[0] != 0 or shares != sorted({*shares}) or shares[-1] >= 1):
        raise ValueError(f"{text}: shares of the steps must begin with 0 and rise, below 1")
    if pairs and pairs[-1][1] != model.image_size:
        raise ValueError(f"{text}: must end with model.image_size={model.image_size}, at which the run is evaluated")
    known = SIZES.get(model.name, {"num_heads": 1, "patch": 1})
    if pairs and "num_heads" not in known:
        raise ValueError(f"{text}: {model.name} is bound to its grid; leave it out")
    for side in sides(config):
        if side % known["patch"]:
            raise ValueError(f"{text}: {side} is not divisible by the patch size {known['patch']} of {model.name}")
