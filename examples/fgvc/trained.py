"""A trained model, as `best.pt` holds it, at work on images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fgvc import datasets
from fgvc.data import Images
from fgvc.evaluation import Scores, validate
from fgvc.images import ImageFiles
from fgvc.listing import PARTS, Listing, is_image
from fgvc.models import Backbone, make_model
from fgvc.options import Options


@dataclass(frozen=True)
class Trained:
    """A model with what it was trained as."""

    backbone: Backbone
    options: Options
    class_names: list[str]
    channels: int
    device: torch.device


def read(path: Path, device: torch.device) -> Trained:
    """Raises ValueError unless the file is a `best.pt`."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not {"model", "options", "class_names"} <= set(state):
        raise ValueError(f"{path} is no best.pt of a training")
    options = Options(**state["options"])
    names = state["class_names"]
    model = make_model(options.model, len(names), state["channels"], options.image_size)
    model.load_state_dict(state["model"])
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Trained(Backbone(model, state["layers"]), options, names, state["channels"], device)


def score(model: Trained, images: Images, part: str) -> dict[str, float]:
    """Top-1, top-5 and mean class accuracy on a part, whose classes must be the model's."""
    if images.class_names != model.class_names:
        raise ValueError(f"--data: {images.name} has other classes than the model")
    present = images.classes_of(part)
    scores = Scores(len(model.class_names), present, model.device, together=False)
    return validate(model.backbone, images.plain(part), scores, model.device, lambda: None)


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files as they are given, and the images at any depth in the folders."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if is_image(p))
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"there is no {path}")
    if not found:
        raise ValueError(f"there are no images in {', '.join(map(str, paths))}")
    return found


def unlabelled(model: Trained, paths: Sequence[Path], workers: int) -> ImageFiles:
    """The files as the model's test images, each of class 0."""
    if model.channels != ImageFiles.channels:
        raise ValueError(f"a model of {model.channels} channel does not read image files")
    samples = [(path, 0) for path in paths]
    listing = Listing("", model.class_names, {part: samples for part in PARTS})
    return ImageFiles(listing, datasets.reading(model.options, pin=False)._replace(workers=workers))


@torch.no_grad()
def predictions(
    model: Trained, files: ImageFiles, top: int
) -> Iterator[tuple[int, list[tuple[str, float]]]]:
    """Of each readable image its index, and its most probable classes with their probabilities."""
    model.backbone.model.eval()
    for batch in files.plain("test"):
        logits, _ = model.backbone(batch.images.to(model.device))
        best = logits.softmax(1).topk(min(top, logits.shape[1]))
        for index, values, classes in zip(
            batch.indices.tolist(), best.values.tolist(), best.indices.tolist(), strict=True
        ):
            names = [model.class_names[k] for k in classes]
            yield index, list(zip(names, values, strict=True))
