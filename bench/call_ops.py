"""Calls each op on each GPU backend at small shapes, for compute-sanitizer and ncu to look at.

``--shape B,T,C`` calls the ops of an idle block in bfloat16 at that shape instead, twice each: the second is warm.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from idlevit_kernels.ops import backends, testing
from idlevit_kernels.ops.testing import Case

SMALL = (Case(2, 49, 64, 20), Case(3, 196, 384, 137, P=2, dtype=torch.bfloat16, scores="ties"))
IN_A_BLOCK = ("token_scores", "select_gather_norm", "gather_add_norm", "scatter_add_tokens")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", help="B,T,C of one shape in bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", default="triton,cuda")
    options = parser.parse_args(arguments)
    cases, ops, times = SMALL, testing.OPS, 1
    if options.shape:
        B, T, C = map(int, options.shape.split(","))
        cases, ops, times = (Case(B, T - 1, C, int(0.7 * (T - 1)), dtype=torch.bfloat16),), IN_A_BLOCK, 2
    for backend in options.backends.split(","):
        for case in cases:
            for op in ops:
                given = testing.make_arguments(op, case, device=options.device)
                reasons = backends.named(backend).reasons(op, given)
                print(f"{backend} {op} {case}: {'; '.join(reasons) or 'called'}", flush=True)
                for _ in range(0 if reasons else times):
                    testing.run(op, given, backend)
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
