"""Finding the layers of a model: by name, by pattern, or the modules themselves."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable

from torch import nn

# What wrappers call the module inside: torch.compile, FSDP, activation checkpointing.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def without_wrappers(name: str) -> str:
    """The name that a layer has in the model itself, without wrappers around that or inside.

    DataParallel and DistributedDataParallel add a leading "module."; a name that is nothing else is
    left alone.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPED]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts) or name


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel."""
    return _unwrapped(model)[0]


def _unwrapped(model: nn.Module) -> tuple[nn.Module, int]:
    """The model inside all wrappers, and how many of these call it "module"."""
    wrappers = 0
    while len(parts := dict(model.named_children())) == 1:
        ((name, inner),) = parts.items()
        if name != "module" and name not in _WRAPPED:
            break
        model, wrappers = inner, wrappers + (name == "module")
    return model, wrappers


def layers_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """All layers of a model by dotted name; layers in wrappers also by their name in the original.

    Raises:
        TypeError: `model` is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parts = path.split(".")
        if path and parts[-1] not in _WRAPPED:  # which stands for the wrapper
            layers[".".join(part for part in parts if part not in _WRAPPED)] = module
    prefix = "module." * _unwrapped(model)[1]
    for name, module in list(layers.items()):
        if prefix and name.startswith(prefix):
            layers.setdefault(name.removeprefix(prefix), module)
    return layers


def find_layers(model: nn.Module, wanted: Iterable[str | nn.Module]) -> dict[str, nn.Module]:
    """Layers by the name that their features shall bear.

    Args:
        wanted: dotted names, patterns with `*`, `?` or `[...]` whose `*` stays within one level
            ("layer*", "blocks.*.norm2"), and modules of the model.

    Raises:
        TypeError: an entry is neither.
        ValueError: a layer that the model does not have; the error lists similar names.
    """
    layers = layers_by_name(model)
    found: dict[str, nn.Module] = {}
    for entry in wanted:
        if isinstance(entry, nn.Module):
            names = [next((n for n, m in layers.items() if m is entry), "")]
            if not names[0]:
                raise ValueError(
                    f"layers: expected modules of the {type(model).__name__}, "
                    f"got a {type(entry).__name__} that is not part of it"
                )
        elif not isinstance(entry, str):
            raise TypeError(
                f"layers: expected names, patterns or modules, got {type(entry).__name__}"
            )
        elif entry in layers:
            names = [entry]
        else:
            names = [n for n in layers if matches(n, entry)] or [_unknown(model, layers, entry)]
        found.update((name, layers[name]) for name in names)
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern, whose `*` stays within one level, covers a name."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _unknown(model: nn.Module, layers: dict[str, nn.Module], name: str) -> str:
    similar = difflib.get_close_matches(name, layers, n=5)
    top = [path for path in layers if "." not in path]
    hint = f"did you mean {listed(similar)}?" if similar else f"top-level layers: {listed(top)}"
    raise ValueError(f"layers: expected those of the {type(model).__name__}, got {name!r}; {hint}")


def listed(names: Iterable[str]) -> str:
    """Names for an error message."""
    return ", ".join(map(repr, names)) or "none"
