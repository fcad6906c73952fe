"""The small residual network of the example, and any model of timm or torchvision by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from cwbr_fused import FeatureCatcher, to_vec
from fgvc.data import require

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


def make_model(name: str, num_classes: int, channels: int, pretrained: bool) -> nn.Module:
    """`small_resnet`, or `timm:NAME`, `torchvision:NAME`, or NAME of whichever is installed."""
    if name == SMALL_RESNET:
        if pretrained:
            raise ValueError(f"--pretrained: {SMALL_RESNET} has no pretrained weights")
        return SmallResNet(num_classes, channels)
    package, _, short = name.rpartition(":")
    if package not in ("", "timm", "torchvision"):
        raise ValueError(f"--model: expected NAME, timm:NAME or torchvision:NAME, got {name!r}")
    if package == "":
        package = "torchvision" if importlib.util.find_spec("timm") is None else "timm"
    library = require(
        f"{package}.models" if package == "torchvision" else package, f"--model {name}"
    )
    if short not in library.list_models():
        raise ValueError(f"--model: {package} has no model {short!r}")
    if package == "timm":
        model: nn.Module = library.create_model(
            short, pretrained=pretrained, num_classes=num_classes, in_chans=channels
        )
        return model
    if not pretrained:
        model = library.get_model(short, weights=None, num_classes=num_classes)
        return model
    model = library.get_model(short, weights="DEFAULT")
    head, linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    model.set_submodule(head, nn.Linear(linear.in_features, num_classes))
    return model


def default_layers(model: nn.Module) -> list[str]:
    """The last three stages: of timm's `feature_info`, or of a torchvision-style ResNet."""
    info = getattr(model, "feature_info", None)
    if info:
        return [entry["module"] for entry in list(info)[-3:]]
    if all(hasattr(model, name) for name in ("layer2", "layer3", "layer4")):
        return ["layer2", "layer3", "layer4"]
    names = ", ".join(name for name, _ in model.named_children())
    raise ValueError(f"--layers: name the layers to use, such as blocks.11; top level: {names}")


class Backbone:
    """A model whose chosen layers are caught, and pooled to one vector per image.

    Tokens give their CLS token if the model says that it has one (`num_prefix_tokens` in timm,
    else assumed), maps their average; `output_fmt == "NHWC"` (timm) and torchvision's Swin have
    their channels last.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model, self.layers = model, list(layers)
        self.catcher = FeatureCatcher(model, layers)
        self.pool_one: Callable[[Tensor], Tensor] = partial(
            to_vec,
            num_prefix_tokens=getattr(model, "num_prefix_tokens", 1),
            channels_last=getattr(model, "output_fmt", "") == "NHWC"
            or type(model).__name__ == "SwinTransformer",
        )

    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits (B, C), and the raw outputs of the layers, by name."""
        logits = self.model(images)
        features = dict(self.catcher.feats)
        self.catcher.clear()
        return logits, features

    def pool(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One vector per image and layer, (B, D) each."""
        return {name: self.pool_one(feature) for name, feature in features.items()}
