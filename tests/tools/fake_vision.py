"""Stand-ins for what the example calls of torchvision and timm, by their documentation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from models import ResNet, SwinLike, VisionTransformer
from torch import Tensor, nn


class ImageFolder:
    """`root/CLASS/*.npy` in place of image files: uint8 (H, W, 3)."""

    def __init__(self, root: str, transform: Callable[[Any], Any]) -> None:
        self.classes = sorted(path.name for path in Path(root).iterdir() if path.is_dir())
        self.samples = [
            (path, k)
            for k, name in enumerate(self.classes)
            for path in sorted((Path(root) / name).iterdir())
        ]
        self.targets = [k for _, k in self.samples]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        return self.transform(np.load(path)), target


class Compose:
    def __init__(self, transforms: list[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class RandomHorizontalFlip:
    def __call__(self, image: Any) -> Any:
        return image[:, ::-1].copy() if torch.rand(()) < 0.5 else image


class CenterCrop:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        return image[: self.size, : self.size]


class Unchanged:
    def __init__(self, size: int) -> None:
        pass

    def __call__(self, image: Any) -> Any:
        return image


class ToTensor:
    def __call__(self, image: Any) -> Tensor:
        return torch.from_numpy(image).permute(2, 0, 1) / 255


class Normalize:
    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def __call__(self, image: Tensor) -> Tensor:
        return (image - self.mean[:, None, None]) / self.std[:, None, None]


def tiny_resnet(num_classes: int) -> nn.Module:
    return ResNet(num_classes)


def get_model(name: str, *, weights: str | None = None, num_classes: int = 1000) -> nn.Module:
    assert weights is None or (weights == "DEFAULT" and num_classes == 1000)
    return {"resnet18": tiny_resnet}[name](num_classes)


def create_model(name: str, *, pretrained: bool, num_classes: int, in_chans: int) -> nn.Module:
    assert in_chans == 3
    model: nn.Module = {"vit_tiny": VisionTransformer, "swin_tiny": SwinLike}[name](num_classes)
    prefix, count = ("blocks", 3) if name == "vit_tiny" else ("layers", 2)
    model.feature_info = [{"module": f"{prefix}.{i}"} for i in range(count)]  # type: ignore[assignment]
    return model


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins where `import torchvision`, `import timm` find them."""
    modules = {
        "torchvision.datasets": {"ImageFolder": ImageFolder},
        "torchvision.transforms": {
            "Compose": Compose,
            "RandomResizedCrop": CenterCrop,
            "RandomHorizontalFlip": RandomHorizontalFlip,
            "Resize": Unchanged,
            "CenterCrop": CenterCrop,
            "ToTensor": ToTensor,
            "Normalize": Normalize,
        },
        "torchvision.models": {"list_models": lambda: ["resnet18"], "get_model": get_model},
        "timm": {"list_models": lambda: ["vit_tiny", "swin_tiny"], "create_model": create_model},
    }
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    for name, members in modules.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


def make_folder(root: Path, parts: list[str], per_class: int = 8) -> None:
    """A folder of images, by part and class, as `install` reads them."""
    generator = np.random.default_rng(0)
    for part in parts:
        for name in ("crow", "jay", "rook"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for k in range(per_class):
                image = generator.integers(0, 256, (10, 10, 3), dtype=np.uint8)
                np.save(folder / f"{k}.npy", image)
