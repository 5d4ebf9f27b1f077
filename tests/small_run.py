"""A training run of seconds, for the tests that end one and go on with it."""

from __future__ import annotations

import copy

import torch
from timm.layers import DropPath

import idlevit_kernels as ik
from idlevit_kernels.train.data import Data, open_data
from idlevit_kernels.train.engine import Options, Trainer
from idlevit_kernels.train.models import digits_vit
from idlevit_kernels.train.recipe import recipe_for

# 4 steps in each of 2 epochs, with everything that draws random numbers.
SMALL = {"epochs": 2, "batch_size": 16, "mixup": 0.8, "cutmix": 1.0, "aug_repeats": 2}


def small_data(recipe, train=64, val=20) -> Data:
    data = open_data(recipe, {}, None)
    for split, count in ((data.train, train), (data.val, val)):
        split.images, split.targets = split.images[:count].clone(), split.targets[:count]
    return data


def small_trainer(output=None, checkpoint_steps=None, drop_path=0.3, data=None, **given) -> Trainer:
    """An idle model with stochastic depth, and its teacher."""
    recipe = recipe_for(SMALL | given)
    torch.manual_seed(0)
    dense = digits_vit().eval()
    model = copy.deepcopy(dense)
    for block in model.blocks:
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(drop_path))
    ik.apply_idle(model, recipe.keep_ratio)
    options = Options(output=output, checkpoint_steps=checkpoint_steps, log_steps=1)
    return Trainer(recipe, model, data or small_data(recipe), teacher=dense, options=options)
