"""The banks of all layers, and how they become part of a module's state."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cwbr_fused.balanced.bank import ClassBank
from cwbr_fused.inputs.layers import without_wrappers
from cwbr_fused.operations.reference import accumulation_dtype


class Banks(Mapping[str, ClassBank]):
    """The bank of each layer by its name; made when the layer is first met, or loaded.

    They are no submodules, because frameworks that list a module's buffers before training
    (DistributedDataParallel, averaging by position) do not know buffers that appear later. They
    are saved, loaded, moved and converted as if they were. A deep copy gets each bank that the
    original gets, and the other way round, so that averages which pair the two states by position
    pair equals.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._banks: dict[str, ClassBank] = {}
        self._kin: weakref.WeakSet[Banks] = weakref.WeakSet([self])

    def __getitem__(self, name: str) -> ClassBank:
        return self._banks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._banks)

    def __len__(self) -> int:
        return len(self._banks)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Banks({self._banks})"

    def of(self, name: str, z: Tensor, names: Iterable[str]) -> ClassBank:
        """The bank of a layer with vectors z (B, D), on the device of z.

        Its name is that of the layer without wrappers, unless two of `names`, all layers of the
        call, would then be the same.
        """
        short = without_wrappers(name)
        if sum(without_wrappers(other) == short for other in names) == 1:
            name = short
        bank = self._banks.get(name)
        dims = z.shape[1]
        if bank is None or (bank.mean.shape[1] != dims and bank.is_empty()):
            bank = self.add(name, dims, accumulation_dtype(z.dtype), z.device)
        if bank.mean.shape[1] != dims:
            raise ValueError(
                f"{name}: expected D = {bank.mean.shape[1]}, as its class means have, got D = "
                f"{dims}"
            )
        if bank.mean.device != z.device:
            with torch.inference_mode(False):
                bank.to(z.device)
        return bank

    def add(self, name: str, dims: int, dtype: torch.dtype, device: torch.device) -> ClassBank:
        """A new empty bank, here and in deep copies that have none of that name."""
        for banks in self._kin:
            if banks is self or name not in banks:
                with torch.inference_mode(False):  # whose tensors could not be trained later
                    banks._banks[name] = ClassBank(
                        self.num_classes, dims, dtype=dtype, device=device
                    )
        return self._banks[name]

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """What `nn.Module.to` and its kin do to submodules."""
        for bank in self._banks.values():
            bank._apply(fn)

    def save(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Adds the state of all banks."""
        for name, bank in self._banks.items():
            bank.state_dict(
                destination=destination, prefix=f"{prefix}{_escaped(name)}.", keep_vars=keep_vars
            )

    def load(
        self,
        state: Mapping[str, Any],
        prefix: str,
        metadata: Mapping[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Becomes what `state` says: banks that it lacks are emptied, those it has are made.

        The arguments are those of `nn.Module._load_from_state_dict`.
        """
        keys = dict.fromkeys(k.removeprefix(prefix).split(".")[0] for k in state)
        loaded: set[str] = set()
        for key in keys:
            name = without_wrappers(_unescaped(key))
            name = _unescaped(key) if name in loaded else name
            loaded.add(name)
            start, found = f"{prefix}{key}.", len(errors)
            bank = self._room_for(name, state.get(f"{start}mean"))
            bank._load_from_state_dict(state, start, metadata, strict, missing, unexpected, errors)
            if len(errors) > found:
                errors.append(
                    f"class means of {name!r}: expected num_classes = {self.num_classes} rows "
                    "and the width of the layer; leave them out of the state to start anew"
                )
        for name in self._banks.keys() - loaded:
            self._banks[name].clear()

    def _room_for(self, name: str, mean: object) -> ClassBank:
        """The bank that a state with these class means goes into."""
        bank = self._banks.get(name)
        if not isinstance(mean, Tensor) or mean.dim() != 2:
            return bank or ClassBank(self.num_classes, 0)
        if bank is None or (bank.mean.shape[1] != mean.shape[1] and bank.is_empty()):
            device = mean.device if bank is None else bank.mean.device
            bank = self.add(name, mean.shape[1], accumulation_dtype(mean.dtype), device)
        return bank

    def __getstate__(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes, "_banks": self._banks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kin = weakref.WeakSet([self])

    def __deepcopy__(self, memo: dict[int, Any]) -> Banks:
        copied = Banks(self.num_classes)
        copied._banks = copy.deepcopy(self._banks, memo)
        copied._kin = self._kin
        self._kin.add(copied)
        return copied


def _escaped(name: str) -> str:
    """A key without dots, of which each name has its own: "/" for ".", and %2F for "/"."""
    return name.replace("%", "%25").replace("/", "%2F").replace(".", "/")


def _unescaped(key: str) -> str:
    return key.replace("/", ".").replace("%2F", "/").replace("%25", "%")
