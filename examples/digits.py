"""What a model of ``idlevit train --output RUN`` idles on digits it has not seen: ``python examples/digits.py RUN``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import idlevit_kernels as ik
from idlevit_kernels.train import checkpoint
from idlevit_kernels.train.data import Digits
from idlevit_kernels.train.models import create_model
from idlevit_kernels.train.recipe import Recipe, recipe_for


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="directory that idlevit train wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path("digits.png"), help="PNG, SVG or PDF (%(default)s)")
    parser.add_argument("--images", type=int, default=4, help="a row each (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        found = checkpoint.newest(options.run)
        if found is None:
            raise ValueError(f"no checkpoint in {options.run}; make one: idlevit train --output {options.run}")
        state = found[1]
        recipe = recipe_for(state["recipe"], [field.name for field in dataclasses.fields(Recipe)])
        if recipe.data != "digits":
            raise ValueError(f"{options.run} was trained on {recipe.data}: see idlevit visualize --weights")
        model = create_model(recipe, Digits.CLASSES, None)
        model.load_state_dict(state["model"])
        ik.apply_idle(model.eval(), **recipe.idle)
        unseen = Digits(training=False, seed=recipe.seed)
        apart = len(unseen) // options.images
        picture = ik.visualize(model, [unseen[i * apart, i].image for i in range(options.images)])
        picture.savefig(options.output)
    except (OSError, ValueError, checkpoint.CheckpointError) as error:
        print(f"digits: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
