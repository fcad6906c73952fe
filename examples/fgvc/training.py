"""The training loop and its checkpoints."""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cwbr_fused import PKSampler, backends
from cwbr_fused.diagnostics import layer_overlaps
from fgvc.data import Images, ShuffledBatches, make_sampler
from fgvc.evaluation import predict
from fgvc.interrupt import Interrupted, StopSignals
from fgvc.log import Log, Row
from fgvc.methods import METHODS, CrossEntropy, Setting
from fgvc.models import Backbone, default_layers, make_model
from fgvc.options import Options

CHECKPOINT = "checkpoint.pt"
COLUMNS = (
    "epoch",
    "step",
    "lr",
    "loss",
    "cross_entropy",
    "accuracy",
    "regularizer",
    "scale",
    "val_accuracy",
)


def learning_rate_factor(step: int, total: int) -> float:
    """Linear warm-up over the first twentieth, then half a cosine to zero."""
    warmup = max(1, total // 20)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def pick_device(name: str) -> torch.device:
    """The device of that name; for "auto" a GPU if there is one."""
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


class Trainer:
    """One method's run in a folder: `train` starts it, or goes on from its checkpoint."""

    def __init__(
        self, name: str, options: Options, images: Images, folder: Path, stop: StopSignals
    ) -> None:
        self.options, self.images, self.folder, self.stop = options, images, folder, stop
        self.name = name
        self.device = pick_device(options.device)
        backends.resolve(options.backend, self.device.type)
        torch.manual_seed(options.seed)
        classes = len(images.class_names)
        model = make_model(options.model, classes, images.channels, options.pretrained)
        model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.backbone = Backbone(model, options.layers or default_layers(model))
        layers = tuple(self.backbone.layers)
        pool = self.backbone.pool_one
        setting = Setting(classes, layers, pool, options.top_m, options.backend)
        self.method = METHODS[name](setting).to(self.device)
        self.sampler: PKSampler | ShuffledBatches = make_sampler(
            options.sampler,
            images.train_targets,
            options.batch_size,
            options.classes_per_batch,
            options.samples_per_class,
            options.seed,
        )
        self.total = options.steps or options.epochs * len(self.sampler)
        self.optimizer = _optimizer(options, nn.ModuleList([model, self.method]))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, self.total)
        )
        self.step = 0
        self.seconds = 0.0
        self.regularizer_seconds: list[float] = []
        self.history: list[Row] = []

    def train(self) -> None:
        """Train to the last step.

        Raises:
            Interrupted: after saving a checkpoint.
        """
        if (self.folder / CHECKPOINT).exists():
            self.load()
        self.folder.mkdir(parents=True, exist_ok=True)
        title = f"{self.name} on {self.images.name}"
        columns = (*COLUMNS, *(f"rho {name}" for name in self.backbone.layers))
        board = self.options.tensorboard
        with Log(self.folder, title, columns, self.history, self.step, self.total, board) as log:
            try:
                while True:
                    self._validate(log)
                    self.save()
                    if self.step >= self.total:
                        return
                    self._train_epoch(log)
            except Interrupted:
                self.save()
                raise

    @property
    def regularizer_time(self) -> float:
        """Seconds that the regularizer took in all steps, from those it was measured at."""
        measured = self.regularizer_seconds
        return statistics.median(measured) * self.step if measured else 0.0

    def _train_epoch(self, log: Log) -> None:
        """The rest of the current epoch."""
        epoch, done = divmod(self.step, len(self.sampler))
        self.sampler.set_epoch(epoch)
        stop = min(len(self.sampler), done + self.total - self.step)
        self.backbone.model.train()
        self.method.train()
        started = time.perf_counter()
        for images, targets in self.images.train(islice(self.sampler, done, stop), epoch):
            images = images.to(self.device, memory_format=torch.channels_last)
            targets = targets.to(self.device)
            logits, features = self.backbone(images)
            ce = cross_entropy(logits, targets)
            terms = self.method(features, logits, targets, ce)
            self.optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            rate = self.schedule.get_last_lr()[0]
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
            if self.step % self.options.log_every == 0 or self.step == self.total:
                values: Row = {
                    "lr": float(rate),
                    "loss": terms.total.item(),
                    "cross_entropy": ce.item(),
                    "accuracy": float((logits.argmax(1) == targets).float().mean()),
                    "regularizer": terms.regularizer.item(),
                    "scale": terms.scale.item(),
                }
                self.seconds += time.perf_counter() - started
                values |= self._overlaps(features, logits, targets)
                if not isinstance(self.method, CrossEntropy):
                    spent = self._time_regularizer(features, logits, targets, ce)
                    self.regularizer_seconds.append(spent)
                self.history.append({"epoch": epoch + 1, "step": self.step, **values})
                log.write(self.history[-1])
                started = time.perf_counter()
            log.advance()
            if self.stop.received is not None:
                break
        self._synchronize()
        self.seconds += time.perf_counter() - started
        self.stop.check()

    def _overlaps(self, features: Mapping[str, Tensor], logits: Tensor, targets: Tensor) -> Row:
        pooled = self.backbone.pool({name: z.detach() for name, z in features.items()})
        top_m, backend = self.options.top_m, self.options.backend
        overlaps = layer_overlaps(pooled, logits, targets, top_m=top_m, backend=backend)
        return {f"rho {name}": float(rho) for name, rho in overlaps.items()}

    def _time_regularizer(
        self, features: Mapping[str, Tensor], logits: Tensor, targets: Tensor, ce: Tensor
    ) -> float:
        """Seconds of the method alone, pooling, forward, backward and tensor hooks.

        It runs on copies of this step's features and of the method, and leaves no trace.
        """
        leaves = {name: z.detach().requires_grad_() for name, z in features.items()}
        ce, method = ce.detach().requires_grad_(), copy.deepcopy(self.method)
        self._synchronize()
        started = time.perf_counter()
        total = method(leaves, logits.detach(), targets, ce).total
        torch.stack([total, *(z.sum() for z in leaves.values())]).sum().backward()
        self._synchronize()
        return time.perf_counter() - started

    def _validate(self, log: Log) -> None:
        """At the end of every `val_every`-th epoch, unless it is done already."""
        epoch, position = divmod(self.step, len(self.sampler))
        every = self.options.val_every
        due = every > 0 and epoch > 0 and position == 0 and epoch % every == 0
        if not due or (self.history and "val_accuracy" in self.history[-1]):
            return
        outputs = predict(self.backbone, self.images.plain("val"), self.device, self.stop.check)
        accuracy = float((outputs.logits.argmax(1) == outputs.targets).float().mean())
        self.history.append({"epoch": epoch, "step": self.step, "val_accuracy": accuracy})
        log.write(self.history[-1])

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.backbone.model,
            "method": self.method,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }

    def save(self) -> None:
        """Write the checkpoint; a crash while writing leaves the previous one."""
        state = {name: part.state_dict() for name, part in self._state().items()}
        state |= {
            "step": self.step,
            "seconds": self.seconds,
            "regularizer_seconds": self.regularizer_seconds,
            "history": self.history,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }
        partial = self.folder / f"{CHECKPOINT}.partial"
        torch.save(state, partial)
        os.replace(partial, self.folder / CHECKPOINT)

    def load(self) -> None:
        """Go back to the state of the checkpoint."""
        state = torch.load(self.folder / CHECKPOINT, map_location=self.device, weights_only=True)
        for name, part in self._state().items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        self.regularizer_seconds, self.history = state["regularizer_seconds"], state["history"]
        torch.set_rng_state(state["rng"].cpu())
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda_rng"]])


def _optimizer(options: Options, module: nn.Module) -> torch.optim.Optimizer:
    sgd = options.optimizer == "sgd"
    lr, decay = (0.1, 5e-4) if sgd else (1e-3, 0.05)
    lr = lr if options.lr is None else options.lr
    decay = decay if options.weight_decay is None else options.weight_decay
    if sgd:
        return torch.optim.SGD(
            module.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=decay
        )
    return torch.optim.AdamW(module.parameters(), lr, weight_decay=decay)
