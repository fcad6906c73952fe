"""What every process of a group checks of `CWBR(group="world")`; run by test_distributed.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.parallel import DistributedDataParallel

import cwbr_fused

CLASSES, DIMS = 9, 6
Step = tuple[Tensor, Tensor]


class Network(nn.Module):
    """Two features on the way to the logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.neck = nn.Linear(DIMS, 8), nn.Linear(8, 7)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        body = self.body(x)
        neck = self.neck(body.relu())
        return {"body": body, "neck": neck}, self.head(neck.relu())


def steps(count: int, size: int) -> list[Step]:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(CLASSES, (count, size), generator=generator)
    noise = torch.randn(count, size, DIMS, generator=generator, dtype=torch.float64)
    return [(x + y[:, None] / CLASSES, y) for x, y in zip(noise, targets, strict=True)]


def backward(network: nn.Module, cwbr: cwbr_fused.CWBR, step: Step, scale: float = 1) -> Tensor:
    x, y = step
    features, logits = network(x)
    energy = cwbr(features, logits, y)
    (scale * cross_entropy(logits, y)).backward()
    return energy


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)


def assert_same_banks(ours: cwbr_fused.CWBR, theirs: cwbr_fused.CWBR) -> None:
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def assert_training_equals_one_process(rank: int, world: int, batches: list[Step]) -> None:
    single, network = Network().double(), Network().double()
    parallel = DistributedDataParallel(network)
    alone, shared = cwbr_fused.CWBR(CLASSES), cwbr_fused.CWBR(CLASSES, group="world")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (single, network)]
    own = slice(12 * rank, 12 * (rank + 1))
    for x, y in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(single, alone, (x, y))
        backward(parallel, shared, (x[own], y[own]))
        assert_same_gradients(network, single)
        for optimizer in optimizers:
            optimizer.step()
    assert alone.health()["body"]["reg_norm"] > 0
    assert_same_banks(shared, alone)


def check_banks_and_training_equal_one_process(rank: int, world: int) -> None:
    assert_training_equals_one_process(rank, world, steps(6, 12 * world))


def check_banks_of_unequal_and_empty_batches_equal_one_process(rank: int, world: int) -> None:
    network = Network().double()
    alone, shared = cwbr_fused.CWBR(CLASSES), cwbr_fused.CWBR(CLASSES, group="world")
    sizes = (20, 13) if world == 2 else (11, 0, 17, 5)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for x, y in steps(4, sum(sizes)):
        for cwbr, (inputs, targets) in ((alone, (x, y)), (shared, (x[own], y[own]))):
            features, logits = network(inputs)
            cwbr(features, logits, targets)
            network.zero_grad()
            cross_entropy(logits, targets, reduction="sum").backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert_same_banks(shared, alone)


def check_fsdp2_training_with_a_shared_bank_equals_one_process(rank: int, world: int) -> None:
    single, network = Network().double(), Network().double()
    mesh = init_device_mesh("cpu", (world,))
    for layer in (network.body, network.neck, network.head, network):
        fully_shard(layer, mesh=mesh)
    alone, shared = cwbr_fused.CWBR(CLASSES), cwbr_fused.CWBR(CLASSES, group="world")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (single, network)]
    own = slice(12 * rank, 12 * (rank + 1))
    for x, y in steps(4, 12 * world):
        backward(single, alone, (x, y))
        backward(network, shared, (x[own], y[own]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert shared.health()["body"]["reg_norm"] > 0
    sharded = [p.full_tensor() for p in network.parameters()]  # type: ignore[attr-defined]
    torch.testing.assert_close(flat(sharded), flat(list(single.parameters())), rtol=1e-9, atol=0)


def check_banks_are_the_same_bits_in_every_process(rank: int, world: int) -> None:
    network, cwbr = Network().double(), cwbr_fused.CWBR(CLASSES, group="world")
    sizes = [5 + 4 * r for r in range(world)]
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for number, (x, y) in enumerate(steps(5, sum(sizes))):
        if number == 2 and rank == world - 1:
            x = torch.full_like(x, float("nan"))
        backward(network, cwbr, (x[own], y[own]))
        network.zero_grad()
    state = flat(list(cwbr.state_dict().values()))
    assert state.isfinite().all()
    first = state.clone()
    dist.broadcast(first, 0)
    assert torch.equal(state, first)


def check_gradients_accumulate_with_a_shared_bank(rank: int, world: int) -> None:
    single, network = Network().double(), Network().double()
    parallel = DistributedDataParallel(network)
    alone, shared = cwbr_fused.CWBR(CLASSES), cwbr_fused.CWBR(CLASSES, group="world")
    own = slice(12 * rank, 12 * (rank + 1))
    *warm, first, last = steps(5, 12 * world)
    for x, y in warm:
        backward(single, alone, (x, y))
        with parallel.no_sync():
            backward(parallel, shared, (x[own], y[own]))
        single.zero_grad()
        network.zero_grad()
    for step in (first, last):
        backward(single, alone, step, 0.5)
    with parallel.no_sync():
        backward(parallel, shared, (first[0][own], first[1][own]), 0.5)
    backward(parallel, shared, (last[0][own], last[1][own]), 0.5)
    assert_same_gradients(network, single)


def check_banks_and_training_with_mixup_equal_one_process(rank: int, world: int) -> None:
    batches = []
    for x, y in steps(6, 12 * world):
        soft = one_hot(y, CLASSES) * 0.63 + one_hot(y.flip(0), CLASSES) * 0.27 + 0.1 / CLASSES
        soft[::5] = 0  # unlabelled
        batches.append((x, soft.double()))
    assert_training_equals_one_process(rank, world, batches)
