"""Chooses the classes that are hardest to tell apart by their looks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

Similarity = npt.NDArray[np.float32]


def similarity(images: npt.NDArray[np.uint8], blur: float) -> Similarity:
    """(N, N) the correlations of images (N, H, W), grey 0 to 15, blurred by so many pixels."""
    filtered = ImageFilter.GaussianBlur(blur)
    blurred = [np.asarray(Image.fromarray(image * 16).filter(filtered)) for image in images]
    vectors = np.stack(blurred).reshape(len(images), -1).astype(np.float32)
    vectors -= vectors.mean(1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    correlations: Similarity = vectors @ vectors.T
    return correlations


def of_most_similar_pairs(similarity: Similarity, count: int) -> list[int]:
    """The members of the most similar pairs, most similar first, until there are `count`."""
    first, second = np.triu_indices(len(similarity), 1)
    chosen: dict[int, None] = {}
    for pair in np.argsort(-similarity[first, second], kind="stable"):
        for index in (first[pair], second[pair]):
            if len(chosen) < count:
                chosen.setdefault(int(index))
    return list(chosen)
