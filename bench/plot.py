"""All figures of README: ``python bench/plot.py``; with result files named, those of the files alone.

Each is written into ``bench/results/``. What a result holds decides what is drawn from it, as PNG and SVG: one of
``idlevit bench`` (with peers: the comparison of methods; with several keep ratios: speed-up by keep ratio), of
``idlevit tune`` (the staircase), ``bench/block_steps.py`` (the waterfall of a block), ``bench/train_step.py`` (time and
memory of a step) or ``bench/claims.py`` (accuracy). The pictures of idling need two trained models: ``idlevit train``
makes them, in ``build/``, where they are found again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

# One colour for each method in every figure.
COLOURS = {
    "dense": "#555555",
    "IdleViT": "#0060d0",
    "released order": "#88b4e8",
    "EViT": "#d07000",
    "ToMe": "#2e8b3d",
    "DynamicViT": "#a03070",
    "Evo-ViT": "#c0a000",
}


def colour(method: str) -> str:
    return COLOURS.get(method.partition(",")[0], "#000000")


def caption(result: dict[str, Any]) -> str:
    env = result["environment"]
    known = [result.get(name) for name in ("model", "dtype", "device_name")]
    made_by = f"{env['threads']} threads, torch {env['torch']}, commit {(env['commit'] or 'unknown')[:10]}"
    return ", ".join([*filter(None, known), made_by])


def number(value: float) -> str:
    return f" {value:.0f}" if value >= 100 else f" {value:.3g}"


def figure(
    width: float, height: float, columns: int, result: dict[str, Any], title: str, rows: int = 1
) -> tuple[Figure, Any]:
    """A figure of so many inches with title and caption, and its panels, row by row."""
    drawn = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = drawn.subplots(rows, columns, squeeze=False).ravel()
    drawn.suptitle(title, fontsize=9)
    drawn.supxlabel(caption(result), fontsize=6, color="#555555")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    return drawn, axes


def spread(row: dict[str, Any], dense: dict[str, Any]) -> tuple[float, float]:
    """Of a speed-up, down and up: the method's percentiles over the dense median."""
    median = dense["images_per_second"]
    return row["speedup"] - row["p20"] / median, row["p80"] / median - row["speedup"]


def by_batch(result: dict[str, Any]) -> Figure:
    """Speed-up of each method over eager dense timm against batch size: a column of panels for each keep ratio, a row
    for eager mode and, if measured, one for torch.compile."""
    dense = {row["batch"]: row for row in result["models"] if row["method"] == "dense" and not row["compiled"]}
    ratios = sorted({row["keep_ratio"] for row in result["models"] if row["keep_ratio"] is not None}, reverse=True)
    modes = sorted({row["compiled"] for row in result["models"]})
    title = "Speed-up over dense timm in eager mode, against batch size"
    drawn, axes = figure(4.2 * len(ratios), 3.2 * len(modes) + 0.4, len(ratios), result, title, len(modes))
    for axis, (compiled, ratio) in zip(axes, itertools.product(modes, ratios), strict=True):
        # Compiled dense is what a compiled method has to beat; at 1.00 lies eager dense.
        rows = [row for row in result["models"] if row["compiled"] == compiled and row["keep_ratio"] == ratio]
        rows += [row for row in result["models"] if row["compiled"] == compiled and row["method"] == "dense"]
        methods = dict.fromkeys(row["method"] for row in rows if compiled or row["method"] != "dense")
        for i, method in enumerate(methods):
            found = {row["batch"]: row for row in rows if row["method"] == method}
            points = [(k, found[batch]) for k, batch in enumerate(dense) if batch in found]
            bars = list(zip(*(spread(row, dense[row["batch"]]) for _, row in points), strict=True))
            axis.errorbar(
                [k + 0.04 * (i - len(methods) / 2) for k, _ in points],
                [row["speedup"] for _, row in points],
                [[max(0, v) for v in side] for side in bars],
                color=colour(method),
                linestyle="--" if "equal MACs" in method else "-",
                marker="o" if method == "IdleViT" else ".",
                linewidth=2 if method == "IdleViT" else 1,
                capsize=2,
                label=method,
            )
        bound = next(row["mac_bound"] for row in rows if row["method"] == "IdleViT")
        axis.axhline(bound, color="#0060d0", linestyle=":", linewidth=1, label="MAC bound of IdleViT")
        axis.set_xticks(range(len(dense)), [str(batch) for batch in dense])
        axis.set_xlabel("batch size", fontsize=8)
        axis.set_title(f"keep ratio {ratio:g}{', torch.compile' if compiled else ''}", fontsize=9)
    for row_of_panels in range(len(modes)):
        axes[row_of_panels * len(ratios)].set_ylabel("speed-up", fontsize=8)
        axes[(row_of_panels + 1) * len(ratios) - 1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return drawn


def by_keep_ratio(result: dict[str, Any]) -> Figure:
    """Speed-up of IdleViT against keep ratio, a line for each batch size, with the MAC bound."""
    rows = [row for row in result["models"] if not row["compiled"]]
    dense = {row["batch"]: row for row in rows if row["method"] == "dense"}
    drawn, (axis,) = figure(5.2, 3.6, 1, result, "Speed-up of IdleViT over dense timm, against keep ratio")
    idle = [row for row in rows if row["method"] == "IdleViT" and row["keep_ratio"] is not None]
    for batch, shade in zip(dense, ("#88b4e8", "#3a84dd", "#003a80", "#000000"), strict=False):
        points = sorted((row for row in idle if row["batch"] == batch), key=lambda row: row["keep_ratio"])
        bars = list(zip(*(spread(row, dense[batch]) for row in points), strict=True))
        axis.errorbar(
            [row["keep_ratio"] for row in points],
            [row["speedup"] for row in points],
            [[max(0, v) for v in side] for side in bars],
            color=shade,
            marker="o",
            capsize=2,
            label=f"batch {batch}",
        )
    bound = dict(sorted((row["keep_ratio"], row["mac_bound"]) for row in idle))
    axis.plot(bound.keys(), bound.values(), color="#d07000", linestyle=":", label="MAC bound")
    axis.invert_xaxis()
    axis.set_xlabel("keep ratio", fontsize=8)
    axis.set_ylabel("speed-up", fontsize=8)
    axis.legend(fontsize=8)
    return drawn


def by_macs(result: dict[str, Any]) -> Figure:
    """Throughput against multiply-accumulates, a panel for each batch size, with the throughput that MACs allow."""
    rows = [row for row in result["models"] if not row["compiled"]]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    drawn, axes = figure(3.6 * len(batches), 3.6, len(batches), result, "Throughput against multiply-accumulates")
    for axis, batch in zip(axes, batches, strict=True):
        here = [row for row in rows if row["batch"] == batch]
        dense = next(row for row in here if row["method"] == "dense")
        work = dense["images_per_second"] * dense["macs"]
        least = min(row["macs"] for row in here)
        grid = [least + (dense["macs"] - least) * i / 50 for i in range(51)]
        axis.plot([m / 1e9 for m in grid], [work / m for m in grid], ":", color="#555555", label="MAC bound")
        for row in here:
            name = row["method"]
            y = row["images_per_second"]
            axis.errorbar(
                row["macs"] / 1e9,
                y,
                [[max(0, y - row["p20"])], [max(0, row["p80"] - y)]],
                color=colour(name),
                marker="o" if "equal MACs" not in name else "x",
                capsize=2,
                label=name,
            )
        axis.set_title(f"batch {batch}", fontsize=9)
        axis.set_xlabel("GMACs of an image", fontsize=8)
    axes[0].set_ylabel("images per second", fontsize=8)
    handles, labels = axes[-1].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes[-1].legend(unique.values(), unique, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return drawn


def waterfall(result: dict[str, Any]) -> Figure:
    """The steps of an idle block, each from where the one before ends, beside whole blocks; a panel for each batch."""
    batches = list(dict.fromkeys(row["batch"] for row in result["rows"]))
    title = f"An idle block that computes {result['num_keep']} of {result['num_tokens'] - 1} tokens, step by step"
    drawn, axes = figure(3.9 * len(batches), 3.4, len(batches), result, title)
    own = ("attention", "MLP")
    for axis, batch in zip(axes, batches, strict=True):
        rows = {row["step"]: row["seconds"] * 1e3 for row in result["rows"] if row["batch"] == batch}
        begin = 0.0
        for i, (step, length) in enumerate(rows.items()):
            whole = "block" in step
            if whole:
                begin = 0.0
            shade = "#555555" if "dense" in step else "#0060d0" if whole or step in own else "#d07000"
            axis.barh(i, length, left=begin, color=shade)
            axis.text(begin + length, i, number(length), va="center", fontsize=6)
            begin += length
        axis.set_yticks(range(len(rows)), list(rows) if axis is axes[0] else [""] * len(rows), fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set_xlim(left=0)
        axis.set_xlabel("milliseconds", fontsize=8)
        axis.set_title(f"batch {batch}", fontsize=9)
    return drawn


def training(result: dict[str, Any]) -> Figure:
    """Time and peak memory of one training step, a bar for each form."""
    rows = [row for row in result["rows"] if row["over"] == "masked"]  # the other rows are of the loss alone
    drawn, axes = figure(8, 2.6, 2, result, f"One training step, batch {result.get('batch', '')}")
    forms = [row["form"] for row in rows]
    for axis, values, label in (
        (axes[0], [row["seconds"] for row in rows], "seconds"),
        (axes[1], [row["peak_bytes"] / 2**20 for row in rows], "peak memory beyond the model, MiB"),
    ):
        axis.barh(range(len(rows)), values, color=["#0060d0" if "idle" in form else "#555555" for form in forms])
        axis.set_yticks(range(len(rows)), forms if axis is axes[0] else [""] * len(rows), fontsize=8)
        for i, value in enumerate(values):
            axis.text(value, i, number(value), va="center", fontsize=7)
        axis.margins(x=0.16)
        axis.invert_yaxis()
        axis.set_xlabel(label, fontsize=8)
    return drawn


def staircase(result: dict[str, Any]) -> Figure:
    """Time of a block by number of kept tokens, and the steps that the schedule is made of."""
    title = f"One block at each number of kept tokens, batch {result['batch']}"
    drawn, (axis,) = figure(5.2, 3.4, 1, result, title)
    timings = {int(count): timing for count, timing in result["staircase"].items()}
    medians = {count: 1e3 * timing["median"] for count, timing in timings.items()}
    low = [1e3 * (t["median"] - t["p20"]) for t in timings.values()]
    high = [1e3 * (t["p80"] - t["median"]) for t in timings.values()]
    axis.errorbar(medians.keys(), medians.values(), [low, high], color="#88b4e8", marker=".", capsize=2, label="block")
    layers = {count: result["num_keep"].count(count) for count in result["steps"]}
    axis.plot(layers.keys(), [medians[c] for c in layers], "o", color="#0060d0", fillstyle="none", label="step")
    for count, layer_count in layers.items():
        if layer_count:
            text = f"{layer_count} layer{'s' * (layer_count > 1)}"
            axis.annotate(text, (count, medians[count]), (0, -14), textcoords="offset points", fontsize=7)
    axis.set_ylim(bottom=0)
    axis.set_xlabel(f"kept of {result['num_image_tokens']} image tokens", fontsize=8)
    axis.set_ylabel("milliseconds", fontsize=8)
    axis.legend(fontsize=7)
    return drawn


def accuracy(result: dict[str, Any]) -> Figure:
    """Top-1 accuracy of each method against keep ratio, with standard errors."""
    table = result["summary"]
    dense = next(row for row in table if row["method"] == "dense")
    title = f"Handwritten digits, mean and standard error of {dense['seeds']} seeds"
    drawn, (axis,) = figure(8.5, 4.2, 1, result, title)
    axis.axhline(dense["top1"], color="#555555", linewidth=1, label="dense")
    methods = list(dict.fromkeys(row["method"] for row in table if row is not dense))
    for i, method in enumerate(methods):
        rows = [row for row in table if row["method"] == method]
        axis.errorbar(
            [row["keep_ratio"] + (i - len(methods) / 2) * 0.006 for row in rows],  # beside each other
            [row["top1"] for row in rows],
            [row["standard_error"] or 0.0 for row in rows],
            marker="s" if method == "token dropping" else "o",
            capsize=3,
            label=method,
        )
    axis.invert_xaxis()
    axis.set_xlabel("keep ratio r; stages keep r, r², r³ of the tokens", fontsize=8)
    axis.set_ylabel("top-1 accuracy, %", fontsize=8)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """By name, what can be drawn from a result; empty for one of another kind."""
    if "models" in result:
        methods = {row["method"] for row in result["models"]}
        ratios = {row["keep_ratio"] for row in result["models"]}
        drawn = {"macs": by_macs(result)}
        if methods - {"dense", "IdleViT"}:
            drawn["methods"] = by_batch(result)
        if len(ratios) > 3:
            drawn["keep-ratio"] = by_keep_ratio(result)
        return drawn
    if "staircase" in result:
        return {"staircase": staircase(result)}
    if "summary" in result:
        return {"accuracy": accuracy(result)}
    steps = [row for row in result.get("rows", []) if isinstance(row, dict)]
    if any("step" in row for row in steps):
        return {"waterfall": waterfall(result)}
    if any(row.get("over") == "masked" for row in steps):
        return {"memory": training(result)}
    return {}


# Of `idlevit train` on a folder of few, small images.
FEW = ["--model", "test_vit", "--batch-size", "32", "--min-lr", "1e-5", "--clip-grad", "1", "--ema-decay", "0.95"]
FEW += ["--random-augment", "none", "--random-erasing", "0", "--aug-repeats", "1", "--mixup", "0", "--cutmix", "0"]
DENSE = ["--weights", "none", "--keep-ratio", "1", "--epochs", "12", "--lr", "1.6e-2", "--warmup-epochs", "2"]
IDLE = ["--keep-ratio", "0.7", "--epochs", "3", "--lr", "3e-3"]


def pictures(folder: Path) -> None:
    """What trained models idle, on images that they have not seen: of digits, and of materials on photographs."""

    def run(*command: str | Path) -> None:
        subprocess.run([sys.executable, *map(str, command)], check=True)

    def train(output: Path, *options: str | Path) -> None:
        run("-m", "idlevit_kernels", "train", "--output", output, "--resume", "auto", *options)

    work = ROOT / "build" / "pictures"
    work.mkdir(parents=True, exist_ok=True)
    materials = ["--data", work / "images", *FEW]
    run(ROOT / "examples" / "materials.py", work / "images")
    train(work / "digits")
    train(work / "dense", *materials, *DENSE, "--no-freeze-embeddings")
    train(work / "materials", *materials, *IDLE, "--weights", max((work / "dense").glob("checkpoint-*.pt")))
    for name in ("digits", "materials"):
        run("-m", "idlevit_kernels", "visualize", "--run", work / name, "--output", folder / f"idling-{name}.png")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="*", help="results (default: bench/results/*.json, and pictures)")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where to write (default: bench/results/)")
    options = parser.parse_args(arguments)
    matplotlib.rcParams["svg.hashsalt"] = "idlevit"  # the same figure is the same file
    try:
        for path in options.files or sorted(RESULTS.glob("*.json")):
            for name, drawn in figures(json.loads(path.read_text())).items():
                for suffix in ("png", "svg"):
                    target = options.folder / f"{path.stem}-{name}.{suffix}"
                    drawn.savefig(target, metadata={"Date": None} if suffix == "svg" else None)
                    print(target)
        if not options.files:
            pictures(options.folder)
    except (OSError, ValueError, KeyError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:  # the command has told why
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
