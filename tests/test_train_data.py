from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

from idlevit_kernels.train.checkpoint import isolated_random
from idlevit_kernels.train.data import Batches, UnreadableImage, open_data, train_loader, val_loader
from idlevit_kernels.train.distributed import World
from idlevit_kernels.train.engine import evaluate
from idlevit_kernels.train.recipe import Recipe, recipe_for

pytest.importorskip("sklearn")
CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}


@pytest.fixture
def folder(tmp_path):
    """train: 2 x 12 images, val: 2 x 5; of noise, so that augmentation shows."""
    noise = np.random.default_rng(0)
    for split, label, count in (("train", "cat", 12), ("train", "dog", 12), ("val", "cat", 5), ("val", "dog", 5)):
        (tmp_path / split / label).mkdir(parents=True)
        for i in range(count):
            pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.png")
    return tmp_path


def keys(recipe, rank=0, size=1, epoch=0, first_step=0, images=96):
    batches = Batches(images, recipe, World(rank, size))
    batches.epoch, batches.first_step = epoch, first_step
    result = list(batches)
    assert len(result) == len(batches)
    return result


def test_order_depends_on_seed_and_epoch_alone():
    recipe = Recipe(batch_size=32, min_lr=0.0)
    assert keys(recipe) == keys(recipe)
    images = [
        [index for part in keys(dataclasses.replace(recipe, seed=seed), epoch=epoch) for index, _ in part]
        for seed, epoch in itertools.product((0, 1), (0, 1))
    ]
    assert all(a != b for a, b in itertools.combinations(images, 2))
    assert keys(recipe, first_step=2) == keys(recipe)[2:]


@pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (1, 4), (2, 2), (4, 1)])
def test_processes_and_passes_share_the_batch_of_one(size, accumulate):
    whole = keys(Recipe(batch_size=32, min_lr=0.0))
    split = Recipe(batch_size=32, min_lr=0.0, accumulate=accumulate)
    parts = [keys(split, rank, size) for rank in range(size)]
    for step, batch in enumerate(whole):
        passes = [parts[rank][step * accumulate + i] for i in range(accumulate) for rank in range(size)]
        assert sorted(key for part in passes for key in part) == sorted(batch)
        partner = dict(zip(batch, reversed(batch), strict=True))  # whom mixup blends each image with
        for part in passes:
            assert [partner[key] for key in part] == part[::-1]


def test_repeated_augmentation_shows_an_image_in_several_forms():
    recipe = Recipe(batch_size=32, min_lr=0.0, aug_repeats=3)
    shown = [key for part in keys(recipe) for key in part]
    assert len(shown) == len(set(shown)) == 96 and len({index for index, _ in shown}) == 32
    once = [index for part in keys(Recipe(batch_size=32, min_lr=0.0, aug_repeats=1)) for index, _ in part]
    assert sorted(once) == list(range(96))


@pytest.mark.parametrize(
    ("batch_size", "world", "accumulate", "expected"), [(30, 2, 2, "multiple of 8"), (31, 1, 1, "multiple of 2")]
)
def test_a_batch_that_does_not_split_is_refused(batch_size, world, accumulate, expected):
    recipe = Recipe(batch_size=batch_size, accumulate=accumulate, min_lr=0.0)
    with pytest.raises(ValueError, match=expected):
        recipe.check_split(world)


def test_augmentation_does_not_depend_on_workers_or_the_global_generators(folder):
    recipe = Recipe(data=str(folder), batch_size=8, min_lr=0.0, aug_repeats=1)
    data = open_data(recipe, CONFIG, None)
    assert (data.num_classes, data.input_size) == (2, (3, 32, 32))

    def epoch(workers):
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        loader, _ = train_loader(data, recipe, World(), workers)
        images = torch.cat([batch.images for batch in loader])
        assert torch.equal(before[0], torch.get_rng_state()) and random.getstate() == before[2]
        assert (before[1] == np.random.get_state()[1]).all()
        return images

    first = epoch(0)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    assert first.shape == (24, 3, 32, 32)
    assert torch.equal(first, epoch(0)) and torch.equal(first, epoch(2))


def test_isolated_random_seeds_all_three_and_leaves_no_trace():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    with isolated_random(1, 2):
        inside = draw()
    state = torch.get_rng_state()
    with isolated_random(1, 2):
        assert draw() == inside
    with isolated_random(1, 3):
        assert all(a != b for a, b in zip(draw(), inside, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_validation_counts_each_image_once_over_any_number_of_processes(folder):
    data = open_data(recipe_for({}), CONFIG, None)
    for size in (1, 4, 5):
        loaders = [val_loader(data, 100, World(rank, size), 0) for rank in range(size)]
        indices = [index for loader in loaders for batch in loader.batch_sampler for index, _ in batch]
        assert sorted(indices) == list(range(len(data.val)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_and_replaced(folder, workers):
    broken = folder / "train" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    (folder / "train" / "dog" / "4.png").write_text("no image")
    recipe = Recipe(data=str(folder), batch_size=24, min_lr=0.0, aug_repeats=1)
    loader, _ = train_loader(open_data(recipe, CONFIG, None), recipe, World(), workers)
    (batch,) = loader
    assert batch.images.shape[0] == 24 and batch.targets.unique().tolist() == [0, 1]
    named = {name.partition(" cannot be read")[0] for name in batch.unreadable}
    assert named == {str(broken), str(folder / "train" / "dog" / "4.png")}


def test_an_unreadable_image_stops_validation_or_does_not_count(folder):
    broken = folder / "val" / "dog" / "0.png"
    broken.write_bytes(b"")
    data = open_data(Recipe(data=str(folder)), CONFIG, None)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
    loader = val_loader(data, 4, World(), 0)
    with pytest.raises(UnreadableImage, match=rf"{broken}.*--on-bad-image skip"):
        evaluate(model, loader, World())
    score = evaluate(model, loader, World(), skip_unreadable=True)
    assert (score.images, score.unreadable, score.top5) == (9, 1, 100.0)


def test_a_missing_class_folder_is_named(folder):
    for image in (folder / "val" / "dog").iterdir():
        image.unlink()
    with pytest.raises(FileNotFoundError, match=r"val must hold a folder .* each class, got none for dog"):
        open_data(Recipe(data=str(folder)), CONFIG, None)
    (folder / "train" / "bird").mkdir()
    with pytest.raises(FileNotFoundError, match=r"train must hold a folder .* each class, got none for bird"):
        open_data(Recipe(data=str(folder)), CONFIG, None)


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        ("nowhere", ValueError, "a folder that exists"),
        ("wds/shards", ValueError, "cannot be resumed exactly"),
        ("train", FileNotFoundError, "train or training, got .* with cat, dog"),
    ],
)
def test_data_that_is_none_is_refused(folder, monkeypatch, name, error, expected):
    monkeypatch.chdir(folder)
    with pytest.raises(error, match=expected):
        open_data(Recipe(data=name), CONFIG, None)


def test_data_that_timm_cannot_open_is_refused(tmp_path):
    with pytest.raises(ValueError, match="timm cannot open the data set torch/cifar10: Dataset not found"):
        open_data(Recipe(data="torch/cifar10"), CONFIG, tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"timm cannot open the data set {tmp_path}/train: Found 0 images"):
        open_data(Recipe(data=str(tmp_path)), CONFIG, None)


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="at most the 96 training images"):
        keys(Recipe(batch_size=128, min_lr=0.0))
