"""How the outputs of a model's layers are laid out, as far as the model tells."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from cwbr_fused.inputs.layers import layers_by_name, unwrapped
from cwbr_fused.inputs.pooling import Layout
from cwbr_fused.inputs.stages import feature_info

_CLS_TOKEN = re.compile(r"(cls|class)(_?(token|embed|embedding))?s?(_0)?$")
_OTHER_TOKENS = re.compile(r"(dist|distillation|reg|register|storage)_tokens?$")
# Parts of timm's CaiT, XCiT and VOLO that add the CLS token behind the blocks.
_CLASS_ATTENTION = ("blocks_token_only", "cls_attn_blocks", "post_network")


def read_layout(model: nn.Module, name: str) -> Layout:
    """What a model tells of the output of its layer `name`.

    - Channels first or last: `num_chs` in timm's `feature_info`, which the shape is compared with;
      timm's `output_fmt`; torchvision's Swin, whose maps are channels-last; the type of a layer
      such as `Conv2d` or `LayerNorm`.
    - Tokens: `num_prefix_tokens` and `global_pool` of timm; else parameters named as CLS,
      distillation and register tokens are (torchvision, transformers), and the configuration's
      `use_mean_pooling`. A model without a CLS token is pooled over all tokens.

    - `patch_embed.num_patches`: as many tokens have no others before them.

    The innermost network around the layer that tells something counts.
    """
    layer = layers_by_name(model)[name]
    channels, patches, channels_last = None, None, _channels_last_by_type(layer)
    tokens: tuple[int, bool] | None = None
    for path, network in _around(unwrapped(model), layer):
        stages = (stage for stage in feature_info(network) if stage["module"] == path)
        channels = channels or next((stage.get("num_chs") for stage in stages), None)
        patches = patches or getattr(getattr(network, "patch_embed", None), "num_patches", None)
        channels_last = _channels_last(network) if channels_last is None else channels_last
        tokens = tokens or _tokens(network, path)
    prefix, takes_cls = tokens or (0, False)
    return Layout(channels, channels_last, patches, prefix, "cls" if takes_cls else "mean")


def _around(model: nn.Module, layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The networks that a layer is part of, innermost first, and the name that it has there."""
    parts = next(name for name, m in model.named_modules() if m is layer).split(".")
    for depth in reversed(range(len(parts))):
        yield ".".join(parts[depth:]), model.get_submodule(".".join(parts[:depth]))


def _channels_last_by_type(layer: nn.Module) -> bool | None:
    if isinstance(layer, _ConvNd | _NormBase) or type(layer).__name__.endswith("Pool2d"):
        return False
    return True if type(layer) in (nn.Linear, nn.LayerNorm) else None


def _channels_last(network: nn.Module) -> bool | None:
    if type(network).__module__ == "torchvision.models.swin_transformer":
        return True if hasattr(network, "features") else None
    layout = getattr(network, "output_fmt", None)
    return None if layout is None else str(getattr(layout, "value", layout)) == "NHWC"


def _tokens(network: nn.Module, path: str) -> tuple[int, bool] | None:
    """How many tokens of a layer come before the patches, and whether the first is taken."""
    told = getattr(network, "num_prefix_tokens", None)
    takes_cls = getattr(network, "global_pool", "token") in ("token", "")
    if isinstance(told, int):
        if path.startswith("blocks.") and any(hasattr(network, p) for p in _CLASS_ATTENTION):
            return 0, False
        return told, takes_cls and told > 0
    if prefix := _prefix_tokens(network):
        config = getattr(network, "config", None)
        return prefix, takes_cls and not getattr(config, "use_mean_pooling", False)
    return None


def _prefix_tokens(network: nn.Module) -> int:
    """How many tokens come before the patches, by the names of parameters; 0 without a CLS."""
    last = {name.rpartition(".")[2]: parameter for name, parameter in network.named_parameters()}
    cls = [parameter for name, parameter in last.items() if _CLS_TOKEN.match(name)]
    others = [parameter for name, parameter in last.items() if _OTHER_TOKENS.match(name)]
    return sum(p.shape[-2] if p.dim() > 1 else 1 for p in cls + others) if cls else 0
