from __future__ import annotations

import dataclasses

import pytest

from idlevit_kernels.train.recipe import DIGITS, DIGITS_DENSE, Recipe, recipe_for


def test_defaults_are_the_papers():
    """arXiv 2310.05654, section 4.1, and the command of the authors' release."""
    recipe = Recipe()
    expected = {
        "epochs": 30,
        "lr": 1e-5,
        "min_lr": 1e-6,
        "weight_decay": 0.05,
        "freeze_embeddings": True,
        "ema_decay": 0.99996,
        "cut_weight": 20.0,
        "distill_weight": 10.0,
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
        "random_augment": "rand-m9-mstd0.5-inc1",
        "random_erasing": 0.25,
        "aug_repeats": 3,
    }
    assert {name: getattr(recipe, name) for name in expected} == expected
    assert recipe.scaled_lr == pytest.approx(4e-5)  # 1e-5 at a batch of 512


def test_every_field_has_a_source_and_a_help():
    for field in dataclasses.fields(Recipe):
        assert field.metadata["source"] and field.metadata["help"].endswith("."), field.name


def test_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().epochs = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "error", "expected"),
    [
        ("epochs", 0, ValueError, "at least 1"),
        ("epochs", 1.5, TypeError, "of type int"),
        ("batch_size", True, TypeError, "of type int"),
        ("keep_ratio", 0.0, ValueError, r"\(0, 1\]"),
        ("image_size", 0, ValueError, "at least 1"),
        ("clip_grad", 0.0, ValueError, "greater than 0"),
        ("seed", -1, ValueError, "at least 0"),
        ("interpolation", "cubic", ValueError, "one of nearest, bilinear"),
        ("lr", -1.0, ValueError, "at least 0"),
        ("lr", float("nan"), ValueError, "at least 0 and finite"),
        ("lr", 1e-9, ValueError, "min_lr must be at most the scaled learning rate"),
        ("label_smoothing", 1.0, ValueError, r"\[0, 1\)"),
        ("ema_decay", 1.0, ValueError, r"\[0, 1\)"),
        ("dtype", "int8", ValueError, "float32, bfloat16 or float16"),
        ("cut_kind", "all", ValueError, "both, inter, intra or none"),
        ("warmup_epochs", 30, ValueError, "less than epochs = 30"),
        ("weights", "dense", ValueError, "pretrained, none or a file"),
    ],
)
def test_bad_values_are_refused_by_name(name, value, error, expected):
    with pytest.raises(error, match=rf"train: (min_lr|{name}) must be .*") as raised:
        Recipe(**{"data": "folder", name: value})
    assert raised.match(expected)


def test_differences_name_each_field():
    recipe = Recipe()
    assert recipe.differences(dataclasses.asdict(recipe)) == []
    other = dataclasses.asdict(dataclasses.replace(recipe, epochs=5)) | {"gone": 1}
    assert recipe.differences(other) == ["epochs: 5 there, 30 here", "gone: 1 there, None here"]


def test_digits_have_recipes_of_their_own_and_what_is_given_wins():
    assert recipe_for({}) == Recipe(**DIGITS)
    assert recipe_for({"keep_ratio": 1.0, "seed": 3}) == Recipe(**DIGITS_DENSE, seed=3)
    assert recipe_for({"data": "folder", "epochs": 5}) == Recipe(data="folder", epochs=5)
    assert recipe_for({"seed": 3, "epochs": 5}, only=("seed",)) == Recipe(**DIGITS, seed=3)


def test_a_schedule_is_given_as_numbers_or_as_a_file(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text('{"schedule": [1.0, 0.7, 0.5, 0.25]}')
    recipe = Recipe(schedule=str(path))
    assert recipe.schedule == "1,0.7,0.5,0.25"  # what a checkpoint holds needs no file
    assert recipe.idle == Recipe(schedule="1,0.7,0.5,0.25").idle == {"schedule": [1.0, 0.7, 0.5, 0.25]}
    assert Recipe().idle == {"keep_ratio": 0.7}
    for bad, expected in (("1,2", r"in \(0, 1\]"), ("missing.json", "missing.json")):
        with pytest.raises((ValueError, OSError), match=expected):
            Recipe(schedule=bad)
    with pytest.raises(ValueError, match="train: schedule must be left out where keep_ratio is 1"):
        Recipe(schedule="1,0.5", keep_ratio=1.0)
