"""What a run was asked for, and what is remembered of that with the run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CONFIG = "config.json"
# These may change when a run is resumed; they do not change its numbers.
MACHINE_OPTIONS = ("out", "device", "threads", "workers", "tensorboard")


@dataclass(frozen=True)
class Options:
    """See `python examples/train_fgvc.py --help`, whose options have these names."""

    methods: list[str]
    data: str | None
    layout: str
    split_file: str | None
    split_seed: int
    image_size: int
    images_per_class: int | None
    randaugment: str | None
    erase: float
    min_crop: float
    corrupt: str
    model: str
    pretrained: bool
    init: str | None
    layers: list[str] | None
    compile: str | None
    sampler: str
    batch_size: int
    classes_per_batch: int
    samples_per_class: int
    accumulate: int
    epochs: int
    steps: int | None
    optimizer: str
    lr: float | None
    head_lr: float | None
    weight_decay: float | None
    warmup: int | None
    clip: float | None
    label_smoothing: float
    mixup: float
    cutmix: float
    mix_prob: float
    ema: float | None
    amp: str
    top_m: int
    backend: Literal["auto", "cpu", "cuda", "triton", "reference"]
    seed: int
    seeds: int
    log_every: int
    val_every: int
    probe_images: int
    out: str
    device: str
    threads: int | None
    workers: int
    tensorboard: bool

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that targets are shares of classes."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def all_seeds(self) -> Sequence[int]:
        return range(self.seed, self.seed + self.seeds)

    def folder(self, method: str, seed: int) -> Path:
        """Where one method's training with one seed is kept."""
        return Path(self.out) / method / f"seed{seed}"


def unused(options: Options) -> Options:
    """With a number after `out` if that holds a run already: no run is ever overwritten."""
    out = Path(options.out)
    candidate, number = out, 2
    while (candidate / CONFIG).exists():
        candidate, number = out.with_name(f"{out.name}-{number}"), number + 1
    if candidate != out:
        print(f"{out} holds a run already; this one goes to {candidate}")
    return dataclasses.replace(options, out=str(candidate))


def save(options: Options) -> None:
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).write_text(json.dumps(dataclasses.asdict(options), indent=2) + "\n")
