"""The command line, and what is remembered of it with a run."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgvc.methods import METHODS
from fgvc.models import SMALL_RESNET

CONFIG = "config.json"
# These may change when a run is resumed; they do not change its numbers.
MACHINE_OPTIONS = ("out", "device", "threads", "workers", "tensorboard")


@dataclass(frozen=True)
class Options:
    """See `python examples/train_fgvc.py --help`."""

    methods: list[str]
    data: str | None
    image_size: int
    images_per_class: int | None
    model: str
    pretrained: bool
    layers: list[str] | None
    sampler: str
    batch_size: int
    classes_per_batch: int
    samples_per_class: int
    epochs: int
    steps: int | None
    optimizer: str
    lr: float | None
    weight_decay: float | None
    top_m: int
    backend: str
    seed: int
    log_every: int
    val_every: int
    probe_images: int
    out: str
    device: str
    threads: int | None
    workers: int
    tensorboard: bool


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text}")
    return value


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Train a fine-grained classifier with and without the regularizer, and report "
        "accuracy, confusing pairs, overlaps and cost.",
    )
    what = p.add_argument_group("what to train")
    which = what.add_mutually_exclusive_group()
    which.add_argument("--method", choices=METHODS, default="cwbr", help="objective (%(default)s)")
    which.add_argument(
        "--compare", nargs="+", choices=METHODS, help="several, one after the other, same batches"
    )
    what.add_argument(
        "--model", default=SMALL_RESNET, help="%(default)s, timm:NAME, torchvision:NAME or NAME"
    )
    what.add_argument("--pretrained", action="store_true", help="start from published weights")
    what.add_argument(
        "--layers", nargs="+", metavar="NAME", help="dotted names (the last three stages)"
    )
    what.add_argument(
        "--top-m", type=_positive, default=64, help="confused pairs per batch (%(default)s)"
    )
    what.add_argument(
        "--backend", default="auto", help="see cwbr_fused.backends.explain() (%(default)s)"
    )

    data = p.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="images, one folder per class (the glyphs)")
    data.add_argument(
        "--image-size", type=_positive, default=224, help="pixels, with --data (%(default)s)"
    )
    data.add_argument("--images-per-class", type=_positive, help="(15 for the glyphs, else all)")
    data.add_argument(
        "--sampler",
        choices=("shuffle", "pk"),
        default="shuffle",
        help="ordinary batches, or P classes with K images each (%(default)s)",
    )
    data.add_argument("--batch-size", type=_positive, default=128, help="of shuffle (%(default)s)")
    data.add_argument(
        "--classes-per-batch", type=_positive, default=32, help="P of pk (%(default)s)"
    )
    data.add_argument(
        "--samples-per-class", type=_positive, default=4, help="K of pk (%(default)s)"
    )

    train = p.add_argument_group("training")
    length = train.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_positive, default=16, help="(%(default)s)")
    length.add_argument("--steps", type=_positive, help="in place of --epochs")
    train.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="(%(default)s)")
    train.add_argument("--lr", type=float, help="(0.1 for sgd, 0.001 for adamw)")
    train.add_argument("--weight-decay", type=float, help="(0.0005 for sgd, 0.05 for adamw)")
    train.add_argument("--seed", type=_natural, default=0, help="(%(default)s)")
    train.add_argument("--device", default="auto", help="(a GPU if there is one, else the CPU)")
    train.add_argument("--threads", type=_positive, help="of the CPU (as many as torch chooses)")
    train.add_argument(
        "--workers", type=_natural, default=0, help="processes that read images (%(default)s)"
    )

    out = p.add_argument_group("output")
    out.add_argument("--out", metavar="DIR", help="folder of the run (runs/DATA-METHODS-seedN)")
    out.add_argument("--resume", action="store_true", help="go on with the run in --out")
    out.add_argument(
        "--log-every", type=_positive, default=10, help="steps between log lines (%(default)s)"
    )
    out.add_argument(
        "--val-every",
        type=_natural,
        default=5,
        help="epochs between validations; 0: none while training (%(default)s)",
    )
    out.add_argument(
        "--probe-images",
        type=_positive,
        default=10_000,
        help="training images for the linear probe (%(default)s)",
    )
    out.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events")
    return p


def parse(argv: Sequence[str] | None) -> Options:
    """The options; with --resume those of the run, which then may be left out."""
    p = parser()
    args = _with_methods(vars(p.parse_args(argv)))
    if not args.pop("resume"):
        if args["images_per_class"] is None and args["data"] is None:
            args["images_per_class"] = 15
        data = "glyphs" if args["data"] is None else Path(args["data"]).resolve().name
        default = f"runs/{data}-{'-'.join(args['methods'])}-seed{args['seed']}"
        args["out"] = str(_unused(Path(args["out"] or default)))
        return Options(**args)

    if args["out"] is None:
        p.error("--resume needs --out, the folder of the run")
    config = Path(args["out"]) / CONFIG
    if not config.is_file():
        p.error(f"--resume: there is no run in {args['out']} ({config} is missing)")
    stored = json.loads(config.read_text())
    # What is in the namespace before parsing gets no default: this leaves the options given.
    unset = object()
    names = vars(p.parse_args([]))
    parsed = p.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    given = _with_methods({n: v for n, v in vars(parsed).items() if v is not unset})
    del given["resume"]
    for name, value in given.items():
        if name not in MACHINE_OPTIONS and value != stored[name]:
            option = name.replace("_", "-")
            p.error(f"--resume: --{option} was {stored[name]} in this run, not {value}")
    return Options(**stored | given)


def _with_methods(args: dict[str, Any]) -> dict[str, Any]:
    """--method NAME and --compare NAMES as one list of methods, where there is one."""
    method, compare = args.pop("method", None), args.pop("compare", None)
    names = compare or ([] if method is None else [method])
    return args | ({"methods": list(dict.fromkeys(names))} if names else {})


def _unused(out: Path) -> Path:
    """`out`, or with a number after it if it holds a run already: no run is ever overwritten."""
    candidate, number = out, 2
    while (candidate / CONFIG).exists():
        candidate, number = out.with_name(f"{out.name}-{number}"), number + 1
    if candidate != out:
        print(f"{out} holds a run already; this one goes to {candidate}")
    return candidate


def save(options: Options) -> None:
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).write_text(json.dumps(dataclasses.asdict(options), indent=2) + "\n")
