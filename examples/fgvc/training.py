"""The training loop and its checkpoints."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from cwbr_fused import backends
from cwbr_fused.inputs.stages import default_layers
from fgvc.data import Batch, Images
from fgvc.distances import confused_distances
from fgvc.evaluation import Scores, validate
from fgvc.interrupt import Interrupted, StopSignals
from fgvc.log import Log, Row, Silent
from fgvc.methods import METHODS, Method, Setting
from fgvc.models import Backbone, load_weights, make_model, pooling
from fgvc.optimization import Mix, Optimization, make_average
from fgvc.options import Options
from fgvc.processes import Processes
from fgvc.sampling import Schedule, make_batches

CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"
COLUMNS = ("epoch", "step", "lr", "loss", "cross_entropy", "accuracy")
VALIDATION = ("val top-1", "val top-5", "val class")


class Pass(NamedTuple):
    """A forward and backward pass over (a part of) a batch, for the log."""

    features: dict[str, Tensor]
    logits: Tensor
    targets: Tensor
    ce: Tensor
    total: Tensor
    logged: dict[str, Tensor]


class Trainer:
    """One method's run in a folder: `train` starts it, or goes on from its checkpoint."""

    def __init__(
        self,
        name: str,
        options: Options,
        images: Images,
        folder: Path,
        stop: StopSignals,
        processes: Processes,
    ) -> None:
        self.name, self.options, self.images, self.folder = name, options, images, folder
        self.stop, self.processes, self.device = stop, processes, processes.device
        backends.resolve(options.backend, self.device.type)
        torch.manual_seed(options.seed)
        self.model = self._model()
        # Before the hooks of the catcher come, which are not to be copied.
        self.average = make_average(options, self.model)
        layers = options.layers or default_layers(self.model)
        self.method = self._method(layers).to(self.device)
        self.backbone = Backbone(self.model, layers, self.method.catch)
        self.evaluated = (
            self.backbone if self.average is None else Backbone(self.average.module, layers)
        )
        self._wrap()
        batches = make_batches(options, images.train_targets)
        self.schedule = Schedule(batches, processes.rank, processes.count)
        self.loader = images.train(self.schedule, options.seed)
        self.total = options.steps or options.epochs * len(batches)
        self.optimization = Optimization(options, self.model, self.total, self.device)
        self.mix = (
            Mix(options, len(images.class_names), options.seed, processes.rank)
            if options.mixes
            else None
        )
        # Each process has its own dropout; the weights are those of the first one.
        torch.manual_seed(options.seed + processes.rank)
        self.step = 0
        self.best = -1.0
        self.seconds = 0.0
        self.method_seconds: list[float] = []
        self.history: list[Row] = []

    def _model(self) -> nn.Module:
        options, images = self.options, self.images
        model = make_model(
            options.model,
            len(images.class_names),
            images.channels,
            options.image_size,
            options.pretrained,
        )
        if options.init is not None:
            taken = load_weights(model, Path(options.init))
            if self.processes.first:
                print(f"{self.name}: {taken}", flush=True)
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def _method(self, layers: list[str]) -> Method:
        setting = Setting(
            len(self.images.class_names),
            tuple(layers),
            pooling(self.model),
            self.options.top_m,
            self.options.backend,
            # CWBR shares its class means between processes where targets are classes.
            shared=self.processes.count > 1 and not self.options.mixes,
        )
        return METHODS[self.name](setting)

    def _wrap(self) -> None:
        """Compiles the model in place, and has its gradients averaged over the processes."""
        if self.options.compile is not None:
            self.model.compile(backend=self.options.compile)
        self.parallel: DistributedDataParallel | None = None
        if self.processes.count > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, device_ids=ids)
            self.backbone.run = self.parallel

    def train(self) -> None:
        """Train to the last step.

        Raises:
            Interrupted: after saving a checkpoint.
        """
        if self.processes.first:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.processes.wait()
        if (self.folder / CHECKPOINT).exists():
            self.load()
        with self._log() as log:
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

    def _log(self) -> Log | Silent:
        if not self.processes.first:
            return Silent()
        distances = (f"distance {layer}" for layer in self.backbone.layers)
        columns = (*COLUMNS, *self.method.columns, *distances, *VALIDATION)
        title = f"{self.name} on {self.images.name}"
        board = self.options.tensorboard
        return Log(self.folder, title, columns, self.history, self.step, self.total, board)

    @property
    def method_time(self) -> float:
        """Seconds that the method took in all steps, from those it was measured at."""
        measured = self.method_seconds
        return statistics.median(measured) * self.step if measured else 0.0

    def _train_epoch(self, log: Log | Silent) -> None:
        """The rest of the current epoch."""
        self.schedule.start(self.step, self.total)
        self.model.train()
        self.method.train()
        started = time.perf_counter()
        try:
            for batch in self.loader:
                rate = self.optimization.rate
                done = self._gradients(*self._inputs(batch))
                self.optimization.step()
                if self.average is not None:
                    self.average.update(self.model, self.step)
                self.step += 1
                log.advance()
                if self.step % self.options.log_every == 0 or self.step == self.total:
                    row = self._row(done, rate)
                    self.seconds += time.perf_counter() - started
                    self.history.append(row | self._measured(done))
                    log.write(self.history[-1])
                    started = time.perf_counter()
                    self._check_together()
                elif self.processes.count == 1:
                    self.stop.check()
            self._check_together()
        finally:
            self._synchronize()
            self.seconds += time.perf_counter() - started

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = batch.images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        targets = batch.targets.to(self.device, non_blocking=True)
        return (images, targets) if self.mix is None else self.mix(images, targets, self.step)

    def _gradients(self, images: Tensor, targets: Tensor) -> Pass:
        """Forward and backward over the batch, in parts where that was asked for; the last one."""
        parts = min(self.options.accumulate, len(images))
        for k, (x, y) in enumerate(
            zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True)
        ):
            waits = self.parallel is not None and k + 1 < parts
            with self.parallel.no_sync() if self.parallel and waits else nullcontext():
                with self.optimization.autocast():
                    logits, features = self.backbone(x)
                    smoothing = self.options.label_smoothing
                    ce = cross_entropy(logits.float(), y, label_smoothing=smoothing)
                    total, logged = self.method(features, logits, y, ce)
                self.optimization.backward(total * (len(x) / len(images)))
        return Pass(features, logits.detach(), y, ce.detach(), total.detach(), logged)

    def _row(self, done: Pass, rate: float) -> Row:
        """What the log shows of a step; waits for the device."""
        labels = done.targets if done.targets.dim() == 1 else done.targets.argmax(1)
        return {
            "epoch": self.schedule.epoch + 1,
            "step": self.step,
            "lr": rate,
            "loss": done.total.item(),
            "cross_entropy": done.ce.item(),
            "accuracy": float((done.logits.argmax(1) == labels).float().mean()),
            **{name: value.item() for name, value in done.logged.items()},
            **self.method.after_backward(),
        }

    def _measured(self, done: Pass) -> Row:
        """What is measured beside the training: it costs time, and leaves no trace."""
        if type(self.method) is not Method:
            self.method_seconds.append(self._time_method(done))
        labels = done.targets if done.targets.dim() == 1 else done.targets.argmax(1)
        pooled = self.backbone.pool({name: z.detach() for name, z in done.features.items()})
        distances = confused_distances(pooled, done.logits.float(), labels, self.options.top_m)
        return {f"distance {layer}": distance for layer, distance in distances.items()}

    def _time_method(self, done: Pass) -> float:
        """Seconds of the method alone, pooling, forward, backward and tensor hooks.

        It runs on copies of this step's features and of the method.
        """
        leaves = {name: z.detach().requires_grad_() for name, z in done.features.items()}
        ce = done.ce.clone().requires_grad_()
        method = self._method(self.backbone.layers).to(self.device)
        method.load_state_dict(self.method.state_dict())
        self._synchronize()
        started = time.perf_counter()
        total = method(leaves, done.logits, done.targets, ce).total
        torch.stack([total, *(z.float().sum() for z in leaves.values())]).sum().backward()
        self._synchronize()
        return time.perf_counter() - started

    def _check_together(self) -> None:
        """Raises `Interrupted` in all processes if a signal has reached one of them."""
        for number in self.processes.gather(self.stop.received):
            if number is not None:
                raise Interrupted(number)

    def _validate(self, log: Log | Silent) -> None:
        """At the end of every `val_every`-th epoch and of the training, unless it is done."""
        epoch, position = divmod(self.step, len(self.schedule))
        every = self.options.val_every
        due = every > 0 and epoch > 0 and position == 0 and epoch % every == 0
        if not (due or self.step >= self.total) or self._validated():
            return
        present = self.images.classes_of("val")
        scores = Scores(len(self.images.class_names), present, self.device, together=True)
        mine = self.images.plain("val", rank=self.processes.rank, processes=self.processes.count)
        # A signal ends one process only, so with several it has to wait for the next log line.
        check = self.stop.check if self.processes.count == 1 else lambda: None
        found = validate(self.evaluated, mine, scores, self.device, check)
        row: Row = {"epoch": epoch, "step": self.step}
        self.history.append(row | {f"val {name}": score for name, score in found.items()})
        log.write(self.history[-1])
        if found["top-1"] > self.best:
            self.best = found["top-1"]
            self._save_best(found)

    def _validated(self) -> bool:
        last = self.history[-1] if self.history else {}
        return "val top-1" in last and last["step"] == self.step

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _save_best(self, scores: Mapping[str, float]) -> None:
        """All that `evaluate` and `predict` need."""
        self._write(
            BEST,
            {
                "model": self.evaluated.model.state_dict(),
                "method": self.name,
                "options": dataclasses.asdict(self.options),
                "class_names": self.images.class_names,
                "channels": self.images.channels,
                "layers": self.backbone.layers,
                "step": self.step,
                "scores": dict(scores),
            },
        )

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "method": self.method, "optimization": self.optimization}
        return parts | ({} if self.average is None else {"average": self.average})

    def save(self) -> None:
        """Write the checkpoint."""
        generators = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        state: dict[str, Any] = {name: p.state_dict() for name, p in self._parts().items()}
        state |= {
            "step": self.step,
            "best": self.best,
            "seconds": self.seconds,
            "method_seconds": self.method_seconds,
            "history": self.history,
            "rng": self.processes.gather(generators),
        }
        self._write(CHECKPOINT, state)

    def _write(self, name: str, state: dict[str, Any]) -> None:
        """By the first process alone. A crash while writing leaves the previous file."""
        if self.processes.first:
            partial = self.folder / f"{name}.partial"
            torch.save(state, partial)
            os.replace(partial, self.folder / name)

    def load(self) -> None:
        """Go back to the state of the checkpoint."""
        state = torch.load(self.folder / CHECKPOINT, map_location=self.device, weights_only=True)
        if len(state["rng"]) != self.processes.count:
            raise ValueError(
                f"--resume: this run has {len(state['rng'])} processes, not {self.processes.count}"
            )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self.method_seconds, self.history = state["method_seconds"], state["history"]
        cpu, cuda = state["rng"][self.processes.rank]
        torch.set_rng_state(cpu.cpu())
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all([s.cpu() for s in cuda])
