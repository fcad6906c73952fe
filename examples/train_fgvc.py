"""Train a fine-grained classifier with and without CWBR, and report what it did.

    python examples/train_fgvc.py --compare ce plain              # on the embedded glyphs
    python examples/train_fgvc.py --data birds/ --model timm:resnet50 --pretrained \\
        --method plain --sampler pk --lr 0.01 --epochs 30          # on a folder of images

The loop is in fgvc/training.py; the regularizer is in fgvc/methods.py.
"""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from fgvc import options as command_line
from fgvc.data import Folder, Glyphs, Images
from fgvc.evaluation import Evaluation, evaluate
from fgvc.interrupt import Interrupted, StopSignals
from fgvc.options import Options
from fgvc.report import Result, footnotes, table, write_csv, write_figure
from fgvc.training import Trainer

RESULT = "result.pt"


@contextmanager
def wrong_options() -> Iterator[None]:
    """What fails in here is the user's to mend: the message is enough."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def load_images(options: Options) -> Images:
    if options.data is None:
        return Glyphs(options.images_per_class, options.seed)
    return Folder(
        Path(options.data),
        options.image_size,
        options.images_per_class,
        options.workers,
        options.seed,
    )


def run_method(name: str, options: Options, images: Images, stop: StopSignals) -> Result:
    """Train and evaluate one method, or read its result if that was done already."""
    folder = Path(options.out) / name
    if (folder / RESULT).exists():
        stored = torch.load(folder / RESULT, weights_only=True)
        return Result(Evaluation(**stored.pop("evaluation")), **stored)
    with wrong_options():
        trainer = Trainer(name, options, images, folder, stop)
    trainer.train()
    print(f"{name}: evaluating", flush=True)
    evaluation = evaluate(
        trainer.backbone,
        images,
        trainer.device,
        stop.check,
        options.top_m,
        options.probe_images,
    )
    result = Result(evaluation, trainer.history, trainer.seconds, trainer.regularizer_time)
    torch.save(result._asdict() | {"evaluation": evaluation._asdict()}, folder / RESULT)
    return result


def report(results: dict[str, Result], images: Images, options: Options) -> None:
    out = Path(options.out)
    print("\n" + table(results) + "\n")
    for note in footnotes(results, images.class_names, options.top_m):
        print(textwrap.fill(note, 100, initial_indent="* ", subsequent_indent="  "))
    write_csv(results, out / "results.csv")
    written = "results.csv, log.csv and checkpoint.pt of each method"
    if write_figure(results, out / "report.png"):
        written = f"report.png, {written}"
    else:
        print("* No picture: that needs matplotlib (pip install matplotlib).")
    print(f"\nIn {out}: {written}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 128 + the signal that ended the run."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    options = command_line.parse(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with wrong_options():
        images = load_images(options)
    command_line.save(options)
    try:
        with StopSignals() as stop:
            results = {name: run_method(name, options, images, stop) for name in options.methods}
    except Interrupted as interruption:
        command = f"python {shlex.quote(sys.argv[0])} --resume --out {shlex.quote(options.out)}"
        print(f"\nStopped by {interruption}; all that was done is saved. Go on with\n    {command}")
        return 128 + interruption.signal_number
    report(results, images, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
