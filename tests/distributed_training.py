"""What every process of a group checks of training with a loss; run by test_distributed.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import cwbr_fused

CLASSES = 9


class Network(nn.Module):
    """Two layers of features and logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.neck = nn.Linear(6, 8), nn.Linear(8, 7)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        hidden = self.body(x).relu()
        neck = self.neck(hidden)
        return [hidden, neck], self.head(neck.relu())


def objective(network: nn.Module, x: Tensor, y: Tensor, group: str | None) -> Tensor:
    features, logits = network(x)
    reg = cwbr_fused.loss(features, logits, y, top_m=16, group=group)
    return cwbr_fused.scale_match(cross_entropy(logits, y), reg)


def micro_batches(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(count, size, 6, generator=generator)
    targets = torch.randint(CLASSES, (count, size), generator=generator)
    return list(zip(inputs, targets, strict=True))


def assert_same_parameters(
    actual: nn.Module, expected: nn.Module, what: str = "data", rounding: float = 1e-5
) -> None:
    vectors = []
    for module in (actual, expected):
        tensors = [getattr(p, what) for p in module.parameters()]
        full = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]
        vectors.append(torch.cat([t.flatten() for t in full]))
    error = (vectors[0] - vectors[1]).norm() / vectors[1].norm()
    assert error < rounding, f"{what}: relative error {error}"


def check_ddp_training_equals_one_process(rank: int, world: int) -> None:
    own = slice(12 * rank, 12 * (rank + 1))
    for dtype, rounding in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        single, network = Network().to(dtype), Network().to(dtype)
        parallel = DistributedDataParallel(network)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (single, network)]
        for x, y in micro_batches(3, 12 * world):
            inputs = x.to(dtype)
            for optimizer in optimizers:
                optimizer.zero_grad()
            objective(single, inputs, y, None).backward()
            objective(parallel, inputs[own], y[own], "world").backward()
            assert_same_parameters(network, single, "grad", rounding)
            for optimizer in optimizers:
                optimizer.step()
        assert_same_parameters(network, single, "data", rounding)


def check_gradients_accumulate_over_micro_batches(rank: int, world: int) -> None:
    single, network = Network(), Network()
    parallel = DistributedDataParallel(network)
    own = slice(12 * rank, 12 * (rank + 1))
    first, last = micro_batches(2, 12 * world)
    for x, y in (first, last):
        (objective(single, x, y, None) / 2).backward()
    with parallel.no_sync():
        (objective(parallel, first[0][own], first[1][own], "world") / 2).backward()
    (objective(parallel, last[0][own], last[1][own], "world") / 2).backward()
    assert_same_parameters(network, single, "grad")


def check_fsdp2_gradients_equal_one_process(rank: int, world: int) -> None:
    single, network = Network(), Network()
    mesh = init_device_mesh("cpu", (world,))
    for layer in (network.body, network.neck, network.head, network):
        fully_shard(layer, mesh=mesh)
    own = slice(12 * rank, 12 * (rank + 1))
    for x, y in micro_batches(2, 12 * world):
        (objective(single, x, y, None) / 2).backward()
        (objective(network, x[own], y[own], "world") / 2).backward()
    assert all(isinstance(p.grad, DTensor) for p in network.parameters())
    assert_same_parameters(network, single, "grad")


def check_a_compiled_step_breaks_its_graph_and_agrees(rank: int, world: int) -> None:
    if world > 2:
        return  # Tracing takes seconds in each process.
    networks = Network(), Network()
    x, y = micro_batches(1, 16)[0]
    objective(networks[0], x + rank, y, "world").backward()
    torch.compile(objective, backend="eager")(networks[1], x + rank, y, "world").backward()
    assert_same_parameters(networks[1], networks[0], "grad")
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="number of usable classes"):
        torch.compile(objective, backend="eager", fullgraph=True)(networks[1], x, y, "world")
