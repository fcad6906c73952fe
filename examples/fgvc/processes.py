"""One process, or several that `torchrun` started: who they are, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# While the first process evaluates, the others wait.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """This process's rank among `count`, and its device. The first one alone writes and reports."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def from_first(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, device=self._object_device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in all of them."""
        values = [value]
        if self.count > 1:
            values = [None] * self.count
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()

    @property
    def _object_device(self) -> torch.device | None:
        return self.device if self.device.type == "cuda" else None


@contextmanager
def started(device: torch.device) -> Iterator[Processes]:
    """The processes of this run; with more than one, within their process group."""
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if count == 1:
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(rank, count, device)
    finally:
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """The device of that name, for "auto" a GPU if there is one."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: expected auto, cpu, cuda or alike, got {name!r}") from error
