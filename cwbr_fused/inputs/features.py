"""Intermediate features, caught with forward hooks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cwbr_fused.inputs.layers import find_layers, listed


class FeatureCatcher:
    """Keeps the outputs of chosen layers of a model, by forward hooks.

        catcher = FeatureCatcher(model, ["layer3", "layer4.1"])  # by dotted name, or
        catcher.add(model.layer2, "layer2")                      # module by module
        for images, targets in loader:
            logits = model(images)
            loss = cross_entropy(logits, targets)
            cwbr(catcher, logits, targets)  # cwbr.catch(model) serves compiled models, too
            loss.backward()
            catcher.clear()

    A catcher is a context manager: leaving the block, also by an exception, removes the hooks. A
    feature is the raw output of its layer, connected to the graph, and stays until `clear`:

    - If a layer was called twice since `clear`, in one forward or in two, the latest call counts.
    - If the output is a tuple, list or mapping, its first tensor is caught. If it has none, the
      forward raises `TypeError`.
    - After a forward that raised, the features of the layers that had run stay until the next
      forward replaces them.
    - Nothing is caught during a backward pass, where activation checkpointing runs layers again.
      With `use_reentrant=True` the first run of these layers has no gradient, and neither has the
      feature: use `use_reentrant=False`.
    - If the model then changes the output in place, as torchvision's residual blocks change that of
      `bn2`, the feature is the changed output.

    A catcher that is copied or pickled together with its model, as parts of one module, continues
    to catch. A model that is copied without its catcher stores no features, and a catcher that is
    copied without its model catches none.

    With `torch.compile`, add the layers *before the compiled model is first called*. The hooks are
    then part of its graph, also with `fullgraph=True`. A layer that is added later is missing until
    `torch.compiler.reset()` makes the model compile again, because Dynamo has no guard on hooks
    where there were none. Features that `forward` returns need no hooks. Those of timm's
    `forward_intermediates` are copies on ViT and Swin, where `CWBR` has no effect on them and says
    so; catch the layers there.

    Args:
        model: where to look `layers` up.
        layers: dotted names of modules in `model`, patterns of names such as `"layer*"`, or modules
            of it; the dotted name is the key of the feature.

    Raises:
        TypeError, ValueError: as `add_by_name`; or `layers` without `model`, or the reverse.
    """

    def __init__(
        self, model: nn.Module | None = None, layers: Iterable[str | nn.Module] = ()
    ) -> None:
        self._slots: dict[str, Slot] = {}
        self._handles: dict[str, RemovableHandle] = {}
        if isinstance(layers, str | nn.Module):
            raise TypeError(f"layers: expected a sequence of names, got {layers!r}")
        wanted = list(layers)
        if (model is None) != (not wanted):
            raise ValueError(
                "layers: expected some with a model and none without, as in "
                f"FeatureCatcher(model, ['layer4']), got {len(wanted)} with {type(model).__name__}"
            )
        if model is not None:
            try:
                for name, module in find_layers(model, wanted).items():
                    self.add(module, name)
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
            raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
        if name is None:
            name = f"{type(module).__name__}_{len(self._handles)}"
        if not isinstance(name, str):
            raise TypeError(f"name: expected a string, got {type(name).__name__}")
        if name in self._handles:
            raise ValueError(f"name: expected one other than {listed(self._handles)}, got {name!r}")
        is_container = isinstance(module, nn.ModuleList | nn.ModuleDict)
        if is_container and type(module).forward is nn.Module.forward:
            raise ValueError(
                f"module: expected one that is called, got {name!r}, a {type(module).__name__}, "
                "which never is; add one of its members"
            )
        slot = self._slot(name)
        self._slots.pop(name, None)  # left by a removed layer of that name
        self._slots[name] = slot
        self._handles[name] = module.register_forward_hook(slot)
        return self

    def add_by_name(self, model: nn.Module, name: str) -> FeatureCatcher:
        """Catch the output of the layer of `model` with this dotted name, e.g. `"blocks.11"`.

        The names in a compiled model are those of the original. Returns the catcher itself.

        Raises:
            TypeError: `model` is no `nn.Module`.
            ValueError: no such layer (the error lists those with similar names), or as `add`.
        """
        for found, module in find_layers(model, [name]).items():
            self.add(module, found)
        return self

    @property
    def feats(self) -> Features:
        """The features of the layers that ran since the last `clear`, in the order of
        `add`: a new dict, name -> tensor. A name that is not in it raises `KeyError`."""
        outputs = {name: slot.caught() for name, slot in self._slots.items()}
        caught = {name: output for name, output in outputs.items() if output is not None}
        missing = [name for name in self._handles if name not in caught]
        dead = [name for name in missing if not _is_live(self._handles[name])]
        return Features(caught, tuple(self._handles), tuple(dead))

    @property
    def names(self) -> list[str]:
        """The layers that are being caught."""
        return list(self._handles)

    def clear(self) -> None:
        """Forget the features, hence free the memory; the hooks stay."""
        for slot in self._slots.values():
            slot.clear()

    def remove(self) -> None:
        """Remove the hooks; the features stay until `clear`. May be called twice."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def names_shared_with_other_models(self, other: FeatureCatcher) -> list[str]:
        """Layers that both catch under one name, of which each has a module of its own."""
        hooks = {n: h.hooks_dict_ref() for n, h in self._handles.items() if _is_live(h)}
        theirs = {name: handle.hooks_dict_ref() for name, handle in other._handles.items()}
        return [name for name in hooks.keys() & theirs.keys() if hooks[name] is not theirs[name]]

    def __enter__(self) -> FeatureCatcher:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for slot in self._slots.values():
            slot.awake = True

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(layers: {listed(self._handles)}; caught: {listed(self.feats)})"
        )

    def _slot(self, name: str) -> Slot:
        return Slot(name)


class Features(dict[str, Tensor]):
    """A dict of features by layer name; its `KeyError` says which layers did run.

    Args:
        caught: the features.
        hooked: all layers that should have run.
        dead: those of them whose module no longer exists.
    """

    def __init__(
        self, caught: Mapping[str, Tensor], hooked: tuple[str, ...], dead: tuple[str, ...] = ()
    ) -> None:
        super().__init__(caught)
        self._hooked, self._dead = hooked, dead

    def __missing__(self, name: str) -> Tensor:
        if name not in self._hooked:
            raise KeyError(f"features: expected one of {listed(self._hooked)}, got {name!r}")
        raise KeyError(
            f"features: expected {name!r}, got {listed(self)}; {self._why_missing([name])}"
        )

    def check_complete(self) -> None:
        """Raises a ValueError if a hooked layer has no feature."""
        missing = [name for name in self._hooked if name not in self]
        if missing or not self:
            wanted = listed(missing) if missing else "at least one layer"
            raise ValueError(
                f"features: expected {wanted}, got {listed(self)}; {self._why_missing(missing)}"
            )

    def _why_missing(self, names: list[str]) -> str:
        if not self._hooked or any(name in self._dead for name in names):
            return (
                "the module was replaced after it was caught (convert_sync_batchnorm, adapters, "
                "quantization), or the catcher was copied without its model: call catch() again, "
                "on the model as it is now"
            )
        return (
            "the layer has not run since it was added or cleared: a forward may pass a layer by "
            "(fast paths, an auxiliary head that is off, checkpointing that calls forward() and "
            "not the module); if the compiled model was called before the layer was added, call "
            "torch.compiler.reset()"
        )


class Slot:
    """The forward hook of one layer, and its latest output.

    The hook writes an attribute and not a shared dict, so `torch.compile` has no state to guard on,
    and clearing the features never causes a recompilation. A copy of the hook is inactive until a
    copy of the catcher activates it, so that a model copied alone stores nothing.
    """

    def __init__(self, name: str, awake: bool = True) -> None:
        self.name, self.awake = name, awake
        self.output: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> object:
        """Keeps the output; returns what replaces it in the model, or None."""
        if not self.awake or is_recomputing():
            return None
        self.output = first_tensor(output, self.name)
        return None

    def caught(self) -> Tensor | None:
        """The latest output since `clear`."""
        return self.output

    def clear(self) -> None:
        """Forgets it."""
        self.output = None

    def __reduce__(self) -> tuple[type[Slot], tuple[str, bool]]:
        return type(self), (self.name, False)


def is_recomputing() -> bool:
    """Whether this is a forward inside a backward pass, whose output nobody would clear."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _is_live(handle: RemovableHandle) -> bool:
    hooks = handle.hooks_dict_ref()
    return hooks is not None and handle.id in hooks


def first_tensor(output: object, name: str) -> Tensor:
    """The output of a layer, or the first tensor in it."""
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
        f"layer {name!r}: expected a tensor, or a tuple, list or mapping with one in it, "
        f"got {type(output).__name__}"
    )


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """The output of a layer with `tensor` in place of the first one in it."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[next(k for k, v in output.items() if isinstance(v, Tensor))] = tensor
        return changed
    first = next(i for i, part in enumerate(output) if isinstance(part, Tensor))
    parts = [tensor if i == first else part for i, part in enumerate(output)]
    if hasattr(output, "_make"):  # a named tuple
        return output._make(parts)
    return type(output)(parts)
