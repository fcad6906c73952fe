"""The datasets that the training example reads: every layout, its split, broken files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from example_inputs import (
    BIRDS,
    draw,
    draw_aircraft,
    draw_cars,
    draw_cub,
    draw_folders,
    draw_inaturalist,
    use_few_glyphs,
    write_split,
)
from fgvc import readers
from fgvc.data import Glyphs
from fgvc.images import ImageFiles, Reading, UnreadableImageError
from fgvc.listing import PARTS, Listing, complete
from fgvc.sampling import Schedule, ShuffledBatches, first_per_class, spread
from PIL import Image


@pytest.fixture(autouse=True)
def few_glyphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_few_glyphs(tmp_path, monkeypatch)


def sizes(listing: Listing) -> dict[str, int]:
    return {part: len(samples) for part, samples in listing.parts.items()}


@pytest.mark.parametrize(
    ("draw_tree", "names", "expected"),
    [
        (draw_cub, [f"{k:03}.{b}" for k, b in enumerate(BIRDS, 1)], {"train": 12, "test": 6}),
        (
            draw_aircraft,
            ["Boeing 100/ER", "Boeing 200/ER", "Boeing 300/ER"],
            {"train": 6, "val": 6, "test": 6},
        ),
        (draw_cars, [f"AM {name} SUV 2012" for name in BIRDS], {"train": 6, "test": 6}),
        (draw_inaturalist, list(BIRDS), {"train": 12, "test": 12}),
    ],
)
def test_each_layout_is_recognised_and_gives_its_official_split(
    draw_tree: Callable[[Path], None], names: list[str], expected: dict[str, int]
) -> None:
    draw_tree(Path("root"))
    listing = readers.read(Path("root"))
    assert listing.class_names == names
    assert sizes(listing) == expected
    for samples in listing.parts.values():
        assert len({target for _, target in samples}) == 3
        for path, target in samples:
            with Image.open(path) as image:
                shade = image.resize((1, 1)).getpixel((0, 0))[0]
            assert round(shade / 60) == target + 1


def test_dataset_is_found_below_the_folder_that_its_archive_made() -> None:
    draw_cub(Path("archive/CUB_200_2011"))
    assert readers.read(Path("archive")).name == "CUB_200_2011"


def test_folders_with_and_without_parts_are_read_and_litter_is_not() -> None:
    draw_folders(Path("flat"), [""])
    draw_folders(Path("parts"), ["train", "valid", "test"], per_class=4)
    assert sizes(readers.read(Path("flat"))) == {"train": 24}
    listing = readers.read(Path("parts"))
    assert sizes(listing) == {"train": 12, "val": 12, "test": 12}
    assert listing.class_names == list(BIRDS)


def test_class_may_be_called_train() -> None:
    for name in ("train", "bus", "car"):
        draw(Path("vehicles") / name / "0.jpg", 90)
    assert readers.read(Path("vehicles")).class_names == ["bus", "car", "train"]


def test_split_file_says_which_image_is_where() -> None:
    draw_folders(Path("flat"), [""], per_class=6)
    write_split(Path("flat"), Path("split.csv"))
    listing = readers.read(Path("flat"), split_file=Path("split.csv"))
    assert sizes(listing) == {"train": 6, "val": 6, "test": 6}
    assert listing.class_names == list(BIRDS)


def test_missing_parts_are_split_off_class_by_class_without_overlap() -> None:
    draw_folders(Path("flat"), [""], per_class=20)
    draw(Path("flat/wren/only.jpg"), 100)
    listing = readers.read(Path("flat"))
    whole = complete(listing, seed=0)
    # 15 % of 20, then of the 17 left, for each of three classes; the only wren is trained on.
    assert sizes(whole) == {"train": 43, "val": 9, "test": 9}
    counts = Counter(target for _, target in whole.parts["val"])
    assert counts == {0: 3, 1: 3, 2: 3}
    assert sorted(s for part in whole.parts.values() for s in part) == listing.parts["train"]
    assert complete(listing, seed=0) == whole
    assert complete(listing, seed=1) != whole


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda: Path("root/classes.txt").unlink(), "there is no root/classes.txt"),
        (
            lambda: Path("root/image_class_labels.txt").write_text("1 1\n2\n"),
            "two fields in line 2 of root/image_class_labels.txt, got '2'",
        ),
        (
            lambda: Path("root/image_class_labels.txt").write_text("1 1\n"),
            "root/image_class_labels.txt does not have '2'",
        ),
    ],
)
def test_spoilt_file_of_a_dataset_is_named(spoil: Callable[[], None], words: str) -> None:
    draw_cub(Path("root"))
    spoil()
    with pytest.raises(ValueError, match=re.escape(words)):
        readers.read(Path("root"))


def test_wrong_data_is_named() -> None:
    draw_folders(Path("parts"), ["train", "test"], per_class=1)
    draw(Path("parts/test/owl/0.jpg"), 90)
    with pytest.raises(ValueError, match="test of parts has the class 'owl', which train lacks"):
        readers.read(Path("parts"))
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        readers.read(Path("nowhere"))
    with pytest.raises(ValueError, match=r"expected train_test_split.txt in parts"):
        readers.read(Path("parts"), "cub")
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="empty has no training images"):
        readers.read(Path("empty"))
    Path("split.csv").write_text("file,part\na.jpg,train\n")
    with pytest.raises(ValueError, match=r"expected the columns path, split .* got file, part"):
        readers.read(Path("parts"), split_file=Path("split.csv"))


PLAIN = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}


def files(stop: bool = False, workers: int = 0) -> ImageFiles:
    """Of `draw_folders(Path("flat"), [""])`, every third image in each part."""
    listing = readers.read(Path("flat"))
    samples = listing.parts["train"]
    parts = {part: samples[k::3] for k, part in enumerate(PARTS)}
    reading = Reading(8, PLAIN, randaugment="rand-m9", workers=workers, stop_at_unreadable=stop)
    return ImageFiles(Listing("flat", listing.class_names, parts), reading)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_image_is_named_once_and_left_out(
    content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_folders(Path("flat"), [""])
    broken = readers.read(Path("flat")).parts["train"][3][0]
    broken.write_bytes(broken.read_bytes()[:200] if content is None else content)
    images = files()
    for _ in range(2):
        indices = torch.cat([batch.indices for batch in images.plain("train")])
        assert indices.tolist() == [0, 2, 3, 4, 5, 6, 7]
    assert list(images.unreadable) == [str(broken)]
    assert capsys.readouterr().out.count(f"Skipped {broken}, which is not a readable image") == 1
    with pytest.raises(UnreadableImageError, match=re.escape(str(broken))):
        list(files(stop=True).plain("train"))


def test_batch_without_a_readable_image_ends_the_training() -> None:
    draw_folders(Path("flat"), [""])
    images = files()
    for path in Path("flat").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(UnreadableImageError, match=r"none of the 4 images of a batch is readable"):
        next(iter(images.train(Schedule(ShuffledBatches(8, 4, seed=0)), seed=0)))


def test_augmentation_depends_on_the_epoch_and_the_image_alone() -> None:
    draw_folders(Path("flat"), [""])
    sources = (files(), files(workers=1), Glyphs(None, seed=0))
    for images in sources:
        schedule = Schedule(ShuffledBatches(len(images.train_targets), 4, seed=0))
        loader = images.train(schedule, seed=0)

        def epoch(step: int, schedule=schedule, loader=loader) -> list[torch.Tensor]:  # noqa: ANN001
            schedule.start(step, 10_000)
            return [batch.images for batch in loader]

        length = len(schedule)
        first = epoch(0)
        state = torch.get_rng_state()
        resumed = epoch(1)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(map(torch.equal, first[1:], resumed))
        assert not torch.equal(first[0], epoch(length)[0])
    with_worker = list(sources[1].train(Schedule(ShuffledBatches(8, 4, seed=0)), seed=0))
    without = list(sources[0].train(Schedule(ShuffledBatches(8, 4, seed=0)), seed=0))
    assert torch.equal(with_worker[0].images, without[0].images)


def test_glyphs_are_shifted_by_at_most_two_pixels_and_keep_their_targets() -> None:
    glyphs = Glyphs(images_per_class=3, seed=0)
    shifted = glyphs.shifted(torch.arange(18), torch.Generator().manual_seed(0))
    plain = next(glyphs.plain("train"))
    assert torch.equal(shifted.targets, plain.targets)
    background = plain.images.min()
    for image, original in zip(shifted.images[:, 0], plain.images[:, 0], strict=True):
        candidates = [
            torch.roll(original, (dy, dx), (0, 1)) for dy in range(-2, 3) for dx in range(-2, 3)
        ]
        inner = image[2:-2, 2:-2]
        assert any(torch.equal(inner, c[2:-2, 2:-2]) for c in candidates)
        assert image.min() == background


def test_images_per_class_takes_that_many_of_each() -> None:
    targets = torch.tensor([2, 0, 0, 1, 2, 0, 1, 2, 2])
    chosen = first_per_class(targets, 2, seed=0)
    assert targets[chosen].bincount().tolist() == [2, 2, 2]
    assert torch.equal(first_per_class(targets, None, seed=0), torch.arange(9))


def test_spread_covers_both_ends_evenly() -> None:
    assert spread(10, None).tolist() == list(range(10))
    assert spread(10, 50).tolist() == list(range(10))
    assert spread(9, 3).tolist() == [0, 3, 6]


def test_shuffled_epochs_are_full_batches_of_distinct_images() -> None:
    sampler = ShuffledBatches(50, 16, seed=3)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([i for batch in sampler for i in batch])
        assert len(set(epochs[-1])) == len(epochs[-1]) == 48
    assert epochs[0] != epochs[1]


def test_processes_share_every_batch() -> None:
    whole, *parts = (Schedule(ShuffledBatches(20, 6, 0), r, n) for r, n in ((0, 1), (0, 2), (1, 2)))
    for schedule in (whole, *parts):
        schedule.start(step=4, total=6)
    assert len(list(whole)) == 2
    for batch, first, second in zip(whole, *parts, strict=True):
        assert {epoch for epoch, _ in batch} == {1}
        assert sorted(first + second) == sorted(batch)
    with pytest.raises(ValueError, match="6 images, which 4 processes cannot share"):
        Schedule(ShuffledBatches(20, 6, 0), 0, 4)
