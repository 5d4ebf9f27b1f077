"""Speed of two source trees of this package, alternated in one run: ``python bench/two_trees.py OLD NEW``.

Each tree (a checkout with its extension built in place, ``idlevit_kernels/_C*.so``) gets a process of its own, which
takes turns with the other: the whole model at inference, idle at 0.7, and the host time of an idle block, that is with
the native kernels replaced by functions that do nothing, on tensors so small that Python is what takes the time. Ratios
are NEW over OLD, below 1 where NEW is faster: the median of the ratios of neighbouring samples.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KERNELS = (
    "cls_direction", "token_scores", "select_tokens", "select_gather_norm", "cls_select_gather_norm", "gather_tokens",
    "gather_add_norm", "scatter_tokens",
)  # fmt: skip


def serve() -> None:
    """In a tree's process: reads cases as JSON lines, answers with the seconds of a call."""
    import timm
    import torch

    import idlevit_kernels as ik

    torch.set_num_threads(2)
    calls: dict[str, Any] = {}

    def prepare(case: dict[str, Any]) -> Any:
        torch.manual_seed(0)
        if case["kind"] == "host":
            from idlevit_kernels import _C

            for name in KERNELS:
                setattr(_C, f"cpu_{name}", lambda *_: 0)
            torch.set_num_threads(1)
            block = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=16, num_heads=2).eval().blocks[0]
            ratios = {"idle": 0.5, "dense": 1.0}
            idle, x = ik.IdleBlock(block, ratios[case["block"]]), torch.randn(1, 9, 16)
            return lambda: idle(x)
        model = timm.create_model(case["model"]).eval()
        ik.apply_idle(model, case["keep_ratio"])
        images = torch.randn(case["batch"], 3, 224, 224)
        return lambda: model(images)

    print(json.dumps({"file": ik.__file__}), flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            case = json.loads(line)
            if line not in calls:
                calls[line] = prepare(case)
                for _ in range(case["repeats"]):
                    calls[line]()
            start = time.perf_counter()
            for _ in range(case["repeats"]):
                calls[line]()
            print(json.dumps((time.perf_counter() - start) / case["repeats"]), flush=True)


class Tree:
    def __init__(self, path: Path):
        environment = {**os.environ, "PYTHONPATH": str(path)}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=path
        )
        found = Path(self._answer()["file"]).resolve()
        if path not in found.parents:
            raise SystemExit(f"two_trees: {path} must hold the package idlevit_kernels, but {found} was imported")

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("two_trees: a process ended early; its message is above")
        return json.loads(line)

    def time(self, case: dict[str, Any]) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return self._answer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="*", default=["deit_small_patch16_224", "swin_tiny_patch4_window7_224"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    arguments = parser.parse_args()
    models = [
        {"kind": "model", "model": model, "keep_ratio": 0.7, "batch": batch, "repeats": max(1, 8 // batch)}
        for model in arguments.models
        for batch in arguments.batches
    ]
    host = [{"kind": "host", "block": block, "repeats": 500} for block in ("idle", "dense")]
    for cases in (models, host):  # in processes of their own: stubbed kernels stay stubbed
        trees = [Tree(path.resolve()) for path in (arguments.old, arguments.new)]
        for case in cases:
            pairs = []
            for i in range(arguments.rounds):
                order = (0, 1) if i % 2 else (1, 0)
                seconds = {j: trees[j].time(case) for j in order}
                pairs.append((seconds[0], seconds[1]))
            old, new = (statistics.median(p[j] for p in pairs) for j in (0, 1))
            ratio = statistics.median(b / a for a, b in pairs)
            row = {**case, "old_ms": round(old * 1e3, 4), "new_ms": round(new * 1e3, 4), "ratio": round(ratio, 3)}
            print(json.dumps(row), flush=True)
        for tree in trees:
            tree.process.kill()


if __name__ == "__main__":
    serve() if "--serve" in sys.argv else main()
