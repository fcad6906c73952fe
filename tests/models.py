"""Tiny models with the layer names, shapes and conventions of torchvision and timm."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """torchvision's two-convolution residual block: (B, in, H, W) -> (B, out, H/stride, W/stride).

    As there, the shortcut is added and rectified in place."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_planes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        out = self.relu(out)
        return out


class ResNet(nn.Module):
    """Stages ``layer1`` ... ``layer4`` of two BasicBlocks: (B, 3, H, W) -> (B, num_classes).

    Channels are multiples of 8: with 4, 6 and 10 of them the gradients that torch 2.13 takes by
    oneDNN on AVX2 without AVX-512 corrupt the heap.
    """

    def __init__(self, num_classes: int = 5, planes: tuple[int, ...] = (8, 8, 16, 24)) -> None:
        super().__init__()
        self.planes = planes
        self.conv1 = nn.Conv2d(3, planes[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(planes[0], planes[0], 1)
        self.layer2 = self._stage(planes[0], planes[1], 2)
        self.layer3 = self._stage(planes[1], planes[2], 2)
        self.layer4 = self._stage(planes[2], planes[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(planes[3], num_classes)

    @staticmethod
    def _stage(in_planes: int, planes: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(in_planes, planes, stride), BasicBlock(planes, planes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class ViTBlock(nn.Module):
    """Pre-norm attention and MLP: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """timm's ``blocks``, ``num_prefix_tokens`` (CLS and registers) and ``forward_intermediates``.

    Images are (B, 3, img_size, img_size); tokens (B, num_prefix_tokens + patches, dim). Without
    ``class_token`` the logits come from the mean of the patch tokens.
    """

    def __init__(
        self,
        num_classes: int = 5,
        img_size: int = 8,
        patch_size: int = 4,
        dim: int = 8,
        depth: int = 3,
        num_heads: int = 2,
        class_token: bool = True,
        reg_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.grid = img_size // patch_size
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.has_class_token = class_token
        self.patch_embed = nn.Conv2d(3, dim, patch_size, patch_size)
        self.prefix = nn.Parameter(torch.randn(1, self.num_prefix_tokens, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, self.num_prefix_tokens + self.grid**2, dim))
        self.blocks = nn.Sequential(*[ViTBlock(dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def _embed(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.prefix.expand(len(x), -1, -1), patches], 1) + self.pos_embed

    def forward_features(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.blocks(self._embed(x)))
        return tokens

    def forward_head(self, x: Tensor) -> Tensor:
        pooled = x[:, 0] if self.has_class_token else x[:, self.num_prefix_tokens :].mean(1)
        logits: Tensor = self.head(pooled)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """``(final tokens, [intermediates])``: the last ``indices`` blocks, or those listed.

        The prefix is cut off the intermediates, which are (B, dim, grid, grid) as "NCHW" and
        (B, patches, dim) as "NLC"; ``return_prefix_tokens`` makes each a pair with the prefix.
        """
        depth = len(self.blocks)
        if indices is None or isinstance(indices, int):
            taken = list(range(depth)[-indices:] if indices else range(depth))
        else:
            taken = [range(depth)[i] for i in indices]
        x = self._embed(x)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in taken:
                outputs.append(self.norm(x) if norm else x)
        prefixes = [y[:, : self.num_prefix_tokens] for y in outputs]
        maps = [y[:, self.num_prefix_tokens :] for y in outputs]
        if output_fmt == "NCHW":
            maps = [y.transpose(1, 2).unflatten(2, (self.grid, self.grid)) for y in maps]
        intermediates = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps
        return intermediates if intermediates_only else (self.norm(x), intermediates)


class SwinStage(nn.Module):
    """Halves the map and mixes channels; no windows: (B, H, W, in) -> (B, H/2, W/2, out)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_dim)
        self.reduction = nn.Linear(4 * in_dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2))  # (B, H/2, 2, W/2, 2, C)
        out: Tensor = self.reduction(self.norm(x.transpose(2, 3).flatten(3)))
        return out


class SwinLike(nn.Module):
    """Stages ``layers.0`` ... with channels-last maps, as timm's Swin has them."""

    output_fmt = "NHWC"

    def __init__(self, num_classes: int = 5, dims: tuple[int, ...] = (4, 6, 8)) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dims[0], 2, 2)
        stages = [SwinStage(a, b) for a, b in pairwise(dims)]
        self.layers = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.patch_embed(x).permute(0, 2, 3, 1))
        logits: Tensor = self.head(self.norm(x).mean((1, 2)))
        return logits
