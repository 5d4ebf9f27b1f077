"""The paper's claims (arXiv 2310.05654, section 4) at the scale of handwritten digits: `python bench/claims.py`.

Over several seeds, each with its own split and dense model: accuracy of the dense model; of IdleViT, finetuned with all
terms of the token cut loss, with one, with none, without distillation; and of token dropping, finetuned alike. Writes
``claims.json`` (every run; ``bench/plot.py`` draws it) and ``claims.csv`` (mean and standard error). What was
interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import csv
import json
import math
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import idlevit_kernels as ik
from idlevit_kernels.measure.info import run_facts
from idlevit_kernels.train.checkpoint import write
from idlevit_kernels.train.data import open_data
from idlevit_kernels.train.engine import Options, Trainer
from idlevit_kernels.train.models import create_model
from idlevit_kernels.train.recipe import recipe_for

METHODS: dict[str, dict[str, Any]] = {
    "IdleViT": {},
    "IdleViT, intra only": {"cut_kind": "intra"},
    "IdleViT, inter only": {"cut_kind": "inter"},
    "IdleViT, no cut loss": {"cut_kind": "none", "cut_weight": 0.0},
    "IdleViT, no distillation": {"distill_weight": 0.0},
    "token dropping": {"cut_kind": "none", "cut_weight": 0.0},
}
DENSE = "dense"
OPTIONS = Options(val_epochs=1000)  # only the last epoch is evaluated


class DroppingBlock(ik.IdleBlock):
    """A block of a model that drops tokens, as EViT does (arXiv 2202.07800, without its fused token).

    It selects and computes what an idle layer would, among the tokens that are left, and returns no others. Its keep
    ratio is 1, so that the training form takes it for a dense block: it has no token cut loss.
    """

    def __init__(self, block: nn.Module, num_keep: int):
        super().__init__(block, 1.0)
        self.num_keep = num_keep

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x, indices = ik.idle_block(x, self, self.num_keep, return_indices=True)
        return ik.gather_tokens(x, indices)


def drop_tokens(model: Any, keep_ratio: float) -> nn.Module:
    """Makes each layer of a dense model compute as many tokens as in an IdleViT, and drop the others for good."""
    num_tokens = model.patch_embed.num_patches
    ratios = ik.idle_schedule(len(model.blocks), keep_ratio)
    blocks = zip(model.blocks, ratios, strict=True)
    model.blocks = nn.Sequential(*(b if r == 1 else DroppingBlock(b, max(1, int(r * num_tokens))) for b, r in blocks))
    return model


def train_dense(seed: int, epochs: int, work: Path) -> None:
    """Leaves the weights in ``seed<n>.pt`` and the row in ``seed<n>-1.json``, unless they are there."""
    torch.set_num_threads(1)
    path = _rows_file(work, seed, 1.0)
    if path.exists():
        return
    begin = time.process_time()
    recipe = recipe_for({"keep_ratio": 1.0, "seed": seed, "epochs": epochs})
    data = open_data(recipe, {}, None)
    torch.manual_seed(seed)
    model = create_model(recipe, data.num_classes, None)
    trainer = Trainer(recipe, model, data, options=OPTIONS)
    before = trainer.evaluate().top1
    trainer.fit()
    torch.save(model.state_dict(), work / f"seed{seed}.pt")
    _write_rows(path, [_row(DENSE, trainer, before, begin)])


def finetune(seed: int, keep_ratio: float, epochs: int, work: Path) -> None:
    """Adds to ``seed<n>-<ratio>.json`` the methods that are missing there."""
    torch.set_num_threads(1)
    path = _rows_file(work, seed, keep_ratio)
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    dense = create_model(recipe_for({}), None, None).eval()
    dense.load_state_dict(torch.load(work / f"seed{seed}.pt", weights_only=True))
    for method, options in METHODS.items():
        if any(row["method"] == method for row in rows):
            continue
        begin = time.process_time()
        recipe = recipe_for({"keep_ratio": keep_ratio, "seed": seed, "epochs": epochs, **options})
        model = copy.deepcopy(dense)
        model = drop_tokens(model, keep_ratio) if method == "token dropping" else ik.apply_idle(model, keep_ratio)
        torch.manual_seed(seed)
        trainer = Trainer(recipe, model, open_data(recipe, {}, None), teacher=copy.deepcopy(dense), options=OPTIONS)
        idle = [row["top1_before"] for row in rows if method != "token dropping"]
        before = idle[0] if idle else trainer.evaluate().top1  # finetuning alone tells the others apart
        trainer.fit()
        rows.append(_row(method, trainer, before, begin))
        _write_rows(path, rows)


def _row(method: str, trainer: Trainer, before: float, begin: float) -> dict[str, Any]:
    return {
        "seed": trainer.recipe.seed,
        "method": method,
        "keep_ratio": trainer.recipe.keep_ratio,
        "top1_before": before,
        "top1": trainer.history[-1]["top1"],
        "gmacs": ik.count_macs(trainer.model, trainer.data.input_size).total / 1e9,
        "cpu_seconds": round(time.process_time() - begin, 1),
    }


def _rows_file(work: Path, seed: int, keep_ratio: float) -> Path:
    return work / f"seed{seed}-{keep_ratio:g}.json"


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write(path, json.dumps(rows, indent=1).encode())
    print(json.dumps(rows[-1]), flush=True)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error over the seeds, and of the difference to the full IdleViT with the same seed."""
    full = {(row["seed"], row["keep_ratio"]): row["top1"] for row in rows if row["method"] == "IdleViT"}
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["keep_ratio"]), []).append(row)
    order = [DENSE, *METHODS]
    out = []
    for (method, ratio), group in sorted(groups.items(), key=lambda item: (-item[0][1], order.index(item[0][0]))):
        pairs = [(row["top1"], full.get((row["seed"], ratio))) for row in group]
        differences = [own - other for own, other in pairs if other is not None and method != "IdleViT"]
        mean, error = _mean_and_error([row["top1"] for row in group])
        difference, difference_error = _mean_and_error(differences)
        out.append(
            {
                "method": method,
                "keep_ratio": ratio,
                "seeds": len(group),
                "gmacs": round(group[0]["gmacs"], 5),
                "top1_before": round(statistics.mean(row["top1_before"] for row in group), 2),
                "top1": mean,
                "standard_error": error,
                "minus_idlevit": difference,
                "minus_idlevit_error": difference_error,
            }
        )
    return out


def _mean_and_error(values: list[float]) -> tuple[float | str, float | str]:
    if not values:
        return "", ""
    error: float | str = round(statistics.stdev(values) / math.sqrt(len(values)), 2) if len(values) > 1 else ""
    return round(statistics.mean(values), 2), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--epochs", type=int, default=recipe_for({}).epochs, help="of finetuning")
    parser.add_argument("--dense-epochs", type=int, default=recipe_for({"keep_ratio": 1.0}).epochs)
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--work", type=Path, default=Path("build/claims"), help="where unfinished seeds are kept")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    seeds, work = range(options.seeds), options.work
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(train_dense, seed, options.dense_epochs, work) for seed in seeds]:
            done.result()
        pairs = [(seed, ratio) for ratio in options.keep_ratios for seed in seeds]
        for done in [pool.submit(finetune, seed, ratio, options.epochs, work) for seed, ratio in pairs]:
            done.result()
    files = [_rows_file(work, seed, ratio) for ratio in (1.0, *options.keep_ratios) for seed in seeds]
    runs = [row for file in files for row in json.loads(file.read_text())]
    table = summary(runs)
    data = "scikit-learn digits on a 12 x 12 canvas, 1198 images for training, 599 at two places for validation"
    facts = run_facts(["python", "bench/claims.py", *sys.argv[1:]], torch.device("cpu"), data=data)
    facts |= {"summary": table, "runs": runs}
    options.output.mkdir(parents=True, exist_ok=True)
    write(options.output / "claims.json", (json.dumps(facts, indent=1) + "\n").encode())
    with open(options.output / "claims.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
