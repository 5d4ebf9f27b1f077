"""The figures of README from the results beside this file: ``python bench/plot.py``, or with result files named.

Each is written as PNG and SVG into ``bench/results/``. What a file holds decides what is drawn from it: a result of
``idlevit bench`` (with peers: the comparison of methods; with several keep ratios: speed-up by keep ratio), of
``bench/block_steps.py`` (the waterfall of a block) or of ``bench/train_step.py`` (time and memory of a step).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"

# One colour for each method in every figure.
COLOURS = {
    "dense": "#555555",
    "IdleViT": "#0060d0",
    "released order": "#88b4e8",
    "EViT": "#d07000",
    "ToMe": "#2e8b3d",
    "DynamicViT": "#a03070",
}


def colour(method: str) -> str:
    return COLOURS.get(method.partition(",")[0], "#000000")


def method_of(row: dict[str, Any]) -> str:
    return row.get("method", "dense" if row["keep_ratio"] is None else "IdleViT")


def caption(result: dict[str, Any]) -> str:
    env = result["environment"]
    return (
        f"{result['model']}, {result.get('dtype', 'float32')}, {result['device_name']}, {env['threads']} threads, "
        f"torch {env['torch']}, commit {(env['commit'] or 'unknown')[:10]}"
    )


def number(value: float) -> str:
    return f" {value:.0f}" if value >= 100 else f" {value:.3g}"


def figure(width: float, height: float, columns: int, result: dict[str, Any], title: str) -> tuple[Figure, Any]:
    drawn = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = drawn.subplots(1, columns, squeeze=False)[0]
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
    """Speed-up of each method against batch size, a panel for each keep ratio."""
    rows = [row for row in result["models"] if not row["compiled"]]
    dense = {row["batch"]: row for row in rows if method_of(row) == "dense"}
    ratios = sorted({row["keep_ratio"] for row in rows if row["keep_ratio"] is not None}, reverse=True)
    drawn, axes = figure(4.2 * len(ratios), 3.6, len(ratios), result, "Speed-up over dense timm, against batch size")
    for axis, ratio in zip(axes, ratios, strict=True):
        methods = dict.fromkeys(method_of(row) for row in rows if row["keep_ratio"] == ratio)
        batches = list(dense)
        for i, method in enumerate(methods):
            found = {row["batch"]: row for row in rows if (row["keep_ratio"], method_of(row)) == (ratio, method)}
            points = [(k, found[b]) for k, b in enumerate(batches) if b in found]
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
        bound = next(row["mac_bound"] for row in rows if (row["keep_ratio"], method_of(row)) == (ratio, "IdleViT"))
        axis.axhline(bound, color="#0060d0", linestyle=":", linewidth=1, label="MAC bound of IdleViT")
        axis.set_xticks(range(len(batches)), [str(b) for b in batches])
        axis.set_xlabel("batch size", fontsize=8)
        axis.set_title(f"keep ratio {ratio:g}", fontsize=9)
    axes[0].set_ylabel("speed-up", fontsize=8)
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return drawn


def by_keep_ratio(result: dict[str, Any]) -> Figure:
    """Speed-up of IdleViT against keep ratio, a line for each batch size, with the MAC bound."""
    rows = [row for row in result["models"] if not row["compiled"]]
    dense = {row["batch"]: row for row in rows if method_of(row) == "dense"}
    drawn, (axis,) = figure(5.2, 3.6, 1, result, "Speed-up of IdleViT over dense timm, against keep ratio")
    idle = [row for row in rows if method_of(row) == "IdleViT"]
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
        dense = next(row for row in here if method_of(row) == "dense")
        work = dense["images_per_second"] * dense["macs"]
        least = min(row["macs"] for row in here)
        grid = [least + (dense["macs"] - least) * i / 50 for i in range(51)]
        axis.plot([m / 1e9 for m in grid], [work / m for m in grid], ":", color="#555555", label="MAC bound")
        for row in here:
            name = method_of(row)
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


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """By name, what can be drawn from a result; empty for one of another kind."""
    if "models" in result:
        methods = {method_of(row) for row in result["models"]}
        ratios = {row["keep_ratio"] for row in result["models"]}
        drawn = {"macs": by_macs(result)}
        if methods - {"dense", "IdleViT"}:
            drawn["methods"] = by_batch(result)
        if len(ratios) > 3:
            drawn["keep-ratio"] = by_keep_ratio(result)
        return drawn
    steps = [row for row in result.get("rows", []) if isinstance(row, dict)]
    if any("step" in row for row in steps):
        return {"waterfall": waterfall(result)}
    if any(row.get("over") == "masked" for row in steps):
        return {"memory": training(result)}
    return {}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="*", help="results (default: all in bench/results/)")
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
    except (OSError, ValueError, KeyError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
