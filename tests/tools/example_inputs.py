"""Small datasets for the tests of the training example: few glyphs, and trees of drawn images."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import fgvc.data

CLASSES = 6
BIRDS = ("crow", "jay", "rook")


def use_few_glyphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The glyphs of six classes, no picture, and everything is written to the folder."""
    np.savez(folder / "glyphs.npz", **_few_glyphs())
    monkeypatch.setattr(fgvc.data, "GLYPHS", folder / "glyphs.npz")
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@cache
def _few_glyphs() -> dict[str, np.ndarray]:
    with np.load(fgvc.data.GLYPHS) as glyphs:
        arrays = {"chars": glyphs["chars"][:CLASSES]}
        for part in fgvc.data.PARTS:
            kept = np.flatnonzero(glyphs[f"y{part}"] < CLASSES)[: 12 * CLASSES]
            arrays |= {f"x{part}": glyphs[f"x{part}"][kept], f"y{part}": glyphs[f"y{part}"][kept]}
    return arrays


def draw(path: Path, shade: int) -> None:
    """An image of noise about one shade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(crc32(path.name.encode())).integers(-20, 20, (20, 24, 3))
    Image.fromarray((noise + shade).clip(0, 255).astype(np.uint8)).save(path)


def draw_folders(root: Path, parts: list[str], per_class: int = 8) -> None:
    """One folder per class, in each part ("" for none), with what other systems leave beside."""
    for part in parts:
        for k, name in enumerate(BIRDS):
            for number in range(per_class):
                draw(root / part / name / f"{part}{number}.jpg", 60 + 60 * k)
            (root / part / name / f"._{part}0.jpg").write_bytes(b"\0\5\26\7")
            (root / part / name / ".DS_Store").write_bytes(b"\0")
            (root / part / name / "notes.txt").write_text("seen in May")
        (root / part / ".cache").mkdir()


def _numbered(per_class: int) -> Iterator[tuple[int, int, int]]:
    """(image, class, number within the class), all from 1."""
    for k in range(len(BIRDS)):
        for number in range(1, per_class + 1):
            yield k * per_class + number, k + 1, number


def draw_cub(root: Path, per_class: int = 6) -> None:
    """CUB-200-2011: every third image is in the test part."""
    lines: dict[str, list[str]] = {
        "classes": [f"{k} {k:03}.{name}" for k, name in enumerate(BIRDS, 1)],
        "images": [],
        "image_class_labels": [],
        "train_test_split": [],
    }
    for image, target, number in _numbered(per_class):
        path = f"{target:03}.{BIRDS[target - 1]}/{BIRDS[target - 1]}_{number:04}_{image}.jpg"
        draw(root / "images" / path, 60 * target)
        lines["images"].append(f"{image} {path}")
        lines["image_class_labels"].append(f"{image} {target}")
        lines["train_test_split"].append(f"{image} {int(number % 3 > 0)}")
    for name, content in lines.items():
        (root / f"{name}.txt").write_text("\n".join(content) + "\n")


def draw_aircraft(root: Path, per_class: int = 6) -> None:
    """fgvc-aircraft-2013b: a third of the images for each part; names of variants have spaces."""
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for image, target, number in _numbered(per_class):
        draw(root / "data" / "images" / f"{image:07}.jpg", 60 * target)
        part = ("train", "val", "test")[number % 3]
        lines[part].append(f"{image:07} Boeing {target}00/ER")
    for part, content in lines.items():
        (root / "data" / f"images_variant_{part}.txt").write_text("\n".join(content) + "\n")


def draw_cars(root: Path, per_class: int = 4) -> None:
    """Stanford Cars: annotations in MATLAB's format, half of the images for each part."""
    from scipy.io import savemat

    rows: dict[str, list[tuple[int, str]]] = {"train": [], "test": []}
    for image, target, number in _numbered(per_class):
        part = ("train", "test")[number % 2]
        draw(root / f"cars_{part}" / f"{image:05}.jpg", 60 * target)
        rows[part].append((target, f"{image:05}.jpg"))
    (root / "devkit").mkdir()
    names = np.array([f"AM {name} SUV 2012" for name in BIRDS], dtype=object)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    kind = np.dtype([("bbox_x1", "O"), ("class", "O"), ("fname", "O")])
    for part, path in (
        ("train", root / "devkit" / "cars_train_annos.mat"),
        ("test", root / "cars_test_annos_withlabels.mat"),
    ):
        annotations = np.array([(1, *row) for row in rows[part]], dtype=kind)
        savemat(path, {"annotations": annotations})


def draw_inaturalist(root: Path, per_class: int = 4) -> None:
    """iNaturalist 2019: a JSON file for each part, ids that do not start at 0."""
    for part, year_part in (("train", "train2019"), ("val", "val2019")):
        images, annotations = [], []
        for image, target, _ in _numbered(per_class):
            name = f"train_val2019/Birds/{target + 6}/{part}{image}.jpg"
            draw(root / name, 60 * target)
            images.append({"id": 100 + image, "file_name": name, "height": 20, "width": 24})
            annotations.append({"id": image, "image_id": 100 + image, "category_id": target + 6})
        categories = [{"id": k + 7, "name": name} for k, name in enumerate(BIRDS)]
        table = {"images": images, "annotations": annotations, "categories": categories[::-1]}
        (root / f"{year_part}.json").write_text(json.dumps(table))


def write_split(root: Path, path: Path) -> None:
    """A split file over `draw_folders(root, [""])`: a third of the images for each part."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "split"])
        for k, image in enumerate(sorted(root.rglob("[!.]*.jpg"))):
            writer.writerow([image.relative_to(root), ("train", "valid", "test")[k % 3]])
