"""The layers that `catch` takes without names, and how it pools them, in models of libraries."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cwbr_models import Network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DataParallel

from cwbr_fused import CWBR, CWBRWarning, to_vec
from cwbr_fused.inputs.layout import read_layout
from cwbr_fused.inputs.stages import default_layers

sys.path.append(str(Path(__file__).parent.parent))
from models import ResNet, SwinLike, VisionTransformer

CLASSES = 5
TIMM = {
    "resnet18": ["layer2", "layer3", "layer4"],
    "vit_tiny_patch16_224": ["blocks.7", "blocks.9", "blocks.11"],
    "vit_base_patch16_siglip_224": ["blocks.7", "blocks.9", "blocks.11"],
    "swin_tiny_patch4_window7_224": ["layers.1", "layers.2", "layers.3"],
    "convnext_atto": ["stages.1", "stages.2", "stages.3"],
    "efficientnet_b0": ["blocks.2", "blocks.4", "blocks.6"],
    "densenet121": ["features.denseblock2", "features.denseblock3", "features.norm5"],
    "mvitv2_tiny": ["stages.1", "stages.2", "stages.3"],  # its feature_info names no modules
}
TORCHVISION = {
    "resnet18": ["layer2", "layer3", "layer4"],
    "vgg11": ["features.9", "features.14", "features.19"],
    "densenet121": ["features.denseblock2", "features.denseblock3", "features.norm5"],
    "convnext_tiny": ["features.3", "features.5", "features.7"],
    "swin_t": ["features.3", "features.5", "features.7"],
    "vit_b_16": [f"encoder.layers.encoder_layer_{i}" for i in (7, 9, 11)],
    "mobilenet_v2": ["features.6", "features.13", "features.18"],
    "efficientnet_b0": ["features.3", "features.5", "features.8"],
    "inception_v3": ["Mixed_5d", "Mixed_6e", "Mixed_7c"],
    "squeezenet1_0": ["features.5", "features.10", "features.12"],
}


@pytest.mark.parametrize("name", TIMM)
def test_layers_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm", exc_type=Exception)
    with torch.device("meta"):
        model = timm.create_model(name)
    assert default_layers(model) == TIMM[name]


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", TORCHVISION)
def test_layers_of_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models", exc_type=Exception)
    with torch.device("meta"):
        model = models.get_model(name)
    assert default_layers(model) == TORCHVISION[name]


def transformer(name: str, **config: Any) -> nn.Module:
    library = pytest.importorskip("transformers", exc_type=Exception)
    common = {"num_labels": CLASSES, "image_size": 32}
    made = getattr(library, f"{name}Config")(**common, **config)
    model: nn.Module = getattr(library, f"{name}ForImageClassification")(made)
    return model


SMALL_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 8,
}
CONVNEXT = [f"convnext.encoder.stages.{i}" for i in (1, 2, 3)]
RESNET = [f"resnet.encoder.stages.{i}" for i in (1, 2, 3)]
SMALL_STAGES = {"hidden_sizes": [8, 16, 32, 64], "depths": [1] * 4}


@pytest.mark.parametrize(
    ("name", "config", "layers", "prefix"),
    [
        ("ViT", SMALL_VIT, ["vit.layers.0", "vit.layers.1", "vit.layers.2"], 1),
        ("DeiT", SMALL_VIT, ["deit.layers.0", "deit.layers.1", "deit.layers.2"], 2),
        ("ConvNext", SMALL_STAGES, CONVNEXT, 0),
        ("ResNet", {"embedding_size": 8, **SMALL_STAGES}, RESNET, 0),
    ],
)
def test_layers_of_transformers(
    name: str, config: dict[str, Any], layers: list[str], prefix: int
) -> None:
    model = transformer(name, **config)
    assert default_layers(model) == layers
    layout = read_layout(model, layers[-1])
    assert layout.prefix == prefix
    assert layout.pool == ("cls" if prefix else "mean")


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("Bert", "bert.encoder.layer"),
        ("Roberta", "roberta.encoder.layer"),
        ("DebertaV2", "deberta.encoder.layer"),
        ("GPT2", "transformer.h"),
    ],
)
def test_layers_of_text_models_are_blocks_whatever_the_size_of_their_vocabulary(
    name: str, blocks: str
) -> None:
    library = pytest.importorskip("transformers", exc_type=Exception)
    config = getattr(library, f"{name}Config")(num_hidden_layers=12, num_labels=CLASSES)
    with torch.device("meta"):
        model = getattr(library, f"{name}ForSequenceClassification")(config)
    assert default_layers(model) == [f"{blocks}.{i}" for i in (7, 9, 11)]


def spent(model: nn.Module, size: int, **options: Any) -> tuple[CWBR, dict[str, Tensor]]:
    """CWBR after two steps on the layers of its own choice, and the features of the second."""
    cwbr = CWBR(CLASSES, **options)
    features = cwbr.catch(model)
    targets = torch.arange(6) % CLASSES
    for _ in range(2):
        features.clear()
        logits = model(torch.randn(6, 3, size, size))
        logits = getattr(logits, "logits", logits)
        caught = dict(features.feats)
        loss = cross_entropy(logits, targets)
        cwbr(features, logits, targets)
        loss.backward()
    features.remove()
    return cwbr, caught


def small(name: str) -> nn.Module:
    timm = pytest.importorskip("timm", exc_type=Exception)
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    options: dict[str, dict[str, Any]] = {
        "resnet18": {},
        "convnext_atto": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
        "swin_tiny_patch4_window7_224": {
            "img_size": 64,
            "window_size": 2,
            "embed_dim": 8,
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 1, 1, 1),
        },
        "vit_tiny_patch16_224": vit,
        "vit_base_patch16_siglip_224": vit,
        "vit_small_patch14_reg4_dinov2": vit,
        "vit_tiny_patch16_224.avg": {**vit, "global_pool": "avg"},
        "cait_xxs24_224": vit,
    }
    model: nn.Module = timm.create_model(
        name.removesuffix(".avg"), num_classes=CLASSES, **options[name]
    )
    return model


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("resnet18", 64, {}),
        ("convnext_atto", 64, {}),
        ("swin_tiny_patch4_window7_224", 64, {"channels_last": True}),
        ("vit_tiny_patch16_224", 32, {"pool": "cls"}),
        ("vit_tiny_patch16_224.avg", 32, {"pool": "mean", "num_prefix_tokens": 1}),
        ("vit_base_patch16_siglip_224", 32, {"pool": "mean", "num_prefix_tokens": 0}),
        ("vit_small_patch14_reg4_dinov2", 32, {"pool": "cls", "num_prefix_tokens": 5}),
        ("cait_xxs24_224", 32, {"pool": "mean", "num_prefix_tokens": 0}),
    ],
)
def test_pooling_of_timm_is_read_from_the_model(
    name: str, size: int, expected: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = small(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cwbr, features = spent(model, size)
    assert len(features) == 3
    assert cwbr.health().keys() == features.keys()
    for layer, feature in features.items():
        assert_pooled(cwbr, layer, feature, expected)


def test_pooling_of_torchvisions_swin() -> None:
    swin = pytest.importorskip("torchvision.models.swin_transformer", exc_type=Exception)
    torch.manual_seed(0)
    model = swin.SwinTransformer([4, 4], 8, [1] * 4, [1] * 4, [2, 2], num_classes=CLASSES)
    cwbr, features = spent(model, 64)
    for layer, feature in features.items():
        assert_pooled(cwbr, layer, feature, {"channels_last": True})


@pytest.mark.parametrize("name", ["ViT", "Swin"])
def test_pooling_of_transformers(name: str) -> None:
    torch.manual_seed(0)
    swin = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 1}
    model = transformer(name, **(SMALL_VIT if name == "ViT" else swin))
    cwbr, features = spent(model, 32)
    expected = {"pool": "cls"} if name == "ViT" else {"pool": "mean", "num_prefix_tokens": 0}
    for layer, feature in features.items():
        assert_pooled(cwbr, layer, feature, expected)


def assert_pooled(cwbr: CWBR, layer: str, feature: Tensor, options: dict[str, Any]) -> None:
    """The class means of the layer have seen the feature pooled in this way."""
    pooled = cwbr._pools.pooled(layer, feature)
    torch.testing.assert_close(pooled.z, to_vec(feature.detach(), **options))
    assert cwbr.banks[layer].mean.shape[1] == to_vec(feature, **options).shape[1]


def test_a_backbone_within_wrappers_is_found() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = ResNet()
            self.loss = nn.CrossEntropyLoss()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.backbone(x)
            return logits

    names = ["backbone.layer2", "backbone.layer3", "backbone.layer4"]
    assert default_layers(Classifier()) == names
    assert default_layers(DataParallel(Classifier())) == names
    assert default_layers(torch.compile(DataParallel(Classifier()))) == names  # type: ignore[arg-type]


def test_without_feature_info_the_structure_decides() -> None:
    assert default_layers(ResNet()) == ["layer2", "layer3", "layer4"]
    assert default_layers(VisionTransformer(dim=32, depth=12)) == [
        "blocks.7",
        "blocks.9",
        "blocks.11",
    ]
    mlp = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert default_layers(mlp) == ["0", "2"]
    convs = [
        part
        for _ in range(4)
        for part in (nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2))
    ]
    plain = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    assert default_layers(plain) == ["6", "10", "14"]


def test_where_nothing_fits_the_error_says_so() -> None:
    with pytest.raises(ValueError, match=r"layers: expected names.* Linear has no .*got None"):
        CWBR(CLASSES).catch(nn.Linear(2, 2))
    pair = nn.ModuleDict({"a": ResNet(), "b": ResNet()})
    for network in pair.values():
        network.feature_info = [{"module": "layer4"}]  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"several networks with feature_info.*'a', 'b'"):
        CWBR(CLASSES).catch(pair)


def test_what_was_taken_is_shown() -> None:
    cwbr, model = CWBR(CLASSES), ResNet()
    assert "layers" not in repr(cwbr)
    features = cwbr.catch(model)
    assert "layers=['layer2', 'layer3', 'layer4']" in repr(cwbr)
    assert "'layer2', 'layer3', 'layer4'; caught: none" in repr(features)
    features.remove()
    assert "layers" not in repr(cwbr)


def test_maps_that_look_channels_last_are_warned_of_once() -> None:
    cwbr = CWBR(CLASSES)
    logits, targets = torch.randn(6, CLASSES), torch.arange(6) % CLASSES
    feature = torch.randn(6, 4, 4, 9, requires_grad=True) * 1
    with pytest.warns(CWBRWarning, match=r"takes a, .*looks like \(B, H, W, C\).*channels_last"):
        cwbr({"a": feature}, logits, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cwbr({"a": feature}, logits, targets)
        cwbr({"b": torch.randn(6, 9, 4, 4, requires_grad=True) * 1}, logits, targets)
        last = partial(to_vec, channels_last=True)
        said = CWBR(CLASSES, pool=last)
        said({"a": feature}, logits, targets)
    assert said.banks["a"].mean.shape == (CLASSES, 9)


def test_layers_can_be_pooled_each_in_its_way() -> None:
    last = partial(to_vec, channels_last=True)
    cwbr = CWBR(CLASSES, pool={"layers.*": last, "body": lambda x: x[:, :2]})
    logits, targets = torch.randn(6, CLASSES), torch.arange(6) % CLASSES
    shapes = {"layers.0": (6, 4, 4, 9), "body": (6, 8), "conv": (6, 9, 4, 4)}
    features = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    cwbr(features, logits, targets)
    widths = {name: bank.mean.shape[1] for name, bank in cwbr.banks.items()}
    assert widths == {"layers.0": 9, "body": 2, "conv": 9}
    with pytest.raises(TypeError, match=r"pool: expected a callable, a mapping .*got str 'mean'"):
        CWBR(CLASSES, pool="mean")  # type: ignore[arg-type]


def test_layout_of_models_of_a_like_kind() -> None:
    assert read_layout(SwinLike(), "layers.1").channels_last
    assert not read_layout(SwinLike(), "patch_embed").channels_last
    registers = read_layout(VisionTransformer(reg_tokens=2), "blocks.1")
    assert (registers.prefix, registers.pool) == (3, "cls")
    assert read_layout(Network(), "conv").channels_last is False
