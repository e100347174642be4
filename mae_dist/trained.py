"""`mae_dist.load`: a trained model for Python, with the images, features, reconstructions and classes of its run.

Nothing here joins ranks or writes files, so a notebook, a script of one's own and a loader's worker may call all of it.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mae_dist import paths, restore, small_files, starts
from mae_dist.batch import Batch
from mae_dist.data import decoding
from mae_dist.data.transform import Picture, Transform
from mae_dist.data.views import View, denormalise
from mae_dist.models.backbone import Backbone
from mae_dist.objectives import Objective
from mae_dist.objectives.classify import Classifier
from mae_dist.objectives.mae import MAE
from mae_dist.objectives.probe_heads import ProbeHeads
from mae_dist.run import layout
from mae_dist.run.directory import RunDir
from mae_dist.weights import Model, Overrides

log = logging.getLogger(__name__)

Images = Picture | Sequence[Picture]
KINDS = ("pooled", "cls", "mean", "patches", "tokens")
"""Features: pooled is what heads and nearest neighbours read, the class token or the mean of the patch tokens; the
others are those of `Backbone.read`.
"""


class Reconstruction(NamedTuple):
    """Images as a masked autoencoder sees and completes them, 8-bit pixels; the mean squared error of each over its
    predicted patches; and the positions of the patches that it was shown, in row order from 0.

    With mae.norm_pix the brightness and contrast of each patch in `reconstructed` are those of the original.
    """

    original: UInt8[np.ndarray, "b h w c"]
    masked: UInt8[np.ndarray, "b h w c"]
    reconstructed: UInt8[np.ndarray, "b h w c"]
    loss: Float[Tensor, " b"]
    visible: Int[Tensor, "b v"]


class Trained:
    """A trained model in evaluation mode, with its averaged weights where it has some.

    ``model`` is the backbone, whose parameters have timm's names and which maps (b, c, h, w) to (b, dim).
    ``transform`` makes such images (see `Transform`); it is also a transform for torchvision's data sets. ``config``
    has the settings of the run, ``step`` is that of its weights, and ``classes`` are the names of its classes, () where
    it has none or they are not known. Methods take what `transform` takes, or the normalised tensors that it gives, and
    compute without gradients, on the device of the model; their results have a row for each image, also for one alone.
    """

    def __init__(self, name: str, source: Model, chosen: str | None = None):
        self.name, self.source, self.chosen = name, source, chosen
        self.config: Any = source.config
        self.step = source.step
        aligned = {name: tensor.clone() for name, tensor in source.state.items()}  # a mapped file may lie at any byte
        self.objective: Objective = restore.build(dataclasses.replace(source, state=aligned), name)
        data, model = self.config.data, self.config.model
        view = View(self.config.view, model.image_size, data.mean, data.std, self.config.train.seed, training=False)
        self.transform = Transform(view, decoding.decoding(self.config))

    def __repr__(self) -> str:
        return f"Trained({self.name}: {self.config.model.name}, {self.source.verb}, step {self.step:,})"

    @property
    def model(self) -> Backbone:
        return self.objective.backbone

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes if len(self.source.classes) == self.num_classes else ()

    @property
    def num_classes(self) -> int:
        """Outputs of its head; 0 where it has none."""
        if isinstance(self.objective, ProbeHeads):
            return len(self.source.state["linears.0.bias"])
        return len(self.source.state["head.bias"]) if isinstance(self.objective, Classifier) else 0

    @property
    def device(self) -> torch.device:
        return next(self.objective.parameters()).device

    def to(self, device: torch.device | str) -> Trained:
        """Move the model to a device; gives the same object."""
        self.objective.to(device)
        return self

    @torch.no_grad()
    def features(self, images: Images, kind: str = "pooled", block: int | None = None) -> Float[Tensor, "b ... d"]:
        """Features of images after a block (1 for the first; None: the last): (b, d) for pooled, cls and mean, (b, n,
        d) for patches and tokens, see `KINDS`. Blocks before the last are normalised without trained parameters.
        """
        block = self.check_features(kind, block)
        (tokens,) = self.model.layers(self._ready(images), {block})
        return self.model.read(tokens, block, self.resolved(kind)).float()

    def resolved(self, kind: str) -> str:
        """The kind of feature that `kind` is here: pooled is cls or mean."""
        return {"avg": "mean"}.get(self.model.pool, "cls") if kind == "pooled" else kind

    def check_features(self, kind: str, block: int | None) -> int:
        """The number of the block. Raises ValueError for a kind of feature or a block that this model does not have."""
        if kind not in KINDS:
            raise ValueError(f"features {kind}: must be {', '.join(KINDS[:-1])} or {KINDS[-1]}")
        if kind == "cls" and not self.model.num_prefix:
            raise ValueError(f"features cls: {self.config.model.name} has no class token; take pooled or mean")
        if block is not None and block not in range(1, self.model.depth + 1):
            raise ValueError(f"block {block}: {self.config.model.name} has blocks 1 to {self.model.depth}")
        return self.model.depth if block is None else block

    @torch.no_grad()
    def reconstruct(self, images: Images, seed: int = 0) -> Reconstruction:
        """Hide patches of images, by masks drawn from `seed` for each place in the batch, and predict them. All hidden
        patches are predicted, whatever mae.predict was in training. Raises ValueError for a model without decoder.
        """
        if not isinstance(self.objective, MAE):
            raise ValueError(f"{self.name}: has no decoder to reconstruct with; take a pretraining run")
        if seed not in range(2**32):
            raise ValueError(f"seed={seed}: must be a whole number from 0 to 2**32 - 1")
        objective, data = copy.copy(self.objective), self.config.data
        objective.seed = seed
        batch = self._batch(images)
        loss, prediction = objective(batch)
        pictures = objective.pictures(batch, prediction)
        original, masked, reconstructed = (denormalise(part, data.mean, data.std) for part in pictures)
        return Reconstruction(original, masked, reconstructed, loss, objective.mask(batch).visible)

    @torch.no_grad()
    def predict(self, images: Images) -> Float[Tensor, "b classes"]:
        """Logits for each class of a fine-tuned or probed run, of several heads those of the chosen one: softmax makes
        probabilities of them, for train.loss=sigmoid the sigmoid. Raises ValueError where there is no such head.
        """
        head = self.check_head()
        logits = self.objective(self._batch(images)).prediction
        return logits if head is None else logits[:, head]

    def check_head(self) -> int | None:
        """The number of the chosen one of several heads, None for the only one. ValueError where there is none."""
        if isinstance(self.objective, ProbeHeads):
            names = [head.name for head in self.objective.heads]
            if self.chosen not in names:
                chosen = f"chose {self.chosen}, which keeps no weights" if self.chosen else "is not finished"
                raise ValueError(f"{self.name}: a probe of several heads that {chosen}, so it cannot predict classes")
            return names.index(self.chosen)
        if not isinstance(self.objective, Classifier):
            raise ValueError(f"{self.name}: has no head to predict classes with; take a fine-tuned or probed run")
        return None

    def _batch(self, images: Images) -> Batch:
        ready = self._ready(images)
        zeros = torch.zeros(len(ready), dtype=torch.int64, device=ready.device)
        return Batch(ready, zeros, torch.arange(len(ready), device=ready.device), zeros, zeros.bool())

    def _ready(self, images: Images) -> Float[Tensor, "b c h w"]:
        """Images as the model takes them, on its device."""
        given = isinstance(images, Tensor) and images.is_floating_point()
        tensor = images if given else self.transform(images)
        assert isinstance(tensor, Tensor)
        tensor = tensor[None] if tensor.ndim == 3 else tensor
        wanted = (self.model.channels, *self.model.image_size)
        if tensor.ndim != 4 or tensor.shape[1:] != wanted:
            shapes = f"{tuple(tensor.shape)}: the model takes (b, {', '.join(map(str, wanted))})"
            raise ValueError(f"images of shape {shapes}, which transform() makes")
        return tensor.to(self.device, next(self.objective.parameters()).dtype)


def load(path: str | os.PathLike[str]) -> Trained:
    """See `mae_dist.load`."""
    text = paths.with_variables(os.fspath(path))
    folder, step = starts.run_and_step(text)
    if not (folder / layout.CONFIG).is_file():
        reading = restore.read(Path(text), Overrides())
        for sentence in (*reading.notes.assumed, *reading.notes.left_out):
            log.warning("%s: %s", text, sentence)
        return Trained(text, reading.model)
    table = folder / "heads.json"
    chosen = small_files.read_json(table).get("chosen") if table.is_file() else None
    return Trained(text, restore.of_run(RunDir(folder), step, text), chosen)
