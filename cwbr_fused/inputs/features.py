"""Intermediate features, caught with forward hooks."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class FeatureCatcher:
    """Keeps the outputs of chosen layers of a model, by forward hooks.

        catcher = FeatureCatcher(model, ["layer3", "layer4.1"])  # by dotted name, or
        catcher.add(model.layer2, "layer2")                      # module by module
        for images, targets in loader:
            logits = model(images)
            ce = cross_entropy(logits, targets)
            scale_match(ce, loss(catcher.feats, logits, targets)).backward()
            catcher.clear()

    It is a context manager: leaving the block, also by an exception, removes the hooks. What was
    caught stays until `clear`. What is caught is the raw output, connected to the graph:

    - Of a layer that was called twice since `clear`, in one forward or in two, the latest call.
    - Of a tuple, list or mapping, the first tensor in it. If there is none, the forward raises
      `TypeError`.
    - Of a forward that raised, the layers that had run; the next forward replaces them.
    - Nothing of a backward pass, where activation checkpointing runs layers again. With
      `use_reentrant=True` their first run has no gradient, so neither has the feature: use
      `use_reentrant=False`.
    - Of a layer whose output the model then changes in place, as torchvision's residual blocks
      change that of `bn2`, the changed output.

    A copied or unpickled model has no live hooks; a copied or unpickled catcher is empty.

    `torch.compile`: add the layers *before the compiled model is first called*. The hooks are then
    part of its graph, `fullgraph=True` included. A layer that is added later is missing until
    `torch.compiler.reset()` makes the model compile anew, since Dynamo does not guard on hooks
    where there were none. Explicit features need no hooks at all: return them from `forward`, or
    with timm

        tokens, features = model.forward_intermediates(images, indices=3)
        logits = model.forward_head(tokens)
        reg = loss(features, logits, targets)

    Args:
        model: where to look `layers` up.
        layers: dotted names of modules in `model`; each feature bears that name.

    Raises:
        TypeError, ValueError: as `add_by_name`; or `layers` without `model` or reversed.
    """

    def __init__(self, model: nn.Module | None = None, layers: Iterable[str] = ()) -> None:
        self._slots: dict[str, _Slot] = {}
        self._handles: dict[str, RemovableHandle] = {}
        if isinstance(layers, str):
            raise TypeError(f"layers must be a sequence of names, got the string {layers!r}")
        names = list(layers)
        if (model is None) != (not names):
            raise ValueError("model and layers go together: FeatureCatcher(model, ['layer4', ...])")
        if model is not None:
            try:
                for name in names:
                    self.add_by_name(model, name)
            except Exception:
                self.remove()
                raise

    def add(self, module: nn.Module, name: str | None = None) -> FeatureCatcher:
        """Catch the output of `module` from now on, as `feats[name]`.

        Args:
            module: any module that is called in the forward.
            name: key of the feature; None gives the class name and a number, `"BasicBlock_0"`.

        Returns:
            The catcher itself.

        Raises:
            TypeError: `module` is no `nn.Module` or `name` no string.
            ValueError: the name is taken, or `module` is a container that is never called.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
        if name is None:
            name = f"{type(module).__name__}_{len(self._handles)}"
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {type(name).__name__}")
        if name in self._handles:
            raise ValueError(f"name {name!r} is already in use; layers: {_list(self._handles)}")
        is_container = isinstance(module, nn.ModuleList | nn.ModuleDict)
        if is_container and type(module).forward is nn.Module.forward:
            raise ValueError(
                f"module {name!r} is a {type(module).__name__}, which is never called; "
                "add one of its members"
            )
        slot = _Slot(name)
        self._slots.pop(name, None)  # left by a removed layer of that name
        self._slots[name] = slot
        self._handles[name] = module.register_forward_hook(slot)
        return self

    def add_by_name(self, model: nn.Module, name: str) -> FeatureCatcher:
        """Catch the output of the layer of `model` with this dotted name, e.g. `"blocks.11"`.

        Of a compiled model the names of the original one are meant. Returns the catcher itself.

        Raises:
            TypeError: `model` is no `nn.Module`.
            ValueError: no such layer (the error lists those with similar names), or as `add`.
        """
        return self.add(find_layer(model, name), name)

    @property
    def feats(self) -> Features:
        """The features of the layers that ran since the last `clear`, in the order of
        `add`: a new dict, name -> tensor. A name that is not in it raises `KeyError`."""
        caught = {n: s.output for n, s in self._slots.items() if s.output is not None}
        return Features(caught, tuple(self._handles))

    def clear(self) -> None:
        """Forget the features, hence free the memory; the hooks stay."""
        for slot in self._slots.values():
            slot.output = None

    def remove(self) -> None:
        """Remove the hooks; the features stay until `clear`. May be called twice."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> FeatureCatcher:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __reduce__(self) -> tuple[type[FeatureCatcher], tuple[()]]:
        return FeatureCatcher, ()

    def __repr__(self) -> str:
        return f"FeatureCatcher(layers: {_list(self._handles)}; caught: {_list(self.feats)})"


class Features(dict[str, Tensor]):
    """A dict of features by layer name; its `KeyError` says which layers did run."""

    def __init__(self, caught: Mapping[str, Tensor], hooked: tuple[str, ...]) -> None:
        super().__init__(caught)
        self._hooked = hooked

    def __missing__(self, name: str) -> Tensor:
        if name not in self._hooked:
            raise KeyError(f"layer {name!r} is not hooked; layers hooked: {_list(self._hooked)}")
        raise KeyError(
            f"layer {name!r} has not run since it was added or cleared; layers that ran: "
            f"{_list(self)}. If the compiled model was called before the layer was added, "
            "call torch.compiler.reset()"
        )


class _Slot:
    """The forward hook of one layer, and its latest output.

    Writing an attribute, not a shared dict, leaves `torch.compile` no state to guard on, so
    whether the features were cleared never causes a recompilation.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.output: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # a recomputation inside a backward pass, whose output nobody would clear
        self.output = _first_tensor(output, self.name)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    """What a copied or unpickled model has in place of its original's hooks."""
    return _ignore


def _ignore(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
    return None


def _first_tensor(output: object, name: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    parts: Iterable[object] = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, tuple | list):
        parts = output
    for part in parts:
        if isinstance(part, Tensor):
            return part
    raise TypeError(
        f"layer {name!r} must give a tensor, or a tuple, list or mapping with one in it; "
        f"got {type(output).__name__}"
    )


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The module of that dotted name; an error names those with similar names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(name, str):
        raise TypeError(f"a layer name must be a string, got {type(name).__name__}")
    # torch.compile wraps a module; its layers keep their names.
    modules: dict[str, nn.Module] = {
        path.replace("_orig_mod.", ""): module
        for path, module in model.named_modules(remove_duplicate=False)
        if path and not path.endswith("_orig_mod")
    }
    if name in modules:
        return modules[name]
    similar = difflib.get_close_matches(name, modules, n=5)
    top = [path for path in modules if "." not in path]
    hint = f"did you mean {_list(similar)}?" if similar else f"top-level layers: {_list(top)}"
    raise ValueError(f"{type(model).__name__} has no layer {name!r}; {hint}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
