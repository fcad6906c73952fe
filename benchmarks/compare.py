"""`make bench-compare BASE=<commit>`: is HEAD slower than another commit? Ratios only.

Both commits are built from worktrees of their own. Every round starts a process for each, which
take turns workload by workload, so that both meet the same machine; the ratio of a round is that of
two times taken within a second of each other. Absolute times are not reported: on a shared machine
they mean nothing.

Exit status 1 where, for some workload, HEAD is slower than the threshold by median and slower at
all with 95 % confidence.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO

from benchmarks import measure
from benchmarks.measure import ROOT

WORKLOADS = (
    "8x4",
    "CUB ResNet-50",
    "iNat-18 ViT-B",
    "Herbarium Swin-B",
    "pairs K=64 D=2048",
    "pairs K=200 D=768",
)
SECONDS_PER_SAMPLE = 0.1
RESAMPLES = 2000


@dataclass(frozen=True)
class Verdict:
    """HEAD's time over the base's, with a bootstrap interval that holds it with 95 % confidence."""

    workload: str
    ratio: float
    low: float
    high: float

    def regressed(self, threshold: float) -> bool:
        return self.ratio > threshold and self.low > 1


def judge(workload: str, ratios: Sequence[float]) -> Verdict:
    """The median of the rounds' ratios and its percentile bootstrap interval."""
    draw = random.Random(0)
    medians = sorted(
        statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
    )
    edge = RESAMPLES // 40
    return Verdict(workload, statistics.median(ratios), medians[edge], medians[-edge - 1])


def report(ratios: Mapping[str, Sequence[float]], threshold: float) -> int:
    """Print a line per workload; the exit status."""
    verdicts = [judge(workload, of_rounds) for workload, of_rounds in ratios.items()]
    print(f"{'workload':24} {'head/base':>9}  95 % interval")
    for v in verdicts:
        verdict = f"  slower than {threshold:.2f}" if v.regressed(threshold) else ""
        print(f"{v.workload:24} {v.ratio:9.3f}  {v.low:.3f} .. {v.high:.3f}{verdict}")
    return int(any(v.regressed(threshold) for v in verdicts))


class Build:
    """A commit of the package, installed into a folder of its own.

    `commit` None takes the working tree as it is.
    """

    def __init__(self, commit: str | None, folder: Path) -> None:
        self.commit, self.source, self.site = commit, folder / "source", folder / "site"

    def __enter__(self) -> Build:
        if self.commit is not None:
            git("worktree", "add", "--detach", str(self.source), self.commit)
        else:
            self._copy_working_tree()
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        install += ["--no-build-isolation", "--disable-pip-version-check"]
        subprocess.run([*install, "--target", str(self.site), str(self.source)], check=True)
        return self

    def _copy_working_tree(self) -> None:
        names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
        for name in filter(None, names):
            target = self.source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                target.write_bytes((ROOT / name).read_bytes())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.commit is not None:
            git("worktree", "remove", "--force", str(self.source))


def git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return run.stdout.decode()


class Worker:
    """A process with one build, which times the workloads it is told to."""

    def __init__(self, site: Path) -> None:
        self.site = site
        # The build comes first, so that this checkout gives the workloads and not the package.
        paths = os.pathsep.join([str(site), str(ROOT)])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare", "--worker", str(site)],
            cwd=site,
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, workload: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(workload, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker on {self.site} ended early")
        return float(json.loads(answer))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work(site: Path, questions: IO[str]) -> None:
    """The worker's side: a line with a workload in, its seconds per forward+backward out."""
    import torch

    import cwbr_fused
    from benchmarks.fused import fused
    from benchmarks.providers import Provider, step
    from benchmarks.workloads import BY_NAME, make

    loaded = Path(cwbr_fused.__file__)
    if not loaded.is_relative_to(site):
        raise RuntimeError(f"expected the build in {site}, got {loaded}")
    torch.set_num_threads(1)
    provider = Provider("head or base", partial(fused, backend="auto"))
    for line in questions:
        inputs = make(BY_NAME[line.strip()])
        call = partial(step, provider, inputs)
        call()
        once = measure.seconds(call)
        samples = max(3, int(SECONDS_PER_SAMPLE / once))
        print(statistics.median(measure.seconds(call) for _ in range(samples)), flush=True)


def interleaved_ratios(
    base: Path, head: Path, workloads: Sequence[str], rounds: int
) -> dict[str, list[float]]:
    """head's time over base's, per workload and round; who goes first alternates."""
    ratios: dict[str, list[float]] = {workload: [] for workload in workloads}
    for r in range(rounds):
        workers = {"base": Worker(base), "head": Worker(head)}
        for w, workload in enumerate(workloads):
            order = ("base", "head") if (r + w) % 2 else ("head", "base")
            taken = {name: workers[name].ask(workload) for name in order}
            ratios[workload].append(taken["head"] / taken["base"])
        for worker in workers.values():
            worker.close()
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="the commit to compare with")
    parser.add_argument("--head", help="default: the working tree")
    parser.add_argument("--threshold", type=float, default=1.1, help="ratio from which to fail")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, sys.stdin)
        return 0
    if not arguments.base:
        parser.error("--base is needed: make bench-compare BASE=<commit>")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = stack.enter_context(Build(arguments.base, folder / "base"))
        head = stack.enter_context(Build(arguments.head, folder / "head"))
        ratios = interleaved_ratios(base.site, head.site, arguments.workloads, arguments.rounds)
    return report(ratios, arguments.threshold)


if __name__ == "__main__":
    sys.exit(main())
