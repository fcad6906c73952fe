"""The small residual network of the example, and any model of timm or torchvision by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cwbr_fused import FeatureCatcher, to_vec
from fgvc.packages import require

SMALL_RESNET = "small_resnet"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, as in torchvision."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_planes != planes:
            shortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(y + self.downsample(x))
        return out


class SmallResNet(nn.Module):
    """Stages `layer1` ... `layer4` of one block each, for images of about 32x32 pixels."""

    def __init__(
        self, num_classes: int, channels: int, widths: Sequence[int] = (24, 48, 96, 192)
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        self.layer1 = BasicBlock(widths[0], widths[0], 1)
        self.layer2 = BasicBlock(widths[0], widths[1], 2)
        self.layer3 = BasicBlock(widths[1], widths[2], 2)
        self.layer4 = BasicBlock(widths[2], widths[3], 2)
        self.fc = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def make_model(
    name: str, num_classes: int, channels: int, image_size: int, pretrained: bool = False
) -> nn.Module:
    """`small_resnet`, or `timm:NAME`, `torchvision:NAME`, or NAME of whichever is installed."""
    if name == SMALL_RESNET:
        if pretrained:
            raise ValueError(f"--pretrained: {SMALL_RESNET} has no pretrained weights")
        return SmallResNet(num_classes, channels)
    package, short = _package(name)
    library = require(package, f"--model {name}")
    if short not in library.list_models():
        raise ValueError(f"--model: {package.split('.')[0]} has no model {short!r}")
    try:
        if package == "timm":
            options = {"num_classes": num_classes, "in_chans": channels, "pretrained": pretrained}
            cfg = library.get_pretrained_cfg(short)
            if cfg is not None and cfg.fixed_input_size:
                options["img_size"] = image_size
            model: nn.Module = library.create_model(short, **options)
        elif pretrained:
            model = library.get_model(short, weights="DEFAULT")
            head, linear = _last_linear(model)
            model.set_submodule(head, nn.Linear(linear.in_features, num_classes))
        else:
            model = library.get_model(short, weights=None, num_classes=num_classes)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ValueError(
            f"--pretrained: the weights of {name} could not be had ({_first_line(error)}). Without "
            "a network give them as a file: --init FILE"
        ) from error
    return model


def _package(name: str) -> tuple[str, str]:
    """The module that makes a model, and the model's name in it."""
    package, _, short = name.rpartition(":")
    if package not in ("", "timm", "torchvision"):
        raise ValueError(f"--model: expected NAME, timm:NAME or torchvision:NAME, got {name!r}")
    if package == "":
        package = "torchvision" if importlib.util.find_spec("timm") is None else "timm"
    return (package if package == "timm" else "torchvision.models"), short


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def preprocessing(name: str) -> dict[str, Any]:
    """The mean, std, interpolation and crop_pct that a model's published weights expect."""
    usual = {
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
        "crop_pct": 0.875,
    }
    if name == SMALL_RESNET or _package(name)[0] != "timm":
        return usual
    cfg = require("timm", f"--model {name}").get_pretrained_cfg(_package(name)[1])
    return usual if cfg is None else {key: getattr(cfg, key) for key in usual}


def classifier(model: nn.Module) -> nn.Module:
    """The last layer, new for a new dataset: timm's classifier, else the last linear layer."""
    get = getattr(model, "get_classifier", None)
    found = get() if get is not None else _last_linear(model)[1]
    assert isinstance(found, nn.Module)
    return found


def _last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]


def load_weights(model: nn.Module, path: Path) -> str:
    """Loads what fits of a file of weights: a state_dict, a checkpoint around one, safetensors.

    Returns:
        What was taken, in words.

    Raises:
        ValueError: the file is missing, holds no weights, or less than half of the model's.
    """
    if not path.is_file():
        raise ValueError(f"--init: there is no file {path}")
    state = _state_dict(path)
    own = model.state_dict()
    fits = {name: t for name, t in state.items() if name in own and t.shape == own[name].shape}
    left = [name for name in own if name not in fits]
    if len(fits) < len(own) / 2:
        raise ValueError(
            f"--init: {path} has {len(fits)} of the {len(own)} tensors of the model; {left[0]} is "
            f"missing or has another shape. The file's first is {next(iter(state), 'none')}"
        )
    model.load_state_dict(fits, strict=False)
    rest = f"; new: {', '.join(left[:6])}{' and more' * (len(left) > 6)}" if left else ""
    return f"{len(fits)} of {len(own)} tensors from {path}{rest}"


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in a file, by the names that a model without wrappers has."""
    if path.suffix == ".safetensors":
        state = require("safetensors.torch", f"--init {path}").load_file(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # what pickle and zip raise on a file that is none of theirs
            raise ValueError(f"--init: {path} holds no weights: {_first_line(error)}") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"--init: {path} holds no state_dict")
    prefixes = ("module.", "_orig_mod.")
    return {_without(name, prefixes): tensor for name, tensor in state.items()}


def _without(name: str, prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name


def pooling(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What makes one vector per image of a layer's output.

    Tokens give their CLS token if the model says that it has one (`num_prefix_tokens` in timm,
    else assumed), maps their average; `output_fmt == "NHWC"` (timm) and torchvision's Swin have
    their channels last.
    """
    return partial(
        to_vec,
        num_prefix_tokens=getattr(model, "num_prefix_tokens", 1),
        channels_last=getattr(model, "output_fmt", "") == "NHWC"
        or type(model).__name__ == "SwinTransformer",
    )


class Backbone:
    """A model whose chosen layers are caught. `run` calls it, perhaps through a wrapper."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        catch: Callable[[nn.Module, Sequence[str]], FeatureCatcher] = FeatureCatcher,
    ) -> None:
        self.model, self.layers = model, list(layers)
        self.catcher = catch(model, layers)
        self.run: Callable[[Tensor], Tensor] = model

    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits (B, C), and the raw outputs of the layers, by name."""
        # In evaluation each process has its own images, of which a wrapper knows nothing.
        logits = (self.run if self.model.training else self.model)(images)
        features = dict(self.catcher.feats)
        self.catcher.clear()
        return logits, features

    def pool(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One vector per image and layer, (B, D) each."""
        pool_one = pooling(self.model)
        return {name: pool_one(feature) for name, feature in features.items()}
