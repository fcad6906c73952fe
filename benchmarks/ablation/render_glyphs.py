"""Draws data/glyphs1000.npz: 1,000 look-alike characters from the fonts of Debian packages.

Needs Pillow and the packages' fonts, installed or unpacked into one folder; writes the same file
every time from the same versions of both. The packages are those of data/README.md:

    apt-get download PACKAGE ... && for deb in *.deb; do dpkg -x $deb fonts; done
    python -m benchmarks.ablation.render_glyphs fonts
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from benchmarks.ablation.look_alikes import of_most_similar_pairs, similarity
from benchmarks.ablation.settings import GLYPHS_1000

SIZE, EM, OVERSAMPLED, LEVELS = 32, 30, 4, 16
SIMPLIFIED_CHINESE = 2  # The face of this script in the collections of Noto CJK.
Images = npt.NDArray[np.uint8]


class Face(NamedTuple):
    """A font file and the place of the face in it."""

    file: str
    place: int = 0


# A family of fonts is in one part only.
FACES = {
    "train": (
        Face("NotoSansCJK-Regular.ttc", SIMPLIFIED_CHINESE),
        Face("uming.ttc"),
        Face("NotoSansCJK-Light.ttc", SIMPLIFIED_CHINESE),
        Face("NotoSansCJK-Black.ttc", SIMPLIFIED_CHINESE),
        Face("NotoSerifCJK-Light.ttc", SIMPLIFIED_CHINESE),
        Face("NotoSerifCJK-Bold.ttc", SIMPLIFIED_CHINESE),
        Face("ukai.ttc"),
        Face("cwfs.ttf"),
        Face("ipag.ttf"),
        Face("MTLmr3m.ttf"),
    ),
    "val": (Face("wqy-microhei.ttc"), Face("HanaMinA.ttf"), Face("kiloji.ttf")),
    "test": (
        Face("wqy-zenhei.ttc"),
        Face("TW-Sung-98_1.ttf"),
        Face("LXGWWenKai-Regular.ttf"),
        Face("BIZUDMincho-Regular.ttf"),
        Face("SmileySans-Oblique.ttf"),
    ),
}
# The characters are chosen by their looks in these: one sans-serif, one serif.
JUDGES = FACES["train"][:2]


def common_characters() -> list[str]:
    """Those of the Chinese, Taiwanese and Japanese standards alike, so that every font has them."""

    def is_in(character: str, encoding: str) -> bool:
        try:
            return len(character.encode(encoding)) == 2
        except UnicodeEncodeError:
            return False

    candidates = map(chr, range(0x4E00, 0xA000))
    return [c for c in candidates if all(is_in(c, e) for e in ("gb2312", "big5", "shift_jis"))]


def render(folder: Path, face: Face, characters: list[str]) -> Images:
    """(N, 32, 32), grey 0 to 15, the ink of each character centred.

    Drawn larger and averaged: neither hinting nor a font's embedded bitmaps have a say.
    """
    path = next(folder.rglob(face.file), None)
    if path is None:
        raise SystemExit(f"{folder} has no {face.file}: unpack its package there")
    font = ImageFont.truetype(str(path), EM * OVERSAMPLED, face.place)
    return np.stack([_draw(font, character) for character in characters])


def _draw(font: ImageFont.FreeTypeFont, character: str) -> Images:
    side = SIZE * OVERSAMPLED
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (side, side))
    place = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(image).text(place, character, 255, font)
    grey = np.asarray(image.reduce(OVERSAMPLED), dtype=np.float32)
    return (grey / 255 * (LEVELS - 1)).round().astype(np.uint8)


def look_alikes(folder: Path, characters: list[str]) -> list[str]:
    """The characters of the most similar pairs of all, until there are enough.

    A pair's similarity is the correlation of its slightly blurred images, the smaller one of the
    two judges'.
    """
    each = [similarity(render(folder, face, characters), blur=1) for face in JUDGES]
    chosen = of_most_similar_pairs(np.minimum(*each), GLYPHS_1000.classes)
    return [characters[index] for index in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the fonts are, at any depth")
    folder = parser.parse_args().folder
    characters = look_alikes(folder, common_characters())
    arrays: dict[str, Any] = {"chars": np.array(characters)}
    for part, faces in FACES.items():
        images = [render(folder, face, characters) for face in faces]
        arrays[f"x{part}"] = np.concatenate(images)
        arrays[f"y{part}"] = np.tile(np.arange(len(characters), dtype=np.int16), len(faces))
    np.savez_compressed(GLYPHS_1000.path, **arrays)


if __name__ == "__main__":
    main()
