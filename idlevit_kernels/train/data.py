"""Images in an order that depends on the seed and the epoch alone, not on processes, workers or interruptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..errors import ArgumentValueError, value_error
from .checkpoint import isolated_random
from .distributed import World
from .recipe import Recipe

Key = tuple[int, tuple[int, ...]]  # which image, and the seed of its augmentation


class Sample(NamedTuple):
    """``image`` is None where none could be read. ``unreadable`` names the files that were tried before."""

    image: Tensor | None
    target: int
    unreadable: tuple[str, ...] = ()


class Batch(NamedTuple):
    images: Tensor  # [B, C, H, W]
    targets: Tensor  # [B]
    unreadable: list[str]


class UnreadableImage(RuntimeError):
    """A file that should be an image is none, and the run was told to stop then."""

    def __init__(self, names: list[str]):
        self.names = names
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        super().__init__(
            f"train: {names[0]}{more}. Repair or remove it, or pass --on-bad-image skip to leave such images out."
        )


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set: ``train`` and ``val`` give a ``Sample`` for a ``Key``."""

    train: Dataset
    val: Dataset
    num_classes: int
    input_size: tuple[int, int, int]


class Images(Dataset):
    """A timm or torchvision data set by ``Key``, augmented.

    Args:
        dataset: gives (PIL image, target) by index.
        transform: from a PIL image to [C, H, W]; its randomness is seeded for each image.
        substitute: take the next image that can be read in place of one that cannot, so that batches keep their size.
    """

    def __init__(self, dataset: Any, transform: Any, substitute: bool):
        self.dataset, self.transform, self.substitute = dataset, transform, substitute

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Sample:
        from PIL import Image

        first, seed = key
        unreadable: list[str] = []
        for index in range(first, first + len(self) if self.substitute else first + 1):
            index %= len(self)
            try:
                image, target = self._read(index)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                unreadable.append(f"{self._name(index)} cannot be read: {error}")
                continue
            with isolated_random(*seed):
                return Sample(self.transform(image), int(target), tuple(unreadable))
        return Sample(None, -1, tuple(unreadable))

    def _read(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        if not hasattr(self.dataset, "reader"):
            image, target = self.dataset[index]
            return image.convert("RGB"), target
        file, target = self.dataset.reader[index]  # the data set itself would take the next image and go on
        with Image.open(file) as image:
            return image.convert("RGB"), target

    def _name(self, index: int) -> str:
        if hasattr(self.dataset, "filename"):
            return str(self.dataset.filename(index, absolute=True))
        return f"image {index} of {type(self.dataset).__name__}"


class Digits(Dataset):
    """scikit-learn's 1797 handwritten digits, two of three for training; nothing is downloaded.

    Each, of 8 x 8 pixels, lies somewhere on an empty canvas of 12 x 12: at a random place each time in training, and at
    ``COPIES`` fixed ones for validation. So a digit is not known by the place of its pixels, and about half of the
    tokens are background, as in photographs.
    """

    TRAIN, COPIES, INPUT_SIZE, CLASSES = 1198, 2, (1, 12, 12), 10

    def __init__(self, training: bool, seed: int = 0):
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "train: --data digits needs scikit-learn: pip install 'idlevit-kernels[train]'"
            ) from error

        digits = load_digits()
        order = np.random.default_rng(seed).permutation(len(digits.target))
        chosen = order[: self.TRAIN] if training else np.repeat(order[self.TRAIN :], self.COPIES)
        self.images = torch.from_numpy(digits.images[chosen]).float() / 16  # [N, 8, 8]
        self.targets = digits.target[chosen].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: Key) -> Sample:
        index, seed = key
        _, height, width = self.INPUT_SIZE
        digit = self.images[index]
        top, left = np.random.default_rng(seed).integers((height - digit.shape[0] + 1, width - digit.shape[1] + 1))
        canvas = torch.zeros(self.INPUT_SIZE)
        canvas[0, top : top + digit.shape[0], left : left + digit.shape[1]] = digit
        return Sample((canvas - 0.3) / 0.4, self.targets[index])


def open_data(
    recipe: Recipe,
    config: dict[str, Any],
    directory: Path | None,
    download: bool = False,
    val_split: str = "validation",
) -> Data:
    """The data set that ``recipe.data`` names, as the model that ``config`` describes wants its images.

    Args:
        config: of ``timm.data.resolve_model_data_config``: input_size, mean, std, interpolation, crop_pct, crop_mode.
        directory: where a data set that timm knows by name lies or is downloaded to.
        val_split: name of the split that accuracy is measured on.

    Raises:
        ValueError, FileNotFoundError: there is no such data set, or it lacks images or classes; the message names them.
    """
    if recipe.data == "digits":
        return Data(Digits(True, recipe.seed), Digits(False, recipe.seed), Digits.CLASSES, Digits.INPUT_SIZE)
    from timm.data import create_transform

    size = recipe.image_size or config["input_size"][-1]
    common = {"input_size": (3, size, size), "mean": config["mean"], "std": config["std"], "use_prefetcher": False}
    try:
        augment = create_transform(
            **common,
            is_training=True,
            auto_augment=None if recipe.random_augment == "none" else recipe.random_augment,
            interpolation=recipe.interpolation,
            re_prob=recipe.random_erasing,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as error:  # all else in it was checked
        expected = f"none, or a policy that timm knows, as rand-m9-mstd0.5-inc1 ({error})"
        raise value_error("train", "random_augment", expected, recipe.random_augment) from error
    crop = create_transform(
        **common, interpolation=config["interpolation"], crop_pct=config["crop_pct"], crop_mode=config["crop_mode"]
    )
    root = Path(recipe.data)
    if root.is_dir():
        splits = [_split(root, "train", "training"), _split(root, "val", "validation", "valid", "eval")]
        train, val = (_create("", root=str(split)) for split in splits)
        _check_folders(splits, train.reader.class_to_idx, val.reader.class_to_idx)
    elif recipe.data.partition("/")[0] in ("torch", "hfds"):
        options: dict[str, Any] = {"root": str(directory) if directory else None, "download": download}
        train, val = (_create(recipe.data, split=split, **options) for split in ("train", val_split))
    elif recipe.data.partition("/")[0] in ("tfds", "wds", "hfids"):
        expected = (
            "a data set with images by number (a folder, torch/..., hfds/...); a stream cannot be resumed exactly"
        )
        raise value_error("train", "data", expected, recipe.data)
    else:
        expected = "digits, a folder that exists, or a name that timm knows, such as torch/cifar10"
        raise value_error("train", "data", expected, recipe.data)
    if isinstance(train, IterableDataset):
        raise value_error("train", "data", "a data set with images by number", recipe.data)
    train.transform = val.transform = None
    return Data(Images(train, augment, True), Images(val, crop, False), _num_classes(train), (3, size, size))


def _create(name: str, **options: Any) -> Any:
    from timm.data import create_dataset

    try:
        return create_dataset(name, **options)
    except (AssertionError, ImportError, RuntimeError, ValueError) as error:
        raise ArgumentValueError(f"train: timm cannot open the data set {name or options['root']}: {error}") from error


def _split(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    found = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())[:6]) or "no folder"
    raise FileNotFoundError(f"train: data must be a folder with {' or '.join(names)}, got {root} with {found}")


def _check_folders(splits: list[Path], *classes: dict[str, int]) -> None:
    """A class that one split lacks would shift all numbers after it, and the score would be of other classes."""
    everywhere = set().union(*classes)
    for split, found in zip(splits, classes, strict=True):
        folders = {path.name for path in split.iterdir() if path.is_dir()}
        missing = sorted((everywhere | folders) - set(found))
        if missing:
            names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise FileNotFoundError(
                f"train: {split} must hold a folder with images for each class, got none for {names}"
            )


def _num_classes(dataset: Any) -> int:
    for holder in (getattr(dataset, "reader", None), dataset):
        for name in ("class_to_idx", "classes"):
            if getattr(holder, name, None):
                return len(getattr(holder, name))
    raise value_error("train", "data", "a data set that says which classes it has", type(dataset).__name__)


class Batches(Sampler[list[Key]]):
    """The keys of each forward pass of this process, from ``first_step`` of ``epoch`` on.

    Step s of all processes together takes images s * batch_size and following of the epoch's order. Mixup blends image
    i of a batch with image batch_size - 1 - i, so both go to the same pass: any number of processes and passes sees
    the batches that one pass of one process would. ``epoch`` and ``first_step`` are set before each iteration.
    """

    def __init__(self, num_images: int, recipe: Recipe, world: World):
        from timm.data.distributed_sampler import RepeatAugSampler

        self.recipe, self.world = recipe, world
        self.size = recipe.check_split(world.size)
        self.epoch = self.first_step = 0
        self.steps = num_images // recipe.batch_size
        if self.steps == 0:
            raise value_error("train", "batch_size", f"at most the {num_images} training images", recipe.batch_size)
        # One replica: it gives the order of the epoch, of which each process takes its part below.
        self._order = RepeatAugSampler(range(num_images), 1, 0, num_repeats=recipe.aug_repeats, selected_round=0)

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.recipe.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        recipe = self.recipe
        self._order.set_epoch(
            int(np.random.SeedSequence((recipe.seed, self.epoch)).generate_state(1, np.uint64)[0]) >> 1
        )
        order = list(self._order)
        for step in range(self.first_step, self.steps):
            for i in range(recipe.accumulate):
                positions = self._part(i * self.world.size + self.world.rank)
                begin = step * recipe.batch_size
                yield [(order[begin + p], (recipe.seed, self.epoch, begin + p)) for p in positions]

    def _part(self, part: int) -> list[int]:
        if self.size % 2:  # nothing is mixed
            return list(range(part * self.size, (part + 1) * self.size))
        half = self.size // 2
        ahead = list(range(part * half, (part + 1) * half))
        return ahead + [self.recipe.batch_size - 1 - p for p in reversed(ahead)]


def train_loader(data: Data, recipe: Recipe, world: World, workers: int) -> tuple[DataLoader, Batches]:
    batches = Batches(len(data.train), recipe, world)  # type: ignore[arg-type]
    return _loader(data.train, batches, world, workers), batches


def val_loader(data: Data, batch_size: int, world: World, workers: int) -> DataLoader:
    """Every image once, over all processes together; some may get one image less than others."""
    own = [(index, (index,)) for index in range(world.rank, len(data.val), world.size)]  # type: ignore[arg-type]
    batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
    return _loader(data.val, batches, world, workers)


def _loader(dataset: Dataset, batches: Any, world: World, workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=world.device.type == "cuda",
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # its own, so that starting an epoch draws nothing from the global one
    )


def _collate(samples: list[Sample]) -> Batch:
    read = [sample for sample in samples if sample.image is not None]
    images = torch.stack([sample.image for sample in read]) if read else torch.empty(0)  # type: ignore[misc]
    unreadable = [name for sample in samples for name in sample.unreadable]
    return Batch(images, torch.tensor([sample.target for sample in read], dtype=torch.int64), unreadable)
