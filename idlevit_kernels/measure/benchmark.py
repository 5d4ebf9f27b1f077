"""Dense timm against IdleViT and its peers: throughput of the model, and one idle block over its dense floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..block import IdleBlock
from ..block.latency import BlockInput, random_inputs, rotating
from ..block.timing import Interrupted, Timing, alternate
from ..errors import ArgumentValueError, Words, value_error
from ..models import apply_idle, idle_blocks
from ..models.create import create_model, sharing_weights
from ..models.inputs import block_inputs
from ..ops import backends
from ..schedule import check_ratio, num_kept
from .machine import find_device, find_dtype
from .macs import count_macs

Progress = Callable[[str, float], None]  # what is running, and the share of the whole that is done
# (dense model, keep ratio and MACs of the IdleViT, input size) -> by name, another method's model and its setting
PeersOf = Callable[[nn.Module, float, int, tuple[int, int, int]], dict[str, tuple[nn.Module, str]]]

_MIN_ROUNDS = 3
_EQUAL_SHARE = 0.3  # of the time goes to all batch sizes alike, the rest by the number of images
_MODEL_SHARE = 0.78  # of the time at a batch size; the single blocks get the rest, for about as many rounds


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """One variant of the model at one batch size.

    Attributes:
        method: "dense", "IdleViT" or the name of a peer.
        keep_ratio: of the IdleViT, or of the one that a peer is compared with; None for the dense model and a schedule.
        setting: of a peer, in words; empty for the others.
        macs: of one image.
        images_per_second, p20, p80: from the median and the percentiles of the time of a batch.
        samples: how often it was measured.
        speedup: over the dense model in eager mode.
        speedup_compiled: over the compiled dense model; None if nothing was compiled.
        mac_bound: MACs of the dense model over those of this one.
        share_of_bound: speed-up over the dense model of the same mode, eager or compiled, over ``mac_bound``.
    """

    batch: int
    method: str
    keep_ratio: float | None
    setting: str
    compiled: bool
    macs: int
    images_per_second: float
    p20: float
    p80: float
    samples: int
    speedup: float
    speedup_compiled: float | None
    mac_bound: float
    share_of_bound: float


@dataclasses.dataclass(frozen=True)
class BlockRow:
    """The idle block named ``block`` on [B, T, C] and timm's dense block on [B, P + K, C], its floor, in eager mode."""

    batch: int
    keep_ratio: float | None  # of the model; None for a schedule
    block: str
    num_tokens: int  # T
    num_prefix_tokens: int  # P
    num_keep: int  # K
    idle: Timing
    dense: Timing
    overhead: float


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model that is measured; the fields are those of ``ModelRow``."""

    method: str
    keep_ratio: float | None = None
    setting: str = ""


DENSE = Variant("dense")


@dataclasses.dataclass
class Result:
    models: list[ModelRow] = dataclasses.field(default_factory=list)
    blocks: list[BlockRow] = dataclasses.field(default_factory=list)
    complete: bool = False


class ModelBenchmark:
    """A timm model, dense and idle at each keep ratio, all on one set of random weights.

    Args:
        model: name of a timm model.
        keep_ratios, batches: what to measure.
        image_size: height and width of the images; None for the model's own.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:<index>"; None for the best there is.
        compiled: measure dense and IdleViT under torch.compile as well.
        peers: makes the other methods to measure beside each keep ratio, in eager mode.
        schedule: measure the model with these ratios of the layers, too.

    Raises:
        ValueError, TypeError: an argument that does not fit, or a model that cannot idle; the message says why.
    """

    def __init__(
        self,
        model: str,
        keep_ratios: Sequence[float],
        batches: Sequence[int],
        image_size: int | None = None,
        dtype: str = "float32",
        device: str | None = None,
        compiled: bool = False,
        peers: PeersOf | None = None,
        schedule: Sequence[float] | None = None,
    ):
        ratios = [check_ratio("bench", ratio) for ratio in dict.fromkeys(keep_ratios)]
        if min(batches) < 1:
            raise value_error("bench", "batch", "at least 1", min(batches))
        if peers and not ratios:
            raise value_error(
                "bench", "peers", "given with a keep ratio, at which they are compared", Words("a schedule alone")
            )
        torch_dtype = find_dtype("bench", dtype)
        self.device = find_device("bench", device)
        self.batches = list(dict.fromkeys(batches))
        self.compiled = compiled
        self.dense, self.input_size = create_model("bench", model, image_size)
        self.dense.eval().requires_grad_(False).to(self.device, torch_dtype)
        self.idle = {Variant("IdleViT", r): apply_idle(sharing_weights(self.dense), r) for r in ratios}
        if schedule is not None:
            self.idle[Variant("IdleViT")] = apply_idle(sharing_weights(self.dense), schedule=schedule)
        self.models: dict[Variant, nn.Module] = {DENSE: self.dense, **self.idle}
        try:
            self.macs = {variant: self._count(m) for variant, m in self.models.items()}
        except (AssertionError, RuntimeError) as error:  # of the first forward pass
            raise ArgumentValueError(f"bench: {model} cannot take images of {self.input_size}: {error}") from error
        if peers:
            self._add_peers(peers)

    def backend(self) -> str:
        """The backend that the idle blocks run on."""
        op, x = "gather_tokens", next(self.dense.parameters()).new_empty((1, 1, 1))
        indices = torch.zeros((1, 1), device=self.device, dtype=torch.int64)
        return backends.choose(op, backends.resolve("auto", op), (x, indices)).name

    @torch.inference_mode()
    def run(self, seconds: float, on_progress: Progress = lambda label, done: None) -> Result:
        """Measures for about ``seconds``; for longer if three rounds of everything take longer.

        On Ctrl-C it returns what has been measured so far; ``complete`` is then False.
        """
        result = Result()
        try:
            plan = self._plan(seconds)
            steps = _Steps(sum(plan.values()), on_progress)
            for batch, share in plan.items():
                self._measure_models(result, batch, _MODEL_SHARE * share, steps)
                self._measure_blocks(result, batch, (1 - _MODEL_SHARE) * share, steps)
            result.complete = True
        except KeyboardInterrupt:
            pass
        return result

    def _count(self, model: nn.Module) -> int:
        return count_macs(model, self.input_size).total

    def _add_peers(self, peers: PeersOf) -> None:
        for idle in self.idle:
            ratio, macs = idle.keep_ratio, self.macs[idle]
            if ratio is None:  # a peer of a schedule has no ratio
                continue
            for name, (peer, setting) in peers(self.dense, ratio, macs, self.input_size).items():
                variant = Variant(name, ratio, setting)
                self.models[variant], self.macs[variant] = peer.eval(), self._count(peer)

    def _plan(self, seconds: float) -> dict[int, float]:
        """Seconds for each batch size: large ones need most, and small ones, being noisy, more than their part."""
        equal = _EQUAL_SHARE / len(self.batches)
        return {b: seconds * (equal + (1 - _EQUAL_SHARE) * b / sum(self.batches)) for b in self.batches}

    def _calls(self, models: dict[Any, Any], shape: tuple[int, ...]) -> dict[Any, Callable[[], Any]]:
        """A call of each model on the next of the same inputs."""
        inputs = random_inputs(shape, next(self.dense.parameters()))
        return {key: rotating(model, inputs) for key, model in models.items()}

    def _measure_models(self, result: Result, batch: int, seconds: float, steps: _Steps) -> None:
        variants: dict[Any, Any] = {(variant, False): model for variant, model in self.models.items()}
        if self.compiled:
            # All models share the code of one forward: past dynamo's limit of compilations it would give up.
            torch.compiler.reset()
            for variant, model in ({DENSE: self.dense} | self.idle).items():
                variants[variant, True] = torch.compile(model, fullgraph=True, dynamic=False)
        calls = self._calls(variants, (batch, *self.input_size))
        steps.begin(f"batch {batch}, models", seconds)
        try:
            config: Any = torch.compiler.config  # it has the attribute, whatever its type says
            with config.patch(recompile_limit=1 + len(variants)):
                timings = alternate(calls, seconds, _MIN_ROUNDS, self.device, steps)
        except Interrupted as interrupted:
            self._add_models(result, batch, interrupted.timings)
            raise
        self._add_models(result, batch, timings)

    def _add_models(self, result: Result, batch: int, timings: dict[Any, Timing]) -> None:
        for (variant, compiled), timing in timings.items():
            speedups = {mode: timings[DENSE, mode].median / timing.median for _, mode in timings}
            bound = self.macs[DENSE] / self.macs[variant]
            result.models.append(
                ModelRow(
                    batch=batch,
                    **dataclasses.asdict(variant),
                    compiled=compiled,
                    macs=self.macs[variant],
                    images_per_second=batch / timing.median,
                    p20=batch / timing.p80,
                    p80=batch / timing.p20,
                    samples=timing.n,
                    speedup=speedups[False],
                    speedup_compiled=speedups.get(True),
                    mac_bound=bound,
                    share_of_bound=speedups[compiled] / bound,
                )
            )

    def _measure_blocks(self, result: Result, batch: int, seconds: float, steps: _Steps) -> None:
        pairs = [(idle.keep_ratio, *pair) for idle, model in self.idle.items() for pair in _first_of_each_stage(model)]
        # About what a round of each costs: the kept tokens, and something that does not depend on them.
        costs = [0.25 + idle.keep for _, _, idle in pairs]
        for (ratio, name, idle), cost in zip(pairs, costs, strict=True):
            dense = self.dense.get_submodule(name)
            (given,) = block_inputs(self.dense, [dense], batch, self.input_size)
            _, num_tokens, channels = given.shape
            num_prefix = idle.num_prefix_tokens
            num_keep = num_kept(idle.keep, num_tokens - num_prefix)
            rope = given.named.get("rope")
            kept = {} if rope is None else {"rope": rope[..., :num_keep, :]}
            floor = BlockInput((batch, num_prefix + num_keep, channels), named=kept)
            calls = {"idle": given.rotating(idle), "dense": floor.rotating(dense)}
            share = seconds * cost / sum(costs)
            steps.begin(f"batch {batch}, blocks", share)
            timings = alternate(calls, share, _MIN_ROUNDS, self.device, steps)
            overhead = timings["idle"].median / timings["dense"].median
            result.blocks.append(
                BlockRow(batch, ratio, name, num_tokens, num_prefix, num_keep, **timings, overhead=overhead)
            )


class _Steps:
    """Turns the progress of one step into that of the whole, by the seconds that each is planned to take."""

    def __init__(self, total: float, on_progress: Progress):
        self.total, self.on_progress = total, on_progress
        self.label, self.before, self.seconds = "", 0.0, 0.0

    def begin(self, label: str, seconds: float) -> None:
        self.label, self.before, self.seconds = label, self.before + self.seconds, seconds

    def __call__(self, done: float) -> None:
        self.on_progress(self.label, (self.before + done * self.seconds) / self.total)


def _first_of_each_stage(model: nn.Module) -> list[tuple[str, IdleBlock]]:
    """Name and module of the first idle block of each keep ratio; none in a pyramid, whose blocks see a grid.

    Their floor is no dense block on fewer tokens.
    """
    stages: dict[float, tuple[str, IdleBlock]] = {}
    for name, block in idle_blocks(model).items():
        if block.form.sequence:
            stages.setdefault(block.keep, (name, block))
    return list(stages.values())
