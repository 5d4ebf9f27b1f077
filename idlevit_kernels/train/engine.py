"""The training loop: steps, checkpoints, interruptions, evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..models import IdleViTForTraining, idle_blocks
from . import checkpoint
from .checkpoint import CheckpointError, isolated_random
from .data import Batch, Data, UnreadableImage, train_loader, val_loader
from .distributed import World
from .losses import IdleViTLoss
from .recipe import Recipe

log = logging.getLogger(__name__)

_MIXUP = 1  # tells the seed of mixup from those of images, which have an epoch and a position


@dataclasses.dataclass(frozen=True)
class Options:
    """What changes how a run goes but not where it ends.

    Attributes:
        output: directory of checkpoints; None writes nothing.
        workers: processes of each process that load images.
        checkpoint_steps: steps between checkpoints; there is one after each epoch as well.
        log_steps: steps between two looks at the losses; on a GPU each look waits for the device.
        val_epochs: epochs between two evaluations; the last epoch always has one.
        skip_unreadable: go on without images that cannot be read, instead of stopping.
        compile: run the model through torch.compile.
    """

    output: Path | None = None
    workers: int = 0
    checkpoint_steps: int | None = None
    log_steps: int = 10
    val_epochs: int = 1
    skip_unreadable: bool = False
    compile: bool = False


@dataclasses.dataclass(frozen=True)
class StepLog:
    """Means over all processes. ``losses`` are the parts by name, unweighted, and "total"."""

    step: int
    epoch: int
    steps: int  # of the whole run
    losses: dict[str, float]
    lr: float
    images_per_second: float  # over all processes


@dataclasses.dataclass(frozen=True)
class Score:
    """Accuracy in percent over ``images`` images, each counted once."""

    top1: float
    top5: float
    images: int
    unreadable: int


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite, or a weight did, which makes the next loss so."""


class Stopped(RuntimeError):
    """A signal ended the run at a step boundary; ``code`` is what a shell expects of a process so ended."""

    def __init__(self, number: int, saved: Path | None):
        self.code = 128 + number
        where = f"--resume auto goes on from {saved}" if saved else "nothing was saved"
        super().__init__(f"train: stopped by {signal.Signals(number).name}; {where}")


class Trainer:
    """Trains a model by a recipe. Everything that a resumed run needs is in ``state_dict``.

    Args:
        model: idle or dense; trained in place.
        teacher: the dense model to distil from; None where recipe.distill_weight is 0.
    ``on_log`` and ``on_epoch`` may be set; the first process calls them.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        data: Data,
        world: World | None = None,
        teacher: nn.Module | None = None,
        options: Options | None = None,
    ):
        from timm.data import Mixup
        from timm.loss import SoftTargetCrossEntropy
        from timm.optim import create_optimizer_v2
        from timm.scheduler import CosineLRScheduler
        from timm.utils import ModelEmaV3

        self.recipe, self.data = recipe, data
        self.on_log: Callable[[StepLog], None] = lambda row: None
        self.on_epoch: Callable[[list[dict[str, Any]], int], None] = lambda history, step: None
        self.world, self.options = world or World(), options or Options()
        device = self.world.device
        self.model = model.to(device)
        if recipe.freeze_embeddings:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.endswith(("cls_token", "pos_embed")))
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay)
        idles = bool(idle_blocks(model))
        cut_weight = recipe.cut_weight if idles and recipe.cut_kind != "none" else 0.0
        self.teacher = None
        if recipe.distill_weight and teacher is not None:
            self.teacher = IdleViTForTraining(teacher.to(device).eval().requires_grad_(False), cut="none")
        self._net: Any = IdleViTForTraining(model, cut=recipe.cut_kind if cut_weight else "none")
        if self.options.compile:
            self._net = torch.compile(self._net)
        if self.world.size > 1:
            ids = [device.index] if device.type == "cuda" else None
            self._net = DistributedDataParallel(self._net, device_ids=ids)
        self._mixup = None
        base: nn.Module = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        if recipe.mixes:  # makes soft targets, smoothed
            self._mixup = Mixup(
                recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=data.num_classes
            )
            base = SoftTargetCrossEntropy()
        self.criterion = IdleViTLoss(base, cut_weight, recipe.distill_weight if self.teacher is not None else 0.0)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = create_optimizer_v2(model, "adamw", lr=recipe.scaled_lr, weight_decay=recipe.weight_decay)
        self.loader, self.batches = train_loader(data, recipe, self.world, self.options.workers)
        self.val_loader = val_loader(data, 2 * self.batches.size, self.world, self.options.workers)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=self.steps,
            lr_min=recipe.min_lr,
            warmup_t=recipe.warmup_epochs * self.batches.steps,
            warmup_lr_init=recipe.min_lr,
            t_in_epochs=False,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.dtype == "float16")
        self.step = 0  # optimizer steps taken
        self.history: list[dict[str, Any]] = []  # a row for each epoch done
        self.unreadable = 0  # in training, over all processes
        self._sums: dict[str, float] = {}  # of the losses in this epoch
        self._pending: list[tuple[int, Tensor]] = []  # losses not yet looked at
        self._names: list[str] = []
        self._saved: Path | None = None
        self._saved_step = -1
        self._signal = 0

    @property
    def epoch(self) -> int:
        return self.step // self.batches.steps

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.recipe.epochs * self.batches.steps

    def state_dict(self) -> dict[str, Any]:
        """The same in every process; all must call it."""
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "num_classes": self.data.num_classes,
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,  # and so the sampler's epoch and position
            "random": self.world.gather(checkpoint.random_state()),
            "sums": self._sums,
            "history": self.history,
            "unreadable": self.unreadable,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["model_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history, self.unreadable = state["step"], state["history"], state["unreadable"]
        self._sums = state["sums"]
        if len(state["random"]) == self.world.size:
            checkpoint.set_random_state(state["random"][self.world.rank])
        else:
            log.warning(
                "%d processes go on with a run of %d: dropout draws anew", self.world.size, len(state["random"])
            )

    def resume(self, path: Path | None = None) -> bool:
        """Goes on from ``path``, or from the newest good checkpoint of the output directory; False if it has none.

        Raises:
            CheckpointError: there are checkpoints and none can be read, or they are of another recipe.
        """
        found: Any = None
        if self.world.first:  # the others may not see its disk
            try:
                if path is not None:
                    found = path, checkpoint.load(path)
                else:
                    assert self.options.output is not None
                    found = checkpoint.newest(self.options.output)
            except (CheckpointError, OSError) as error:
                found = error
        found = self.world.from_first(found)
        if isinstance(found, Exception):
            raise found
        if found is None:
            return False
        path, state = found
        differences = self.recipe.differences(state["recipe"])
        if differences:
            lines = "\n  ".join(differences)
            raise CheckpointError(
                f"train: {path} is of another recipe; choose another --output, or the same recipe:\n  {lines}"
            )
        self.load_state_dict(state)
        self._saved, self._saved_step = path, self.step
        return True

    def fit(self) -> list[dict[str, Any]]:
        """Trains from where it is to the end; returns a row for each epoch.

        Raises:
            NonFiniteLoss, UnreadableImage, Stopped: the last good checkpoint is kept, and the message says which.
            OSError: the last checkpoint could not be written.
        """
        with self._signals():
            while self.step < self.steps:
                self._train_epoch()
        return self.history

    def evaluate(self, model: nn.Module | None = None) -> Score:
        return evaluate(
            model or self.model, self.val_loader, self.world, self.recipe.dtype, self.options.skip_unreadable
        )

    def save(self) -> None:
        """Writes a checkpoint, if there is an output directory.

        A failure is told and the run goes on, as the checkpoint before is there; only at the end it is raised.

        Raises:
            NonFiniteLoss: a weight is not finite; such a checkpoint would be good for nothing.
        """
        if self.options.output is None or self._saved_step == self.step:
            return
        state = self.state_dict()
        bad = [name for name, value in state["model"].items() if not value.isfinite().all()]
        if bad:
            raise NonFiniteLoss(
                f"train: weights not finite after step {self.step}: {', '.join(bad[:3])}. {self._advice()}"
            )
        if self.world.first:
            try:
                self._saved = checkpoint.save(self.options.output, state, self.step)
            except OSError as error:
                kept = f"{self._saved} is kept" if self._saved else "there is none yet"
                log.error("no checkpoint at step %d: %s; %s, and the run goes on", self.step, error, kept)
                if self.step == self.steps:
                    raise
            else:
                self._saved_step = self.step
        self._saved, self._saved_step = self.world.from_first((self._saved, self._saved_step))

    def _train_epoch(self) -> None:
        first = self.step % self.batches.steps
        self.batches.epoch, self.batches.first_step = self.epoch, first
        epoch, begin = self.epoch, time.perf_counter()
        self._net.train()
        random = checkpoint.random_state()
        passes = iter(self.loader)
        checkpoint.set_random_state(random)  # whatever starting the workers drew
        self._clock, self._clock_step = time.perf_counter(), self.step
        for _ in range(first, self.batches.steps):
            batches = [next(passes) for _ in range(self.recipe.accumulate)]
            self._heed([name for batch in batches for name in batch.unreadable])
            self._step(batches)
            if len(self._pending) >= self.options.log_steps:
                self._look(epoch)
            every = self.options.checkpoint_steps
            if every and self.step % every == 0 and self.step % self.batches.steps:
                self._look(epoch)
                self.save()
        self._look(epoch)
        seconds = time.perf_counter() - begin
        due = self.step == self.steps or (epoch + 1) % self.options.val_epochs == 0
        score = self.evaluate() if due else Score(math.nan, math.nan, 0, 0)
        steps = self.batches.steps
        self.history.append(
            {
                "epoch": epoch,
                **{name: value / steps for name, value in self._sums.items()},
                "lr": self.optimizer.param_groups[0]["lr"],
                "top1": score.top1,
                "top5": score.top5,
                "images_per_second": (steps - first) * self.recipe.batch_size / seconds,
            }
        )
        self._sums = {}
        self.save()
        if self.world.first:
            self.on_epoch(self.history, self.step)

    def _step(self, batches: list[Batch]) -> None:
        """One optimizer step on the passes of this process."""
        recipe, device = self.recipe, self.world.device
        self.scheduler.step_update(self.step)
        logged: Tensor | None = None
        for i, batch in enumerate(batches):
            images = batch.images.to(device, non_blocking=True)
            targets: Any = batch.targets.to(device, non_blocking=True)
            if self._mixup is not None:
                with isolated_random(recipe.seed, self.step, _MIXUP):  # the same in every pass of the step
                    images, targets = self._mixup(images, targets)
            last = i + 1 == len(batches)
            alone = contextlib.nullcontext() if last or self.world.size == 1 else self._net.no_sync()
            with alone:
                with autocast(device, recipe.dtype):
                    teacher = None
                    if self.teacher is not None:
                        with torch.no_grad():
                            teacher = self.teacher(images)
                    total, parts = self.criterion(self._net(images), targets, teacher)
                self.scaler.scale(total / len(batches)).backward()
            self._names = [*parts, "total"]
            values = torch.stack([*(part.float() for part in parts.values()), total.detach().float()]) / len(batches)
            logged = values if logged is None else logged + values
        if recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)
        self.step += 1
        assert logged is not None
        self._pending.append((self.step, logged))

    def _look(self, epoch: int) -> None:
        """Waits for the losses of the steps since the last look, checks and logs them."""
        if not self._pending:
            return
        steps = [step for step, _ in self._pending]
        rows = self.world.sum(torch.stack([row for _, row in self._pending])) / self.world.size
        self._pending = []
        for step, row in zip(steps, rows.tolist(), strict=True):
            losses = dict(zip(self._names, row, strict=True))
            bad = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
            if bad:
                raise NonFiniteLoss(
                    f"train: loss not finite at step {step} (epoch {epoch}): {', '.join(bad)} of"
                    f" {', '.join(f'{name} = {value:.4g}' for name, value in losses.items())}. {self._advice()}"
                )
            for name, value in losses.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
        if self.world.first:
            now = time.perf_counter()
            speed = (self.step - self._clock_step) * self.recipe.batch_size / (now - self._clock)
            self._clock, self._clock_step = now, self.step
            lr = self.optimizer.param_groups[0]["lr"]
            for step, row in zip(steps, rows.tolist(), strict=True):
                self.on_log(StepLog(step, epoch, self.steps, dict(zip(self._names, row, strict=True)), lr, speed))

    def _advice(self) -> str:
        kept = f"{self._saved} is the last good checkpoint" if self._saved else "no checkpoint was written yet"
        return f"{kept}. A lower --lr, --clip-grad 1 or --dtype float32 may help."

    def _heed(self, unreadable: list[str]) -> None:
        """Signals and unreadable images, which all processes must answer at the same step."""
        for name in unreadable:
            log.warning("%s; skipped", name)
        flags = torch.zeros(2 + signal.NSIG)
        flags[0] = len(unreadable)
        flags[2 + self._signal] = 1
        flags = self.world.sum(flags)
        stop = int(flags[3:].argmax()) + 1 if flags[3:].any() else 0
        if flags[0] and not self.options.skip_unreadable:
            names = [name for names in self.world.gather(unreadable) for name in names]
            self._look(self.epoch)
            self.save()
            raise UnreadableImage(names)
        if stop:
            self._look(self.epoch)
            self.save()
            raise Stopped(stop, self._saved)
        self.unreadable += int(flags[0])

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run at the next step, with a checkpoint; a second one ends it at once."""

        before: dict[int, Any] = {}

        def note(number: int, frame: Any) -> None:
            self._signal = number
            signal.signal(number, before[number])

        if threading.current_thread() is threading.main_thread():  # which alone may set handlers
            before |= {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def autocast(device: torch.device, dtype: str) -> Any:
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def evaluate(
    model: nn.Module, loader: Any, world: World, dtype: str = "float32", skip_unreadable: bool = False
) -> Score:
    """Accuracy over the whole data set; each process takes its part, and each image counts once.

    Raises:
        UnreadableImage: unless they are skipped; then they count neither as right nor as wrong.
    """
    training = model.training
    model.eval()
    counts = torch.zeros(3, dtype=torch.float64)
    unreadable: list[str] = []
    with torch.inference_mode(), autocast(world.device, dtype):
        for batch in loader:
            unreadable += batch.unreadable
            if not len(batch.targets):
                continue
            logits = model(batch.images.to(world.device, non_blocking=True))
            ranked = logits.topk(min(5, logits.shape[-1])).indices.cpu() == batch.targets[:, None]
            counts += torch.tensor([ranked[:, 0].sum(), ranked.any(1).sum(), len(ranked)])
    model.train(training)
    right1, right5, images = world.sum(counts).tolist()
    names = [name for names in world.gather(unreadable) for name in names]
    if names and not skip_unreadable:
        raise UnreadableImage(names)
    if world.first:
        for name in names:
            log.warning("%s; left out of the score", name)
    return Score(100 * right1 / max(images, 1), 100 * right5 / max(images, 1), int(images), len(names))
