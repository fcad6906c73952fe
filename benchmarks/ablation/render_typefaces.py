"""Draws data/typefaces.npz: words in 400 look-alike typefaces from fonts of Debian packages.

Needs Pillow and the packages' fonts, unpacked into one folder; writes the same file every time from
the same versions of both. The packages are those of data/README.md:

    apt-get download PACKAGE ... && for deb in *.deb; do dpkg -x $deb fonts; done
    python -m benchmarks.ablation.render_typefaces fonts
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from benchmarks.ablation.look_alikes import of_most_similar_pairs, similarity
from benchmarks.ablation.settings import TYPEFACES

HEIGHT, WIDTH, MARGIN, EM, LEVELS = 24, 80, 2, 64, 16
IMAGES = {"train": 12, "val": 4, "test": 8}  # of each face, each of another word
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# Two faces whose images of this word correlate more strongly than this count as one.
SAMPLE, NEAR_IDENTICAL = "Hamburgefonts", 0.97
Image8 = npt.NDArray[np.uint8]

# A word is in one part only.
WORDS = {
    "train": """Amber Anchor Basket Blanket Bridge Candle Carpet Castle Cherry Circle Copper Cotton
        Dancer Desert Doctor Dragon Engine Falcon Family Farmer Flower Forest Galaxy Garden Ginger
        Guitar Hammer Harbor Helmet Island Jacket Jungle Kettle Kitten Ladder Lemon Magnet Marble
        Meadow Mirror Monkey Needle Nickel Number Object Orange Oyster Palace Pencil Pepper Pillow
        Planet Pocket Quartz Rabbit Ribbon Rocket Saddle School Silver Spider Sponge Summer Temple
        Thread Ticket Tunnel Turtle Velvet Violin Walnut Window Winter Wizard Yellow Zipper""",
    "val": """Artist Bottle Cactus Dinner Effort Finger Gravel Heaven Insect Jigsaw Knight Lizard
        Muffin Napkin Olive Parrot Quiver Result Shadow Tomato Unicorn Valley Whisky Yogurt""",
    "test": """Almond Bishop Border Camera Coffee Cradle Donkey Eagle Fabric Freeze Goblin Hazard
        Hockey Iceberg Jewel Jockey Kidney Lantern Locust Mammal Market Nephew Nugget Oxygen Pigeon
        Powder Puzzle Quarter Random Rhythm Salmon Shovel Stable Talent Trophy Upward Vortex Warden
        Wealth Zebra""",
}


def faces(folder: Path) -> list[Path]:
    """Latin text faces, by name: every letter drawn, no two of them alike."""
    found = sorted(
        (p for p in folder.rglob("*") if p.suffix in (".ttf", ".otf")), key=lambda p: p.name
    )
    unique = {path.stem: path for path in found}
    return [path for path in unique.values() if _draws_every_letter(path)]


def _draws_every_letter(path: Path) -> bool:
    try:
        font = ImageFont.truetype(str(path), 32)
        drawn = {bytes(font.getmask(letter)) for letter in LETTERS}
    except OSError:
        return False
    capitals = len({bytes(font.getmask(letter)) for letter in LETTERS[:26]})
    return capitals == 26 and len(drawn) > 40 and all(any(letter) for letter in drawn)


def draw(font: ImageFont.FreeTypeFont, word: str) -> Image8:
    """(HEIGHT, WIDTH), grey 0 to 15: the ink of the word, as large as fits, in the middle."""
    left, top, right, bottom = map(int, font.getbbox(word))
    ink = Image.new("L", (right - left + 8, bottom - top + 8))
    ImageDraw.Draw(ink).text((4 - left, 4 - top), word, 255, font)
    ink = ink.crop(ink.getbbox())
    scale = min((WIDTH - MARGIN) / ink.width, (HEIGHT - MARGIN) / ink.height)
    size = max(1, round(ink.width * scale)), max(1, round(ink.height * scale))
    image = Image.new("L", (WIDTH, HEIGHT))
    image.paste(
        ink.resize(size, Image.Resampling.BOX), ((WIDTH - size[0]) // 2, (HEIGHT - size[1]) // 2)
    )
    return (np.asarray(image, dtype=np.float32) / 255 * (LEVELS - 1)).round().astype(np.uint8)


def load(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), EM)


def look_alikes(paths: list[Path]) -> list[Path]:
    """The faces of the most similar pairs, until there are enough; none is nearly another.

    A pair's similarity is the correlation of the slightly blurred images of one word.
    """
    alike = similarity(np.stack([draw(load(path), SAMPLE) for path in paths]), blur=0.7)
    kept: list[int] = []
    for face in range(len(paths)):
        if not kept or alike[face, kept].max() <= NEAR_IDENTICAL:
            kept.append(face)
    chosen = of_most_similar_pairs(alike[np.ix_(kept, kept)], TYPEFACES.classes)
    print(f"{len(paths)} faces, {len(kept)} of them not nearly identical to another")
    return [paths[kept[face]] for face in sorted(chosen)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the fonts are, at any depth")
    chosen = look_alikes(faces(parser.parse_args().folder))
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"faces": np.array([path.stem for path in chosen])}
    for part, count in IMAGES.items():
        words = WORDS[part].split()
        images = []
        for path in chosen:
            font = load(path)
            images += [draw(font, str(w)) for w in rng.choice(words, count, replace=False)]
        arrays[f"x{part}"] = np.stack(images)
        arrays[f"y{part}"] = np.repeat(np.arange(len(chosen), dtype=np.int16), count)
    np.savez_compressed(TYPEFACES.path, **arrays)


if __name__ == "__main__":
    main()
