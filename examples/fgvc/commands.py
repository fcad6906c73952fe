"""The commands of `train_fgvc.py`: train (and compare), evaluate, predict."""

from __future__ import annotations

import argparse
import csv
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from fgvc import arguments, datasets, options, trained
from fgvc.data import Images
from fgvc.evaluation import SCORES, evaluate
from fgvc.figure import write_figure, write_pairs
from fgvc.images import UnreadableImageError
from fgvc.interrupt import Interrupted, StopSignals
from fgvc.listing import PARTS
from fgvc.options import Options
from fgvc.processes import Processes, pick_device, started
from fgvc.report import footnotes, table
from fgvc.results import RESULT, Result, Results, read_result, write_csv, write_result
from fgvc.training import Trainer


@contextmanager
def wrong_options() -> Iterator[None]:
    """What fails in here is the user's to mend: the message is enough."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 128 + the signal that ended the run."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    words = list(sys.argv[1:] if argv is None else argv)
    command = {"evaluate": evaluate_checkpoint, "predict": predict_files}.get(
        words[0] if words else ""
    )
    try:
        return train(words) if command is None else command(words[1:])
    except UnreadableImageError as error:
        raise SystemExit(f"error: {error}") from error


def train(argv: Sequence[str]) -> int:
    """Train every method with every seed, and report."""
    asked, resumed = arguments.parse(argv)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    with wrong_options():
        device = pick_device(asked.device)
    with started(device) as processes, StopSignals() as stop:
        if not resumed:
            asked = processes.from_first(options.unused(asked) if processes.first else None)
        with wrong_options():
            images = datasets.load(asked, pin=device.type == "cuda")
        if processes.first:
            options.save(asked)
        try:
            results = run_all(asked, images, stop, processes)
        except Interrupted as interruption:
            if processes.first:
                print(_how_to_go_on(asked, interruption, processes))
            return 128 + interruption.signal_number
        if processes.first:
            report(results, images, asked)
    return 0


def _how_to_go_on(asked: Options, interruption: Interrupted, processes: Processes) -> str:
    start = "python" if processes.count == 1 else f"torchrun --nproc-per-node {processes.count}"
    command = f"{start} {shlex.quote(sys.argv[0])} --resume --out {shlex.quote(asked.out)}"
    return f"\nStopped by {interruption}; all that was done is saved. Go on with\n    {command}"


def run_all(
    asked: Options, images: Images, stop: StopSignals, processes: Processes
) -> dict[str, list[Result]]:
    """Seed by seed, so that what an interrupted comparison has done can be compared."""
    results: dict[str, list[Result]] = {name: [] for name in asked.methods}
    for seed in asked.all_seeds:
        for name in asked.methods:
            results[name] += run(name, replace(asked, seed=seed), images, stop, processes)
    return results


def run(
    name: str, asked: Options, images: Images, stop: StopSignals, processes: Processes
) -> list[Result]:
    """Train and evaluate one method, or read its result if that was done already.

    Returns:
        The result, in a list; an empty one in all processes but the first.
    """
    folder = asked.folder(name, asked.seed)
    if not processes.from_first((folder / RESULT).exists()):
        with wrong_options():
            trainer = Trainer(name, asked, images, folder, stop, processes)
        trainer.train()
        if processes.first:
            print(f"{name}: evaluating", flush=True)
            evaluation = evaluate(
                trainer.evaluated,
                images,
                trainer.device,
                stop.check,
                asked.top_m,
                asked.probe_images,
            )
            history, seconds = trainer.history, trainer.seconds
            write_result(Result(evaluation, history, seconds, trainer.method_time), folder)
        processes.wait()
    return [read_result(folder)] if processes.first else []


def report(results: Results, images: Images, asked: Options) -> None:
    out = Path(asked.out)
    print("\n" + table(results) + "\n")
    for note in footnotes(results, images.class_names, asked.top_m):
        print(textwrap.fill(note, 100, initial_indent="* ", subsequent_indent="  "))
    write_csv(results, asked.all_seeds, out / "results.csv")
    written = "results.csv; log.csv, best.pt and checkpoint.pt of each training"
    first = next(iter(results.values()))[0].evaluation
    if write_figure(results, out / "report.png") and write_pairs(first, images, out / "pairs.png"):
        written = f"report.png, pairs.png, {written}"
    else:
        print("* No pictures: these need matplotlib (pip install matplotlib).")
    if images.unreadable:
        print(f"* {len(images.unreadable)} unreadable images were skipped; they are named above.")
    print(f"\nIn {out}: {written}")


def evaluate_checkpoint(argv: Sequence[str]) -> int:
    """The accuracies of a trained model on a part of its dataset, or of another one."""
    p = argparse.ArgumentParser(
        prog="train_fgvc.py evaluate", description=evaluate_checkpoint.__doc__
    )
    _common(p)
    p.add_argument("--data", metavar="DIR", help="(what it was trained on)")
    p.add_argument("--part", choices=PARTS, default="test", help="(%(default)s)")
    given = p.parse_args(argv)
    with wrong_options():
        model = trained.read(Path(given.checkpoint), pick_device(given.device))
        asked = replace(model.options, data=given.data or model.options.data, workers=given.workers)
        images = datasets.load(asked, pin=False)
        scores = trained.score(model, images, given.part)
    for name, title in SCORES.items():
        print(f"{title:20} {scores[name]:7.2%}")
    return 0


def predict_files(argv: Sequence[str]) -> int:
    """The most probable classes of images, as CSV: path, rank, class, probability."""
    p = argparse.ArgumentParser(prog="train_fgvc.py predict", description=predict_files.__doc__)
    _common(p)
    p.add_argument("paths", nargs="+", metavar="IMAGE_OR_FOLDER")
    p.add_argument("--top", type=arguments.POSITIVE, default=5, help="classes (%(default)s)")
    given = p.parse_args(argv)
    with wrong_options():
        model = trained.read(Path(given.checkpoint), pick_device(given.device))
        found = trained.image_files([Path(path) for path in given.paths])
        files = trained.unlabelled(model, found, given.workers)
    writer = csv.writer(sys.stdout)
    writer.writerow(["path", "rank", "class", "probability"])
    for index, ranked in trained.predictions(model, files, given.top):
        for rank, (label, probability) in enumerate(ranked, 1):
            writer.writerow([found[index], rank, label, f"{probability:.4f}"])
    return 0


def _common(p: argparse.ArgumentParser) -> None:
    p.add_argument("checkpoint", help="best.pt of a training")
    p.add_argument("--device", default="auto", help="(a GPU if there is one, else the CPU)")
    p.add_argument("--workers", type=arguments.NATURAL, default=0, help="(%(default)s)")
