"""Readers of the layouts that fine-grained datasets come in, each with its official split."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fgvc.listing import Listing, Samples, by_class_name, is_image
from fgvc.packages import require


class Reader(NamedTuple):
    """A layout: the files that give it away (patterns, any of them), and what reads it."""

    markers: tuple[str, ...]
    read: Callable[[Path], Listing]


def read(root: Path, layout: str = "auto", split_file: Path | None = None) -> Listing:
    """The images under `root`, or under its one folder that has the layout.

    Raises:
        ValueError: names the file or folder that is missing or wrong.
    """
    if not root.is_dir():
        raise ValueError(f"--data: {root} is not a directory")
    if split_file is not None:
        return read_split_file(root, split_file)
    if layout == "folders":
        return read_folders(root)
    for reader in READERS.values() if layout == "auto" else [READERS[layout]]:
        for folder in (root, *_folders(root)):
            if any(any(folder.glob(marker)) for marker in reader.markers):
                return reader.read(folder)
    if layout == "auto":
        return read_folders(root)
    expected = " or ".join(READERS[layout].markers)
    raise ValueError(f"--data: expected {expected} in {root}, as --layout {layout} has")


def read_cub(root: Path) -> Listing:
    """CUB-200-2011, and NABirds, which has the same files: classes.txt, image_class_labels.txt,
    images.txt, train_test_split.txt, images/."""
    names = dict(_pairs(root / "classes.txt"))
    label_of = dict(_pairs(root / "image_class_labels.txt"))
    in_train = dict(_pairs(root / "train_test_split.txt"))
    used = set(label_of.values())
    number = {label: k for k, label in enumerate(label for label in names if label in used)}
    parts: dict[str, Samples] = {"train": [], "test": []}
    for image, path in _pairs(root / "images.txt"):
        part = "train" if _at(in_train, image, root / "train_test_split.txt") == "1" else "test"
        label = _at(label_of, image, root / "image_class_labels.txt")
        target = _at(number, label, root / "classes.txt")
        parts[part].append((root / "images" / path, target))
    return Listing(root.name, [names[label] for label in number], parts)


def read_aircraft(root: Path) -> Listing:
    """FGVC-Aircraft, its 100 variants: images_variant_{train,val,test}.txt, images/."""
    return by_class_name(
        "FGVC-Aircraft",
        {
            part: [
                (root / "images" / f"{image}.jpg", variant)
                for image, variant in _pairs(root / f"images_variant_{part}.txt")
            ]
            for part in ("train", "val", "test")
        },
    )


def read_cars(root: Path) -> Listing:
    """Stanford Cars: devkit/ with cars_train/, cars_test/ and cars_test_annos_withlabels.mat, or
    cars_annos.mat with car_ims/."""
    if (root / "cars_annos.mat").exists():
        annotations = _matlab(root / "cars_annos.mat")
        names = [str(name) for name in annotations["class_names"]]
        parts: dict[str, Samples] = {"train": [], "test": []}
        for row in np.atleast_1d(annotations["annotations"]):
            path = root / str(row["relative_im_path"])
            parts["test" if row["test"] else "train"].append((path, int(row["class"]) - 1))
        return Listing("Stanford Cars", names, parts)
    names = [str(name) for name in _matlab(root / "devkit" / "cars_meta.mat")["class_names"]]
    labels = {
        "train": root / "devkit" / "cars_train_annos.mat",
        "test": root / "cars_test_annos_withlabels.mat",
    }
    parts = {
        part: [
            (root / f"cars_{part}" / str(row["fname"]), int(row["class"]) - 1)
            for row in np.atleast_1d(_matlab(path)["annotations"])
        ]
        for part, path in labels.items()
    }
    return Listing("Stanford Cars", names, parts)


def read_inaturalist(root: Path) -> Listing:
    """iNaturalist, 2017 to 2021: train*.json and val*.json, the latter as the test part, since
    the labels of the official one are not public."""
    files = {part: _only(root, f"{name}*.json") for part, name in _INATURALIST.items()}
    tables = {part: json.loads(path.read_text()) for part, path in files.items()}
    categories = sorted(tables["train"]["categories"], key=lambda category: category["id"])
    number = {category["id"]: k for k, category in enumerate(categories)}
    parts: dict[str, Samples] = {}
    for part, table in tables.items():
        path_of = {image["id"]: root / image["file_name"] for image in table["images"]}
        parts[part] = [
            (
                _at(path_of, row["image_id"], files[part]),
                _at(number, row["category_id"], files[part]),
            )
            for row in table["annotations"]
        ]
    names = [str(category.get("name", category["id"])) for category in categories]
    return Listing(root.name, names, parts)


_INATURALIST = {"train": "train", "test": "val"}


def read_folders(root: Path) -> Listing:
    """One folder per class, within train/, val/ (or valid/, validation/) and test/ or directly."""
    found = {
        part: root / name
        for part, names in _PART_FOLDERS.items()
        for name in names
        if (root / name).is_dir()
    }
    # A class may be called "train": that folder then holds images, not classes.
    if "train" not in found or not _folders(found["train"]):
        found = {"train": root}
    return by_class_name(root.name, {part: _labelled(path) for part, path in found.items()})


_PART_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def read_split_file(root: Path, path: Path) -> Listing:
    """A CSV file with the columns path (below `root`), split (train, val or test) and, unless each
    image lies in its class's folder, class."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not {"path", "split"} <= set(reader.fieldnames or ()):
            raise ValueError(
                f"--split-file: expected the columns path, split and perhaps class in {path}, "
                f"got {', '.join(reader.fieldnames or ['nothing'])}"
            )
        parts: dict[str, Any] = {}
        for row in reader:
            part = {"valid": "val", "validation": "val"}.get(row["split"], row["split"])
            if part not in ("train", "val", "test"):
                raise ValueError(
                    f"--split-file: expected train, val or test in line {reader.line_num} of "
                    f"{path}, got {part!r}"
                )
            image = root / row["path"]
            parts.setdefault(part, []).append((image, row.get("class") or image.parent.name))
    return by_class_name(root.name, parts)


READERS = {
    "cub": Reader(("train_test_split.txt",), read_cub),
    "aircraft": Reader(("images_variant_train.txt",), read_aircraft),
    "cars": Reader(("devkit/cars_meta.mat", "cars_annos.mat"), read_cars),
    "inaturalist": Reader(("train*.json",), read_inaturalist),
}
LAYOUTS = ("auto", *READERS, "folders")


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _labelled(root: Path) -> Iterator[tuple[Path, str]]:
    """The images of a folder of class folders, at any depth within these."""
    for folder in _folders(root):
        for path in folder.rglob("*"):
            if is_image(path):
                yield path, folder.name


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file, each cut at its first space."""
    if not path.exists():
        raise ValueError(f"--data: there is no {path}")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        first, _, rest = line.strip().partition(" ")
        if rest:
            yield first, rest.strip()
        elif first:
            raise ValueError(
                f"--data: expected two fields in line {number} of {path}, got {line!r}"
            )


def _at(table: dict[Any, Any], key: Any, path: Path) -> Any:
    """An entry, or an error that names the file that lacks it."""
    if key not in table:
        raise ValueError(f"--data: {path} does not have {key!r}")
    return table[key]


def _only(root: Path, pattern: str) -> Path:
    found = [path for path in sorted(root.glob(pattern)) if "mini" not in path.name] or sorted(
        root.glob(pattern)
    )
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"--data: expected one {pattern} in {root}, got {names}")
    return found[0]


def _matlab(path: Path) -> Any:
    if not path.exists():
        raise ValueError(f"--data: there is no {path}")
    return require("scipy.io", "--layout cars").loadmat(path, squeeze_me=True)
