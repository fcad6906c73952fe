"""Which layers `CWBR.catch` takes where the user names none.

The rule, for a network of whatever library:

1. A timm model lists its stages in `feature_info`. Taken are the ends of the last three
   resolutions; where there are fewer than three, as in a ViT, three of the entries, *spaced*.
2. Otherwise the rule goes down from the model into the part that holds most of the parameters,
   classifier and tables of word vectors aside, until it meets a series: a `Sequential` or
   `ModuleList` of three or more, numbered children (`layer1`, `layer2`), or a module of which no
   part holds 80 %. Taken are the ends of the last three resolutions, where a module with a stride
   or a patch merging lowers the resolution. Where there are fewer than three, or at most six
   modules, three of the modules with parameters are taken, spaced.

*Spaced* are the last one and two before it, each a sixth of the depth apart: blocks 7, 9 and 11 of
12; the last three of six or fewer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from cwbr_fused.inputs.layers import layers_by_name, listed, unwrapped, without_wrappers

LAYERS = 3
# A part with this share of the parameters is the network, what stands beside it its accessories.
DOMINANT = 0.8
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
_HEAD = re.compile("aux|head|fc|classif", re.IGNORECASE)
_GLOBAL_POOL = re.compile("Adaptive|GlobalPool|GlobalAvg|Flatten")
_MERGES_PATCHES = re.compile("PatchMerg|Downsampl")


def default_layers(model: nn.Module) -> list[str]:
    """The names of up to three layers, by the rule of this file.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: nothing fits.
    """
    names = layers_by_name(model)
    inner = unwrapped(model)
    chosen = _from_feature_info(inner, names.keys()) or _from_series(inner)
    chosen = [without_wrappers(name) for name in chosen]
    if not chosen or not names.keys() >= set(chosen):
        raise ValueError(
            f"layers: expected names, as the {type(inner).__name__} has no feature_info, stages or "
            f"blocks to choose from, got None; its layers: {listed(list(names)[:30])}"
        )
    return chosen


def feature_info(model: nn.Module) -> list[dict[str, Any]]:
    """What a timm model tells of its stages: "module", "num_chs", "reduction"; else nothing."""
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    if not isinstance(info, Sequence) or not all(
        isinstance(i, dict) and "module" in i for i in info
    ):
        return []
    return list({stage["module"]: stage for stage in info}.values())


def _from_feature_info(model: nn.Module, names: Set[str]) -> list[str]:
    informed = [(path, m) for path, m in model.named_modules() if feature_info(m)]
    if not informed:
        return []
    path, network = informed[0]
    others = [other for other, m in informed if not any(m is inner for inner in network.modules())]
    if others:
        raise ValueError(
            f"layers: expected names, as the {type(model).__name__} has several networks with "
            f"feature_info, got None; the networks: {listed([path, *others])}"
        )
    prefix = f"{path}." if path else ""
    stages = feature_info(network)
    ends = list({stage.get("reduction"): stage for stage in stages}.values())
    chosen = ends[-LAYERS:] if len(ends) >= LAYERS else _spaced(stages)
    found = [f"{prefix}{stage['module']}" for stage in chosen]
    return found if names >= set(found) else []


def _from_series(model: nn.Module) -> list[str]:
    path, members = "", _without_head(model)
    while True:
        weights = [(_size(m), name, m) for name, m in members]
        if not weights:
            return []
        size, name, largest = max(weights, key=lambda w: w[0])
        dominates = size > DOMINANT * sum(w[0] for w in weights) or _never_runs(largest)
        if _is_series(model, members) or not (dominates and list(largest.children())):
            return [f"{path}{end}" for end in _ends(members)]
        path, model = f"{path}{name}.", largest
        members = _without_head(model)


def _ends(members: list[tuple[str, nn.Module]]) -> list[str]:
    """Names of the modules to take among those that run one after the other."""
    ends = [
        member
        for i, member in enumerate(members)
        if i == len(members) - 1 or _lowers_resolution(members[i + 1][1])
    ]
    if len(members) > 2 * LAYERS and _size(members[-1][1]) == 0 and len(ends) > LAYERS:
        ends.pop()  # pooling after the last stage
    if len(members) <= 2 * LAYERS or len(ends) < LAYERS:
        ends = _spaced([(name, m) for name, m in members if _size(m) > 0])
    return [_last_that_runs(name, m) for name, m in ends[-LAYERS:]]


def _spaced(entries: list[Any]) -> list[Any]:
    step = max(1, len(entries) // (2 * LAYERS))
    return entries[::-1][::step][:LAYERS][::-1]


def _last_that_runs(name: str, module: nn.Module) -> str:
    while _never_runs(module) and list(module.children()):
        part, module = list(module.named_children())[-1]
        name = f"{name}.{part}"
    return name


def _is_series(model: nn.Module, members: list[tuple[str, nn.Module]]) -> bool:
    with_parameters = [name for name, m in members if _size(m) > 0]
    if len(with_parameters) < 2:
        return False
    if isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return len(with_parameters) >= LAYERS
    stems = [m[1] for m in (re.match(r"(\D+)\d+\w?$", name) for name in with_parameters) if m]
    return any(stems.count(stem) >= 2 for stem in stems)


def _without_head(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of a model up to the global pooling, without the classifier."""
    members = [(n, m) for n, m in model.named_children() if not _HEAD.match(n)]
    started = False
    for i, (_, module) in enumerate(members):
        started = started or _size(module) > 0
        if started and _GLOBAL_POOL.search(type(module).__name__):
            members = members[:i]
            break
    with_parameters = [i for i, (_, m) in enumerate(members) if _size(m) > 0]
    if len(with_parameters) < 2:
        return members
    *_, before, last = with_parameters
    head, previous = members[last][1], members[before][1]
    is_one_of_many = _plan(head) == _plan(previous) and not isinstance(head, nn.Linear)
    return members if is_one_of_many or not _classifies(head) else members[:last]


def _classifies(module: nn.Module) -> bool:
    """Whether it is a linear layer, one with more of torch's own, or parameters alone."""
    parts = list(module.modules())[1:]
    if isinstance(module, _NORMS) or not all(
        type(m).__module__.startswith("torch.") for m in parts
    ):
        return False
    return not any(isinstance(m, _ConvNd | nn.MultiheadAttention) for m in module.modules())


def _plan(module: nn.Module) -> list[type[nn.Module]]:
    return [type(m) for m in module.modules()]


def _lowers_resolution(module: nn.Module) -> bool:
    return any(map(_has_stride, module.modules()))


def _has_stride(module: nn.Module) -> bool:
    if _MERGES_PATCHES.search(type(module).__name__):
        return True
    strided = isinstance(module, _ConvNd) and not getattr(module, "transposed", False)
    if not strided and "Pool" not in type(module).__name__:
        return False
    stride = getattr(module, "stride", 1)
    return bool(max(stride if isinstance(stride, tuple) else (stride,)) > 1)


def _never_runs(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward


def _size(module: nn.Module) -> int:
    """How many parameters it has, but for tables of words, which outweigh the blocks of a model."""
    tables = {
        p
        for m in module.modules()
        if isinstance(m, nn.Embedding)
        for p in m.parameters(recurse=False)
    }
    return sum(p.numel() for p in module.parameters() if p not in tables)
