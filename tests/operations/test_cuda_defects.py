"""Every barrier, mask and neutral value of the CUDA kernels is needed, and the tests notice.

One copy of the kernels holds all the defects of `emulation.defects`; each is woken in turn, in a
process of its own because it may crash or hang, and the results are compared with the truth.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation.checks import doubles, pure_pytorch
from emulation.defects import KINDS, Defect, find_defects, plant
from emulation.harness import Emulator, compile_emulated
from kernel_inputs import outcome, regularizer_with_moments
from torch import Tensor

from cwbr_fused import reference

EPS = 1e-6
SECONDS = 60
DEFECTS = find_defects()


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def random_targets(batch: int, classes: int) -> Tensor:
    return torch.randint(0, classes, (batch,), generator=torch.Generator().manual_seed(batch))


Case = tuple[str, tuple[Any, ...]]


def group_cases() -> Iterator[Case]:
    yield "group_by_class", (random_targets(300, 100), 2)
    yield "group_by_class", (random_targets(37, 13), 3)
    yield "group_by_class", (random_targets(4100, 900), 2)  # in chunks


def moment_cases() -> Iterator[Case]:
    for dims, dtype in ((7, torch.float32), (520, torch.float64), (8, torch.float16)):
        order, offsets, _ = reference.group_by_class(random_targets(37, 3), 2)
        z = random(37, dims, dtype=dtype)
        mean, var = reference.class_moments(z, order, offsets, EPS)
        grads = random(*mean.shape, dtype=mean.dtype), torch.ones_like(var)
        yield "class_moments", (z, order, offsets, EPS)
        yield "class_moments_backward", (*grads, z, mean, var, order, offsets, EPS)


def confusion_cases() -> Iterator[Case]:
    for batch, columns, dtype in ((90, 13, torch.float64), (150, 3, torch.float16)):
        groups = reference.group_by_class(random_targets(batch, columns), 2)
        yield "confusion_weights", (random(batch, columns, dtype=dtype), *groups)
    groups = reference.group_by_class(torch.zeros(2, dtype=torch.long), 1)
    yield "confusion_weights", (random(2, 1, dtype=torch.float16), *groups)


def top_cases() -> Iterator[Case]:
    for rows, top_m in ((20, 5), (130, 300), (130, 9000)):
        yield "top_pairs", (random(rows, rows, dtype=torch.float32), top_m)


def list_cases() -> Iterator[Case]:
    pairs = torch.triu_indices(30, 30, offset=1).T
    for dims in (6, 520):
        mean, var = random(30, dims), random(30, dims, seed=1).exp()
        yield "pair_distance", (mean, var, pairs[:9], EPS)
        yield "pair_distance_backward", (random(len(pairs)), mean, var, pairs, EPS)
    yield from regularizer_cases()


def regularizer_cases() -> Iterator[Case]:
    features = [random(60, dims, seed=dims) / dims**0.5 for dims in (40, 7)]
    plan = reference.plan(random(60, 9), random_targets(60, 9), 17, 2)
    order, offsets, _, pairs, weights = plan
    tail = (order, offsets, pairs, weights, EPS, True)
    _, *saved = regularizer_with_moments(features, *tail)
    one = torch.ones((), dtype=torch.float64)
    yield "regularizer", (features, *tail)
    yield "regularizer_backward", (one, features, *saved, *tail)
    yield "plan", (random(60, 21), random_targets(60, 21), 11, 2)


def tile_cases() -> Iterator[Case]:
    for rows, dims, dtype in ((70, 40, torch.float32), (40, 17, torch.float64)):
        mean, var = random(rows, dims, dtype=dtype), random(rows, dims, seed=1).exp().to(dtype)
        yield "all_pair_distance", (mean, var, EPS)
        yield "all_pair_distance_backward", (random(rows, rows, dtype=dtype), mean, var, EPS)
        alpha = random(rows, rows, dtype=dtype).abs()
        near, one = mean / 5, torch.ones((), dtype=dtype)
        for log in (False, True):
            value = reference.weighted_overlap(near, var, alpha, EPS, log)
            yield "weighted_overlap", (near, var, alpha, EPS, log)
            yield "weighted_overlap_backward", (one, value, near, var, alpha, EPS, log)
        yield "weighted_overlap_with_gradient", (one, near, var, alpha, EPS, False)
    # Long enough for several blocks to share a tile, and often enough for one to be overtaken.
    for dims in range(192, 384, 16):
        yield "all_pair_distance", (random(20, dims), random(20, dims, seed=1).exp(), EPS)
    # Where only every sixteenth row is large the exponents depend on all lanes of the packing.
    uneven = torch.where(torch.arange(70) % 16 == 0, 1.0, 1e-6)[:, None].expand(-1, 40)
    yield "all_pair_distance", (torch.zeros(70, 40), uneven, EPS)
    far = torch.arange(70.0)[:, None] * torch.ones(1, 200)
    far[1] = far[0]
    yield "weighted_overlap", (far, torch.ones(70, 200), torch.ones(70, 70), EPS, False)


def confusion_list_cases() -> Iterator[Case]:
    # One warp, several, and several chunks of a row.
    for batch, columns, dtype in (
        (3, 13, torch.float16),
        (3, 1003, torch.float32),
        (2, 2501, torch.float64),
    ):
        seen = random(columns, seed=1) > -1
        logits = random(batch, columns, dtype=dtype)
        yield "top_confusions", (logits, random_targets(batch, columns), seen, 5)


def attraction_cases() -> Iterator[Case]:
    """Two layers; more classes than are measured together; some -1, unseen, twice or unlabelled."""
    for dims, others, dtype in (
        ([7, 3], 3, torch.float32),
        ([520, 130], 11, torch.float64),
        ([8, 16], 3, torch.float16),
    ):
        wide, classes = reference.accumulation_dtype(dtype), 6
        rivals = random_targets(9, classes).repeat(others)[: 9 * others].reshape(9, others) - 1
        labels = torch.stack([random_targets(9, classes), torch.arange(9) % classes], 1)
        labels[4:6, 0], labels[7, 1] = -1, -1
        rivals[:, 0] = torch.where(torch.arange(9) < 4, labels[:, 0], rivals[:, 0])
        z = random(9, sum(dims), dtype=dtype) / 4
        mean = [random(classes, d).to(wide) / 4 for d in dims]
        z[8, : dims[0]] += mean[0][labels[8, 0]].to(dtype)
        weight, seen = random(9, others).abs().to(wide), torch.arange(classes) != 2
        own = torch.linspace(0, 1, 9, dtype=wide)
        for shares in (labels[:, :0].to(wide), (labels + 1).to(wide).clamp(max=1)):
            var, unit = random(sum(dims)).exp().to(wide), torch.tensor([0.5, 1.5], dtype=wide)
            acting = labels, shares, own, rivals, weight, seen, 0.7
            yield "class_attraction", (z, mean, var, unit, *acting)


Bank = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def banks(dims: int, dtype: torch.dtype) -> Iterator[Bank]:
    """mean, count, classes, size and batch_mean, some of them to be left out: of 20 and 5 classes.

    Sizes that are negative, a row that is not finite, and a class that the bank has no mean of.
    """
    for classes in (20, 5):
        mean, batch_mean = random(classes, dims, dtype=dtype), random(classes, dims, seed=1)
        count, size = torch.ones(classes, dtype=dtype), torch.ones(classes, dtype=dtype)
        rows = torch.arange(classes).flip(0)
        rows[1], size[2], batch_mean[3, -1], count[0] = -1, -1, float("inf"), 0
        yield mean, count, rows, size, batch_mean.to(dtype)


def observing_cases() -> Iterator[Case]:
    """Two layers, the second of them narrow."""
    for dims, dtype in ((7, torch.float32), (520, torch.float64), (70, torch.float64)):
        for mean, count, classes, size, batch_mean in banks(dims, dtype):
            means = [mean, mean[:, :3].clone()]
            updates = [torch.tensor(3.0, dtype=dtype), torch.tensor(0.0, dtype=dtype)]
            moments = torch.cat([batch_mean, 2 * batch_mean[:, :3]], 1)
            batch = (classes, size, moments, moments.square() / 2)
            for counts in ([count, count], [0 * count, count]):
                var = [m[0].exp() for m in means]
                yield "observe_classes", (means, counts, var, updates, *batch, 0.9, 1e-3)


def following_cases() -> Iterator[Case]:
    for dims, dtype in ((7, torch.float32), (520, torch.float64)):
        for mean, count, classes, size, batch_mean in banks(dims, dtype):
            weight = torch.where(batch_mean.isfinite().all(1), size.clamp(min=0), 0)
            layers = [mean, mean[:, :3].clone()], [count, count + 1]
            target = torch.cat([batch_mean, batch_mean[:, :3]], 1)
            weights = torch.stack([weight, 2 * weight])
            yield "follow_classes", (*layers, classes, weights, target, 0.9)
    # Before means of 4096 bytes there is a page that may not be touched.
    mean, count = random(4, 128), torch.ones(4, dtype=torch.float64)
    classes, weight = torch.tensor([2, -1]), torch.ones(2, dtype=torch.float64)
    yield "follow_classes", ([mean], [count], classes, weight[None], mean[:2], 0.9)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "class_attraction.cuh": attraction_cases,
    "follow_classes.cuh": following_cases,
    "observe_classes.cuh": observing_cases,
    "group_by_class.cuh": group_cases,
    "class_moments.cuh": moment_cases,
    "confusion_weights.cuh": confusion_cases,
    "top_confusions.cuh": confusion_list_cases,
    "top_pairs.cuh": top_cases,
    "pair_distance.cuh": list_cases,
    "pack_rows.cuh": tile_cases,
    "pair_tiles.cuh": tile_cases,
    "pair_tiles_backward.cuh": tile_cases,
    "all_pair_distance.cuh": tile_cases,
    "weighted_overlap.cuh": tile_cases,
}


Truth = list[tuple[str, tuple[Any, ...], list[Tensor]]]


@pytest.fixture(scope="module")
def truths() -> dict[str, Truth]:
    """Every file's cases with their results in float64."""
    found: dict[str, Truth] = {}
    for file, cases in CASES.items():
        found[file] = []
        for name, args in cases():
            found[file].append((name, args, outcome(pure_pytorch(name), name, doubles(args))))
    found["common.cuh"] = [case for file in CASES for case in found[file]]
    return found


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("defects")
    return compile_emulated(folder / "kernels.so", "-shared", kernels=plant(DEFECTS, folder))


def all_right(library: Path, truth: Truth, mutant: int) -> bool:
    gpu = Emulator(library, processors=40)
    gpu.mutant = mutant
    for gpu.seed in range(4):
        for name, args, expected in truth:
            for ours, true in zip(outcome(getattr(gpu, name), name, args), expected, strict=True):
                bound = 1e-4 if ours.dtype != torch.float16 else 4e-3
                scale = float(true.abs().max()) if true.numel() else 0.0
                error = (ours.double() - true.double()).abs()
                if not (error <= bound * scale).all():
                    return False
    return True


def passes(library: Path, truth: Truth, mutant: int) -> bool:
    """Whether all results are right, found out in a process that may die or be killed."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        signal.alarm(SECONDS)
        try:
            os._exit(0 if all_right(library, truth, mutant) else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    return status == 0


def test_there_are_defects_of_every_kind_in_every_file() -> None:
    assert {d.kind for d in DEFECTS} == set(KINDS)
    assert {d.file for d in DEFECTS} == {*CASES, "common.cuh"}


# One file of those that have the same cases.
@pytest.mark.parametrize("file", sorted({cases: file for file, cases in CASES.items()}.values()))
def test_sleeping_defects_change_nothing(
    planted: Path, truths: dict[str, Truth], file: str
) -> None:
    assert passes(planted, truths[file], -1)


@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_a_defect_is_noticed(planted: Path, truths: dict[str, Truth], defect: Defect) -> None:
    assert not passes(planted, truths[defect.file], defect.number)
