"""Other people's loaders beside ours, on the same photographs: `mae-dist bench loaders`.

Each makes batches of random resized crops, flipped and normalised, as those who pretrain with it do; with
view.randaugment or view.random_erasing only ours and timm's do, which have both. Small images of one size, which ours
keeps in memory, are compared with torchvision's CIFAR100 and its DataLoader. Loaders take turns, and each is timed by
the CPU time of this process with all its threads, so that other programs on the machine count less. Those that are not
installed, or do not run here, are left out with the reason.
"""

import io
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from mae_dist.batch import IMAGENET_MEAN, IMAGENET_STD
from mae_dist.data.crop import Reader, Rows
from mae_dist.data.decode import decode
from mae_dist.data.index import ShardIndex, open_split
from mae_dist.data.loader import CHUNK, TarSource, is_kept_in_memory
from mae_dist.data.resident import ResidentSource
from mae_dist.data.views import View
from mae_dist.model_sizes import sides
from mae_dist.verify.measurement import Measurement, Result, Runner

BATCH, SMALL_BATCH = 64, 256
CPU = torch.device("cpu")
Epoch = Callable[[], object]
"""Loads every image of a split once."""


def loaders(runner: Runner) -> Result:
    """Images per second of CPU time of each loader, and how many times as fast ours is."""
    torch.set_num_threads(1)
    settings = runner.settings
    if settings.model.image_size != min(sides(settings.model.image_size)) or settings.data.channels not in (None, 3):
        raise ValueError("bench loaders: compares loaders of square images of 3 channels; `bench data` takes any")
    index = open_split(settings.data.path, settings.data.split)
    view = View(settings.view, settings.model.image_size, IMAGENET_MEAN, IMAGENET_STD, settings.train.seed, True)
    epochs: dict[str, Epoch] = {}
    augmented = view.needs_pil or view.settings.random_erasing > 0
    small = is_kept_in_memory(index, view.needs_pil)
    for name, make in (AUGMENTING if augmented else IN_MEMORY if small else LOADERS).items():
        try:
            epochs[name] = make(index, view)
            epochs[name]()  # warms up
        except (ImportError, RuntimeError) as error:
            print(f"left out: {name} ({str(error).splitlines()[0]})", flush=True)
            epochs.pop(name, None)
    rates: dict[str, list[float]] = {name: [] for name in epochs}
    for number in range(runner.options["rounds"]):
        for name, epoch in epochs.items():
            began = time.process_time()
            epoch()
            rates[name].append(len(index) / (time.process_time() - began))
            print(f"round {number + 1}, {name}: {rates[name][-1]:,.0f} images/s", flush=True)
    (ours, *others), size = rates, view.size[0]
    measurements = [Measurement(name, median(values), "images/s") for name, values in rates.items()]
    for name in others:
        ratio = median(a / b for a, b in zip(rates[ours], rates[name], strict=True))
        measurements.append(Measurement(f"mae_dist: times as fast as {name}", ratio))
    return Result(f"{len(index)} images to {size} x {size}, per core", measurements, {"rates": rates})


def until_gpu(index: ShardIndex, view: View) -> Epoch:
    """Our crops as 8-bit pixels in memory, from where a GPU copies and normalises them."""
    reader = Reader(index, view)
    rows = Rows(np.empty((CHUNK, *view.size, 3), np.uint8), np.empty(CHUNK, np.int64), np.empty(CHUNK, np.bool_))

    def epoch() -> None:
        for ids in chunks(index, CHUNK):
            reader.fill(np.zeros_like(ids), ids, rows.part(0, len(ids)))

    return epoch


def on_cpu(index: ShardIndex, view: View) -> Epoch:
    """Our batches, normalised on the CPU."""
    return batches_of(TarSource(index, CPU, workers=0), view, BATCH)


def in_memory(index: ShardIndex, view: View) -> Epoch:
    """Our batches of a split that is kept in memory."""
    return batches_of(ResidentSource(index, CPU, quiet=True), view, SMALL_BATCH)


def batches_of(source: TarSource | ResidentSource, view: View, size: int) -> Epoch:
    """An epoch of one of our sources."""
    return lambda: [
        None for _ in source.batches([(np.zeros_like(ids), ids) for ids in chunks(source.index, size)], view)
    ]


def chunks(index: ShardIndex, size: int) -> Iterator[np.ndarray]:
    """The ids of a split, `size` at a time."""
    for first in range(0, len(index), size):
        yield np.arange(first, min(first + size, len(index)))


def decoding(index: ShardIndex, _: View) -> Epoch:
    """Reading and decoding alone, by simplejpeg where it can."""

    def epoch() -> None:
        for id_ in range(len(index)):
            sample = index.read(id_)
            try:
                simplejpeg.decode_jpeg(sample.image)
            except ValueError:
                decode(sample)

    return epoch


def pillow(index: ShardIndex, view: View) -> Epoch:
    """Pillow and torchvision's transforms of Pillow images, as in the official code of MAE."""
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    steps = transforms.Compose([
        transforms.RandomResizedCrop(view.image_size, scale=view.settings.scale, interpolation=bicubic),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(view.mean, view.std),
    ])  # fmt: skip

    def load(content: bytes) -> Any:
        return steps(Image.open(io.BytesIO(content)).convert("RGB"))

    return by_image(index, load)


def torchvision(index: ShardIndex, view: View) -> Epoch:
    """torchvision's decoder, and its transforms v2 of tensors; what it does not decode goes through Pillow."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    steps = v2.Compose([
        v2.RandomResizedCrop(view.image_size, scale=view.settings.scale, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([*view.mean], [*view.std]),
    ])  # fmt: skip

    def load(content: bytes) -> torch.Tensor:
        try:
            image = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        except RuntimeError:
            image = torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB"))).permute(2, 0, 1)
        return steps(image)

    return by_image(index, load)


def cifar(index: ShardIndex, view: View) -> Epoch:
    """Pillow images of arrays in memory, as of torchvision's CIFAR100, through its transforms and a DataLoader."""
    from torchvision import transforms

    size, bicubic = view.size[0], transforms.InterpolationMode.BICUBIC
    crop = {
        "pad": transforms.RandomCrop(size, padding=view.settings.pad),
        "resized": transforms.RandomResizedCrop(size, scale=view.settings.scale, interpolation=bicubic),
    }.get(view.settings.crop)
    if crop is None:
        raise ValueError(f"view.crop={view.settings.crop}: compare pad or resized")
    flip, to_tensor = transforms.RandomHorizontalFlip(), transforms.ToTensor()
    steps = transforms.Compose([crop, flip, to_tensor, transforms.Normalize(view.mean, view.std)])
    source = ResidentSource(index, CPU, quiet=True)
    images, labels = source.images.permute(0, 2, 3, 1).contiguous().numpy(), source.labels.tolist()

    class Images(Dataset[tuple[Any, int]]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, number: int) -> tuple[Any, int]:
            return steps(Image.fromarray(images[number])), labels[number]

    return lambda: [None for _ in DataLoader(Images(), SMALL_BATCH)]


def by_image(index: ShardIndex, load: Callable[[bytes], torch.Tensor]) -> Epoch:
    """An epoch of a loader that makes one image at a time, in batches."""

    def epoch() -> None:
        for ids in chunks(index, BATCH):
            torch.stack([load(index.read(id_).image) for id_ in ids.tolist()])

    return epoch


def timm(index: ShardIndex, view: View) -> Epoch:
    """timm's transforms of Pillow images for training on labels, as in the official fine-tuning of MAE."""
    from timm.data import create_transform

    steps: Any = create_transform(
        view.image_size, is_training=True, scale=view.settings.scale, interpolation="bicubic", color_jitter=0.0,
        auto_augment=view.settings.randaugment, re_prob=view.settings.random_erasing, re_mode="pixel",
        mean=view.mean, std=view.std,
    )  # fmt: skip
    for operation in (operation for step in steps.transforms for operation in getattr(step, "ops", ())):
        if operation.aug_fn.__name__ == "posterize":  # with 0 bits, which Pillow 13 refuses
            operation.aug_fn = lambda image, bits, **_: ImageOps.posterize(image, max(1, min(bits, 8)))

    def load(content: bytes) -> torch.Tensor:
        return steps(Image.open(io.BytesIO(content)).convert("RGB"))

    return by_image(index, load)


def dali(index: ShardIndex, view: View) -> Epoch:
    """NVIDIA DALI on the CPU, which decodes only the part of a JPEG that its crop needs."""
    from nvidia.dali import fn, pipeline_def, types  # pyright: ignore[reportMissingImports]

    size, (low, high) = view.size[0], view.settings.scale

    def contents() -> Iterator[list[np.ndarray]]:
        while True:  # DALI asks for batches ahead
            for ids in chunks(index, BATCH):
                yield [np.frombuffer(index.read(id_).image, np.uint8) for id_ in ids.tolist()]

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> Any:
        encoded = fn.external_source(contents, dtype=types.UINT8, ndim=1)
        crops = fn.decoders.image_random_crop(encoded, random_area=[low, high], random_aspect_ratio=[3 / 4, 4 / 3])
        crops = fn.resize(crops, size=[size, size], interp_type=types.INTERP_CUBIC, antialias=True)
        mean, std = ([255 * value for value in values] for values in (view.mean, view.std))
        return fn.crop_mirror_normalize(crops, mirror=fn.random.coin_flip(), mean=mean, std=std)

    def epoch() -> None:
        running = pipeline()
        running.build()
        for _ in chunks(index, BATCH):
            running.run()

    return epoch


LOADERS: dict[str, Callable[[ShardIndex, View], Epoch]] = {
    "mae_dist (8 bits, as a GPU copies them)": until_gpu, "mae_dist, normalised on the CPU": on_cpu,
    "Pillow and torchvision v1": pillow, "torchvision v2 on tensors": torchvision,
    "decoding alone (simplejpeg)": decoding, "DALI on the CPU": dali,
}  # fmt: skip
IN_MEMORY: dict[str, Callable[[ShardIndex, View], Epoch]] = {
    "mae_dist, images in memory": in_memory, "torchvision's CIFAR100, DataLoader": cifar,
}  # fmt: skip
AUGMENTING: dict[str, Callable[[ShardIndex, View], Epoch]] = {
    "mae_dist, normalised on the CPU": on_cpu, "timm's create_transform": timm,
}  # fmt: skip
"""Name -> a function that makes its epoch, and raises ImportError if its package is missing. Ours is the first."""
