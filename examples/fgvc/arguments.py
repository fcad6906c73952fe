"""The command line of training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fgvc.listing import SPLIT_OFF
from fgvc.methods import MEANINGS, METHODS
from fgvc.models import SMALL_RESNET
from fgvc.options import CONFIG, MACHINE_OPTIONS, Options
from fgvc.readers import LAYOUTS

RANDAUGMENT = "rand-m9-mstd0.5-inc1"
SPLITS = f"""\
data:
  cub          CUB-200-2011 (or NABirds): train_test_split.txt
  aircraft     FGVC-Aircraft, its 100 variants: images_variant_train.txt, ..._val.txt, ..._test.txt
  cars         Stanford Cars: devkit/ and cars_test_annos_withlabels.mat, or cars_annos.mat
  inaturalist  iNaturalist: train*.json; val*.json is the test part
  folders      one folder per class, in train/, val/ and test/ or without these
  A CSV file (--split-file) has the columns path, split (train, val or test) and perhaps class.
  The official split is used. A part that is missing, val of most, is split off train:
  {SPLIT_OFF:.0%} of each class's images, at least one, at random by --split-seed.
  Test images are never trained on, nor do they choose anything: the best checkpoint is the best
  one on val.
  Hidden files (._x.jpg) and files that are no images are ignored.

more processes:
  torchrun --nproc-per-node 4 examples/train_fgvc.py ...
  Each process takes its part of each batch: results do not depend on how many there are, except
  through batch normalization. With --mixup or --cutmix each has class means of its own.

other commands:
  python examples/train_fgvc.py evaluate RUN/cwbr/seed0/best.pt [--data DIR] [--part test]
  python examples/train_fgvc.py predict RUN/cwbr/seed0/best.pt IMAGE_OR_FOLDER ...
"""


def at_least(minimum: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {minimum}, got {text}"
            )
        return value

    return whole_number


def between(low: float, high: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low:g} to {high:g}, got {text}")
        return value

    return number


POSITIVE, NATURAL, SHARE = at_least(1), at_least(0), between(0, 1)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Train a fine-grained classifier with and without CWBR, and report accuracies, "
        "confusing pairs, distances and cost.",
        epilog=SPLITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _what(p.add_argument_group("what to train"))
    _data(p.add_argument_group("data"))
    _training(p.add_argument_group("training"))
    _output(p.add_argument_group("output"))
    return p


def _what(group: Any) -> None:
    which, add = group.add_mutually_exclusive_group(), group.add_argument
    which.add_argument(
        "--method", choices=METHODS, default="cwbr", help=f"{MEANINGS} (%(default)s)"
    )
    which.add_argument(
        "--compare", nargs="+", choices=METHODS, help="several, one after the other, same batches"
    )
    add(
        "--seeds",
        type=POSITIVE,
        default=1,
        help="trainings of each method, from --seed on; two "
        "or more give the differences' 95 %% intervals (%(default)s)",
    )
    add("--model", default=SMALL_RESNET, help="%(default)s, timm:NAME, torchvision:NAME or NAME")
    add("--pretrained", action="store_true", help="start from the published weights")
    add("--init", metavar="FILE", help="start from the weights in a file; those that fit are taken")
    add("--layers", nargs="+", metavar="NAME", help="dotted names (those that CWBR chooses)")
    add("--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile the model")
    add(
        "--top-m",
        type=POSITIVE,
        default=64,
        help="confused pairs of the published form, and of the measured distances (%(default)s)",
    )
    add("--backend", default="auto", help="see cwbr_fused.backends.explain() (%(default)s)")


def _data(group: Any) -> None:
    add = group.add_argument
    add("--data", metavar="DIR", help="root of a dataset, see below (the embedded glyphs)")
    add("--layout", choices=LAYOUTS, default="auto", help="of --data (by the files there)")
    add("--split-file", metavar="FILE", help="CSV: which image is in which part, see below")
    add("--split-seed", type=NATURAL, default=0, help="of the parts split off (%(default)s)")
    add("--image-size", type=POSITIVE, default=224, help="pixels, with --data (%(default)s)")
    add("--images-per-class", type=POSITIVE, help="to train on (15 for the glyphs, else all)")
    add(
        "--corrupt",
        choices=("skip", "stop"),
        default="skip",
        help="at an unreadable image: name and skip it, or stop (%(default)s)",
    )
    add(
        "--randaugment",
        nargs="?",
        const=RANDAUGMENT,
        metavar="POLICY",
        help=f"timm's RandAugment ({RANDAUGMENT})",
    )
    add("--erase", type=SHARE, default=0.0, help="chance of random erasing (%(default)s)")
    add(
        "--min-crop",
        type=between(0.01, 1),
        default=0.08,
        help="least area of the random crop (%(default)s)",
    )
    add(
        "--sampler",
        choices=("shuffle", "pk"),
        default="shuffle",
        help="ordinary batches, or P classes with K images each (%(default)s)",
    )
    add(
        "--batch-size",
        type=POSITIVE,
        default=128,
        help="images per step, of all processes together (%(default)s)",
    )
    add("--classes-per-batch", type=POSITIVE, default=32, help="P of pk (%(default)s)")
    add("--samples-per-class", type=POSITIVE, default=4, help="K of pk (%(default)s)")
    add("--workers", type=NATURAL, default=0, help="processes that read images (%(default)s)")


def _training(group: Any) -> None:
    length, add = group.add_mutually_exclusive_group(), group.add_argument
    length.add_argument("--epochs", type=POSITIVE, default=16, help="(%(default)s)")
    length.add_argument("--steps", type=POSITIVE, help="in place of --epochs")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="(%(default)s)")
    add("--lr", type=float, help="(0.1 for sgd, 0.001 for adamw)")
    add("--head-lr", type=float, help="of the classifier (--lr)")
    add(
        "--weight-decay",
        type=float,
        help="(0.0005 for sgd, 0.05 for adamw, which spares biases and norms)",
    )
    add("--warmup", type=NATURAL, metavar="STEPS", help="before the cosine (a twentieth)")
    add("--clip", type=float, metavar="NORM", help="longest gradient (no limit)")
    add(
        "--accumulate",
        type=POSITIVE,
        default=1,
        help="passes over parts of each batch, to fit memory (%(default)s)",
    )
    add("--amp", choices=("none", "bf16", "fp16"), default="none", help="(%(default)s)")
    add("--label-smoothing", type=SHARE, default=0.0, help="(%(default)s)")
    add("--mixup", type=float, default=0.0, metavar="ALPHA", help="timm's mixup (off)")
    add("--cutmix", type=float, default=0.0, metavar="ALPHA", help="timm's CutMix (off)")
    add("--mix-prob", type=SHARE, default=1.0, help="share of mixed batches (%(default)s)")
    add("--ema", type=SHARE, metavar="DECAY", help="evaluate averaged weights, by timm (off)")
    add("--seed", type=NATURAL, default=0, help="(%(default)s)")
    add("--device", default="auto", help="(a GPU if there is one, else the CPU)")
    add("--threads", type=POSITIVE, help="of the CPU (as many as torch chooses)")


def _output(group: Any) -> None:
    add = group.add_argument
    add("--out", metavar="DIR", help="folder of the run (runs/DATA-METHODS-seedN)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--log-every", type=POSITIVE, default=10, help="steps between log lines (%(default)s)")
    add(
        "--val-every",
        type=NATURAL,
        default=5,
        help="epochs between validations, with one at the end; 0: that one only (%(default)s)",
    )
    add(
        "--probe-images",
        type=POSITIVE,
        default=10_000,
        help="training images for the linear probe (%(default)s)",
    )
    add("--tensorboard", action="store_true", help="also write TensorBoard events")


def parse(argv: Sequence[str] | None) -> tuple[Options, bool]:
    """The options, and whether they go on with a run; then those of the run may be left out."""
    p = parser()
    args = _with_methods(vars(p.parse_args(argv)))
    if not args.pop("resume"):
        if args["data"] is None:
            for name in ("randaugment", "split_file"):
                if args[name] is not None:
                    p.error(f"--{name.replace('_', '-')} needs --data")
            args["images_per_class"] = args["images_per_class"] or 15
        data = "glyphs" if args["data"] is None else Path(args["data"]).resolve().name
        args["out"] = args["out"] or f"runs/{data}-{'-'.join(args['methods'])}-seed{args['seed']}"
        return Options(**args), False

    if args["out"] is None:
        p.error("--resume needs --out, the folder of the run")
    config = Path(args["out"]) / CONFIG
    if not config.is_file():
        p.error(f"--resume: there is no run in {args['out']} ({config} is missing)")
    stored = json.loads(config.read_text())
    given = _given(p, argv)
    for name, value in given.items():
        if name not in MACHINE_OPTIONS and value != stored[name]:
            option = name.replace("_", "-")
            p.error(f"--resume: --{option} was {stored[name]} in this run, not {value}")
    return Options(**stored | given), True


def _given(p: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """The options that are on the command line."""
    # What is in the namespace before parsing gets no default.
    unset = object()
    names = vars(p.parse_args([]))
    parsed = p.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    given = _with_methods({n: v for n, v in vars(parsed).items() if v is not unset})
    del given["resume"]
    return given


def _with_methods(args: dict[str, Any]) -> dict[str, Any]:
    """--method NAME and --compare NAMES as one list of methods, where there is one."""
    method, compare = args.pop("method", None), args.pop("compare", None)
    names = compare or ([] if method is None else [method])
    return args | ({"methods": list(dict.fromkeys(names))} if names else {})
