"""The dataset that a run was asked for."""

from __future__ import annotations

from pathlib import Path

from fgvc import readers
from fgvc.data import Glyphs, Images
from fgvc.images import ImageFiles, Reading
from fgvc.listing import complete
from fgvc.models import preprocessing
from fgvc.options import Options


def load(options: Options, pin: bool) -> Images:
    """The glyphs, or the images in --data. `pin`: copies to a GPU go on beside its work."""
    if options.data is None:
        return Glyphs(options.images_per_class, options.split_seed)
    split_file = None if options.split_file is None else Path(options.split_file)
    listing = readers.read(Path(options.data), options.layout, split_file)
    return ImageFiles(
        complete(listing, options.split_seed),
        reading(options, pin),
        options.images_per_class,
        options.split_seed,
    )


def reading(options: Options, pin: bool) -> Reading:
    """How its image files are read."""
    return Reading(
        options.image_size,
        preprocessing(options.model),
        options.randaugment,
        options.erase,
        options.min_crop,
        options.workers,
        pin,
        options.corrupt == "stop",
    )
