"""How near each method comes to the dense model without training, at equal MACs: ``python bench/fidelity.py``.

On a trained ViT-S/14 and real images (``bench/real.py``). Settings were searched on photographs 1 to 10 and every
second cut-out; what is reported is on the other photographs and cut-outs. Projections are fitted on cut-outs of the
search half. Every similarity, selection and assignment counts as MACs, of every method.

- stay: the paper's, scored by the class token, in stages.
- follow: idle tokens that follow, the ratio falling linearly; features from W_qkv ("no data") or fitted on images.
- ToMe, EViT, Evo-ViT: bench/peers. Tokens that a method has merged or dropped are given the token they went into.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

import real  # noqa: E402
from peers.evit import EViT  # noqa: E402
from peers.evovit import EvoViT  # noqa: E402
from peers.tome import ToMe, merge  # noqa: E402
from peers.vit import attend, attention, class_attention, gather, mlp, queries_keys_values  # noqa: E402

import idlevit_kernels as ik  # noqa: E402
from idlevit_kernels.measure.fidelity import Fidelity, Outputs, compare_outputs  # noqa: E402
from idlevit_kernels.measure.info import run_facts  # noqa: E402
from idlevit_kernels.measure.tables import console_for  # noqa: E402
from idlevit_kernels.ops.reference.follow_form import follow_block, weight_projection  # noqa: E402
from idlevit_kernels.ops.reference.select_spread import EXACT, ROUNDS  # noqa: E402
from idlevit_kernels.schedule import cheapest_within, num_kept, shaped_schedule  # noqa: E402

DIMENSIONS, FALLING = 32, 8
SHOWN = ("cls", "patch", "error", "iou", "cls_nearest", "pooled_nearest", "cls_neighbours", "pooled_neighbours")


# Methods: each is a module whose ``forward_features`` gives all tokens [B, T, C].


class Follow(nn.Module):
    """Idle tokens that follow, through the plain transcription; ``counts`` representatives a layer."""

    def __init__(self, model: Any, counts: Sequence[int], projections: Sequence[Tensor]):
        super().__init__()
        self.model, self.counts, self.projections = model, counts, projections

    def forward_features(self, images: Tensor) -> Tensor:
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for block, num_keep, projection in zip(model.blocks, self.counts, self.projections, strict=True):
            x = block(x) if num_keep == x.shape[1] - 1 else follow_block(x, block, num_keep, 1, projection)[0]
        return model.norm(x)


class WholeToMe(ToMe):
    """Each token is given the merged token it is part of."""

    def forward_features(self, images: Tensor) -> Tensor:
        x, size = self.embed(images), None
        T = x.shape[1]
        parts = torch.eye(T).expand(len(x), -1, -1)  # [B, T', T]: how much of each token there is in a merged one
        for block, r in zip(self.model.blocks, self.merges, strict=True):
            q, k, v = queries_keys_values(block.attn, block.norm1(x))
            x = x + attend(block, q, k, v, None if size is None else size.log()[:, None, None, :, 0])
            r = min(r, (x.shape[1] - 1) // 2)
            if r > 0:
                both, size = merge(torch.cat([x, parts], dim=2), size, k.mean(1), r)
                x, parts = both.split((x.shape[2], T), dim=2)
            x = mlp(block, x)
        return gather(self.model.norm(x), parts.argmax(1))


class WholeEViT(EViT):
    """Each dropped token is given the fused one of its layer, or what that went into."""

    def forward_features(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        place = torch.arange(x.shape[1]).expand(len(x), -1)  # [B, T]: where each token is now
        for i, block in enumerate(self.model.blocks):
            if i not in self.stages or self.keep_rate == 1:
                x = mlp(block, attention(block, x))
                continue
            q, k, v = queries_keys_values(block.attn, block.norm1(x))
            attentiveness = class_attention(block.attn, q, k)
            x = x + attend(block, q, k, v)
            num_keep = math.ceil(self.keep_rate * attentiveness.shape[1])
            kept = attentiveness.topk(num_keep).indices
            fused = attentiveness.scatter(1, kept, 0.0).unsqueeze(1) @ x[:, 1:]
            moved = torch.full((len(x), x.shape[1]), 1 + num_keep)
            moved[:, 0] = 0
            moved.scatter_(1, kept + 1, 1 + torch.arange(num_keep).expand(len(x), -1))
            place = moved.gather(1, place)
            x = mlp(block, torch.cat([x[:, :1], gather(x[:, 1:], kept), fused], dim=1))
        return gather(self.model.norm(x), place)


class WholeEvoViT(EvoViT):
    def classify(self, x: Tensor) -> Tensor:
        return self.model.norm(x)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.forward(images)


def fitted_projections(model: Any, images: Tensor) -> list[Tensor]:
    """The principal directions [C, 32] of each layer's normalised image tokens, on a few images."""
    x, found = model.norm_pre(model._pos_embed(model.patch_embed(images))), []
    for block in model.blocks:
        rows = F.normalize(block.norm1(x[:, 1:]).flatten(0, 1), dim=-1).double()
        found.append(torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -DIMENSIONS:].flip(1).float().contiguous())
        x = block(x)
    return found


# MACs.


def follow_macs(model: Any, counts: Sequence[int]) -> int:
    """Of one image, with what choosing and assigning costs."""
    N, C = model.patch_embed.num_patches, model.embed_dim
    conv = model.patch_embed.proj.weight
    total = N * conv.numel()
    for block, K in zip(model.blocks, counts, strict=True):
        n = 1 + K
        weights = sum(p.numel() for name, p in block.named_parameters() if name.endswith("weight") and p.dim() == 2)
        total += n * weights + 2 * n * n * C
        if K < N:
            total += N * C * DIMENSIONS + spread_products(N, K) * DIMENSIONS
    return total


def spread_products(N: int, K: int) -> int:
    """Dot products of choosing K of N tokens and of assigning all to them, each counted as if nothing were shared."""
    products, left = N * K, K
    if K > EXACT:
        left = K - EXACT
        for rounds in range(ROUNDS, 0, -1):
            m = -(-left // rounds)
            products += min(2 * m, N - K + left) ** 2
            left -= m
    return products + N * K


def amount_for(target: float, share: Callable[[float], float]) -> float:
    """The amount in (0, 1] at which a method takes the share of MACs; the share grows with it."""
    low, high = 0.02, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) <= target else (low, middle)
    return low


def methods(model: Any, target: float, projections: dict[str, list[Tensor]]) -> dict[str, tuple[Any, float, str]]:
    """By name: the method, its share of the dense model's MACs, and its setting."""
    dense = ik.count_macs(model).total
    N, depth = model.patch_embed.num_patches, len(model.blocks)
    found: dict[str, tuple[Any, float, str]] = {}

    def share(module: nn.Module) -> float:
        return ik.count_macs(module, (3, 224, 224)).total / dense

    def stay(ratio: float) -> Any:
        return ik.apply_idle(copy.deepcopy(model), keep_ratio=ratio)

    ratio = amount_for(target, lambda r: share(stay(r)))
    found["stay (the paper's)"] = (stay(ratio), share(stay(ratio)), f"keep_ratio {ratio:.3f}")
    peers: dict[str, Callable[[float], Any]] = {
        "ToMe": lambda a: WholeToMe(model, (1 - a) * 2 * N / depth),
        "EViT": lambda a: WholeEViT(model, a),
        "Evo-ViT": lambda a: WholeEvoViT(model, a),
    }
    words: dict[str, Callable[[Any], str]] = {
        "ToMe": lambda m: f"r {m.r:.2f}", "EViT": lambda m: f"keep rate {m.keep_rate:.3f}",
        "Evo-ViT": lambda m: f"keep ratio {m.keep_ratio:.3f}",
    }  # fmt: skip
    for name, make in peers.items():
        if target >= share(make(0.02)):
            peer = make(amount_for(target, lambda a, make=make: share(make(a))))  # type: ignore[misc]
            found[name] = (peer, share(peer), words[name](peer))

    def counts(ratios: Sequence[float]) -> list[int]:
        return [num_kept(r, N) for r in ratios]

    end = cheapest_within(
        target,
        lambda e: shaped_schedule(depth, "linear", e, FALLING),
        lambda ratios: follow_macs(model, counts(ratios)) / dense,
    )
    assert end is not None
    kept = counts(shaped_schedule(depth, "linear", end, FALLING))
    for name, fitted in projections.items():
        found[f"follow, {name}"] = (Follow(model, kept, fitted), follow_macs(model, kept) / dense, f"end {end:.3f}")
    return found


# Measures.


def outputs(method: Any, images: Tensor, batch_size: int = 20) -> Outputs:
    return Outputs(torch.cat([method.forward_features(batch) for batch in images.split(batch_size)]), 1)


def overlap(before: Tensor, after: Tensor) -> Tensor:  # maps [M, 1, H, W] -> [M]
    """Intersection over union of what is salient (above one half)."""
    a, b = (before > 0.5).flatten(1), (after > 0.5).flatten(1)
    return (a & b).sum(1) / (a | b).sum(1).clamp(min=1)


def measured(dense: Outputs, found: Outputs, decoder: nn.Module, names: Sequence[str]) -> Fidelity:
    fidelity = compare_outputs(dense, found, names)
    before, after = decoder(dense.image_tokens), decoder(found.image_tokens)
    fidelity.values["iou"] = overlap(before, after)
    others = torch.stack([overlap(before, before.roll(i, 0)).mean() for i in range(1, len(names))])
    fidelity.floors["iou"] = float(others.mean())
    return fidelity


def halves(pictures: real.Pictures, searched: Sequence[int]) -> tuple[real.Pictures, real.Pictures]:
    """What settings are searched on, and what is reported on."""
    return pictures.at(searched), pictures.at([i for i in range(len(pictures)) if i not in set(searched)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--macs", type=float, nargs="+", default=[0.62, 0.46], help="shares (default: 0.62 0.46)")
    parser.add_argument("--half", choices=("report", "search", "both"), default="report", help="which images")
    parser.add_argument("--only", help="methods whose name contains this, beside the dense model")
    parser.add_argument("--folder", type=Path, help="cache folder of bench/real.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every image here too")
    options = parser.parse_args(arguments)
    torch.set_grad_enabled(False)
    model, decoder = real.saliency_vit(folder=options.folder), real.saliency_decoder(options.folder)
    photographs, cutouts = real.photographs(folder=options.folder), real.cutouts(folder=options.folder)
    split = {
        "photographs": halves(photographs, range(10)), "cut-outs": halves(cutouts, range(0, len(cutouts), 2)),
    }  # fmt: skip
    fit = split["cut-outs"][0].at(range(0, 160, 4)).images
    projections = {
        "no data": [weight_projection(block, DIMENSIONS) for block in model.blocks],
        "4 images": fitted_projections(model, fit[::10]),
        "40 images": fitted_projections(model, fit),
    }
    sets = {
        name: {"search": search, "report": report, "both": {"photographs": photographs, "cut-outs": cutouts}[name]}[
            options.half
        ]
        for name, (search, report) in split.items()
    }
    dense = {name: outputs(model, pictures.images) for name, pictures in sets.items()}
    rows: list[dict[str, Any]] = []
    for target in options.macs:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{options.half}: {target:.0%} of the MACs")
        for title in ("method", "MACs", "images", *SHOWN):
            table.add_column(title, justify="left" if title in ("method", "images") else "right", no_wrap=True)
        for method, (module, macs, setting) in methods(model, target, projections).items():
            if options.only and options.only not in method:
                continue
            for name, pictures in sets.items():
                found = measured(dense[name], outputs(module, pictures.images), decoder, pictures.names)
                cells = [f"{found.mean(m):.3f} ±{found.standard_error(m):.3f}" for m in SHOWN]
                table.add_row(method, f"{macs:.3f}", f"{len(pictures)} {name}", *cells)
                rows.append(
                    {
                        "target": target, "method": method, "setting": setting, "macs": macs, "images": name,
                        "mean": {m: found.mean(m) for m in SHOWN}, "floor": {m: found.floors[m] for m in SHOWN},
                        "standard_error": {m: found.standard_error(m) for m in SHOWN},
                        "values": {m: [round(v, 5) for v in found.values[m].tolist()] for m in SHOWN},
                    }
                )  # fmt: skip
        for name, pictures in sets.items():
            floors = measured(dense[name], dense[name], decoder, pictures.names).floors
            table.add_row("unrelated image", "", f"{len(pictures)} {name}", *(f"{floors[m]:.3f}" for m in SHOWN))
        console_for(table).print(table)
    if options.json:
        facts = run_facts(
            ["python", "bench/fidelity.py", *(arguments or sys.argv[1:])],
            torch.device("cpu"),
            model=f"{real.MODEL}, weights of {real.SOURCES['saliency-vit'].package}, 224 pixels",
            half=options.half,
            images={name: list(pictures.names) for name, pictures in sets.items()},
        )
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
