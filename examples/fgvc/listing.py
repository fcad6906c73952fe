"""Which images a dataset has, of which class and in which part, and the split of what is left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from fgvc.randomness import generator_of

PARTS = ("train", "val", "test")
SPLIT_OFF = 0.15
SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
Samples = list[tuple[Path, int]]


@dataclass(frozen=True)
class Listing:
    """A dataset on disk: `parts[part]` are the (path, class) of its images, in a fixed order."""

    name: str
    class_names: list[str]
    parts: dict[str, Samples]


def is_image(path: Path) -> bool:
    """By its name. Hidden files are none: `._x.jpg` is what macOS leaves beside x.jpg."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def by_class_name(name: str, parts: dict[str, Iterable[tuple[Path, str]]]) -> Listing:
    """The listing of images whose classes go by name; those of the training part are numbered."""
    found = {part: sorted(images) for part, images in parts.items()}
    if not found.get("train"):
        raise ValueError(f"--data: {name} has no training images")
    class_names = sorted({label for _, label in found["train"]})
    number = {label: k for k, label in enumerate(class_names)}
    for part, images in found.items():
        strange = sorted({label for _, label in images} - number.keys())
        if strange:
            raise ValueError(
                f"--data: {part} of {name} has the class {strange[0]!r}, which train lacks"
            )
    numbered = {p: [(path, number[label]) for path, label in f] for p, f in found.items()}
    return Listing(name, class_names, numbered)


def complete(listing: Listing, seed: int) -> Listing:
    """The listing with all three parts: val and test are split off train where they are missing.

    Of each class `SPLIT_OFF` of the training images, at least one, at random by the seed; of a
    class with one image none.
    """
    parts = dict(listing.parts)
    for number, part in enumerate(PARTS[1:], 1):
        if part not in parts:
            generator = generator_of(seed, 0, number)
            parts["train"], parts[part] = _split(parts["train"], generator)
    for part in PARTS:
        if not parts[part]:
            raise ValueError(f"--data: {listing.name} has no images in {part}")
    return Listing(listing.name, listing.class_names, parts)


def _split(samples: Samples, generator: torch.Generator) -> tuple[Samples, Samples]:
    by_class: dict[int, list[int]] = defaultdict(list)
    for index in torch.randperm(len(samples), generator=generator).tolist():
        by_class[samples[index][1]].append(index)
    taken: set[int] = set()
    for indices in by_class.values():
        count = min(max(1, round(SPLIT_OFF * len(indices))), len(indices) - 1)
        taken.update(indices[:count])
    rest = [sample for k, sample in enumerate(samples) if k not in taken]
    return rest, [samples[k] for k in sorted(taken)]
