"""Example images: what users have, as small pictures for a page or a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cwbr_fused.inputs import validation

ImageSource = Mapping[int, Tensor] | Callable[[int], Tensor | None]
MAX_SIZE = 96


def thumbnails(images: ImageSource | None, classes: Iterable[int]) -> dict[int, Tensor]:
    """The picture of each class that has one: (H, W, 3) uint8, its sides at most 96 pixels.

    Args:
        images: a mapping from classes, or a function of one, to its image (H, W), (1, H, W) or
            (3, H, W): uint8, or floating-point in [0, 1]; other floating-point images, such as
            normalized ones, are stretched linearly to that range. None: no image.
    """
    if images is None:
        return {}
    if not isinstance(images, Mapping) and not callable(images):
        raise TypeError(
            "images: expected a mapping from classes to tensors or a function of a class, "
            f"got {validation.describe(images)}"
        )
    find = images.get if isinstance(images, Mapping) else images
    found = {k: find(k) for k in sorted(set(classes))}
    return {k: _thumbnail(f"images[{k}]", v) for k, v in found.items() if v is not None}


def _thumbnail(name: str, image: object) -> Tensor:
    shapes = "(H, W), (1, H, W) or (3, H, W)"
    if not isinstance(image, Tensor):
        raise TypeError(f"{name}: expected a tensor {shapes}, got {validation.describe(image)}")
    channels = image[None] if image.dim() == 2 else image
    if channels.dim() != 3 or channels.shape[0] not in (1, 3) or image.numel() == 0:
        raise ValueError(f"{name}: expected shape {shapes}, got {validation.describe(image)}")
    if image.dtype != torch.uint8 and not image.dtype.is_floating_point:
        raise TypeError(
            f"{name}: expected uint8 or a floating-point dtype, got {validation.describe(image)}"
        )
    values = channels.detach().cpu().float().nan_to_num(0, 0, 0)
    low, high = values.aminmax()
    if image.dtype == torch.uint8:
        values = values / 255
    elif low < 0 or high > 1:
        values = (values - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    height, width = values.shape[1:]
    if max(height, width) > MAX_SIZE:
        scale = MAX_SIZE / max(height, width)
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        values = interpolate(values[None], size, mode="area")[0]
    return (values * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).contiguous()
