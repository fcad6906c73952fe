"""What the benchmarks' tables and figures say follows from the rows alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_rows import row

from benchmarks import markdown, plots, resnet, scaling, tables
from benchmarks.providers import EAGER
from benchmarks.results import Results
from benchmarks.workloads import BY_NAME


def test_exponent_of_a_power_law() -> None:
    assert tables.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_share_of_a_training_step_scales_the_step_to_the_batch_of_the_workload() -> None:
    steps = [
        row(workload.name, "none", mode="training step", median=median)
        for workload, median in ((resnet.SMALLER, 4400.0), (resnet.LARGER, 8000.0))
    ]
    of_batch, of_pairs = BY_NAME["CUB ResNet-50"], BY_NAME["pairs K=64 D=256"]
    own = [row(workload.name, EAGER, median=64.0) for workload in (of_batch, of_pairs)]
    numbers = tables.Numbers([*steps, *own])
    assert tables.share(numbers, of_batch, EAGER, 1) == "0.2 %"  # 64 ms of 128 times 0.25 s
    assert tables.share(numbers, of_pairs, EAGER, 1) == "0.2 %"  # of 64 classes, two images each
    assert tables.share(numbers, of_batch, EAGER, 2) == ""
    note = tables.share_note(numbers, 1)
    assert "0.25 s, measured per image at B=32 (at B=16: 0.275 s)" in note
    assert tables.share_note(numbers, 2) == ""
    assert BY_NAME["pairs K=64 D=256"].images == 128


def test_readme_table_is_replaced_between_its_markers_only() -> None:
    start, end = "<!-- some:start -->", "<!-- some:end -->"
    readme = f"before\n{start}\nold\n{end}\nafter\n"
    assert markdown.insert_table(readme, "some", "new\n") == f"before\n{start}\nnew\n{end}\nafter\n"
    with pytest.raises(ValueError, match="some:start"):
        markdown.insert_table("no markers", "some", "new\n")


def test_labels_are_moved_apart_in_their_order() -> None:
    placed = plots.spread_labels([0.5, 0.1, 0.51], 0.1)
    assert placed == pytest.approx([0.5, 0.1, 0.6])
    assert plots.spread_labels([0.98, 0.99, 0.2], 0.1) == pytest.approx([0.9, 1.0, 0.2])


def test_figure_and_report_are_made_from_rows_alone(tmp_path: Path) -> None:
    names = [f"pairs K={k} D=768" for k in (64, 200, 500)]
    rows = [
        row(name, provider, metric=metric, median=10.0 * (i + 1))
        for i, name in enumerate(names)
        for provider in (EAGER, "cwbr reference")
        for metric in ("time_ms", "peak_extra_mb")
    ]
    rows.append(row("pairs K=1000 D=768", median=None, note="out of memory by prediction: 25 GB"))
    numbers = tables.Numbers(rows)
    plots.figure(numbers, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    text = tables.report(numbers)
    assert "| pairs K=200 D=768 | 20.0 ms |" in text
    assert "| pairs K=1000 D=768 | out of memory |" in text
    assert "out of memory: by prediction 25 GB or more" in text
    assert "| pairs K=200 D=768 | 20.0 MB | 1.2 MB | 18.8 MB |" in text


def test_what_a_second_thread_brings_is_told_beside_what_it_brings_at_most() -> None:
    changed = {"metric": scaling.METRIC, "threads": 2}
    peak = row("machine", "measured", mode="machine", median=1.83, **changed)
    own = [
        row("pairs K=200 D=768", "cwbr cpu", mode=mode, median=median, **changed)
        for mode, median in (("forward", 1.7), ("step", 1.812))
    ]
    told = tables.two_threads(tables.Numbers([peak, *own]))
    assert "| the machine's multiply-adds | 1.83 | 1.83 |" in told
    assert "| pairs K=200 D=768 | 1.70 | 1.81 |" in told
    assert "| pairs K=500" not in told
    assert tables.two_threads(tables.Numbers(own)) == "Not measured in turn.\n"


def test_each_kind_of_machine_has_a_report_and_the_readme_shows_the_chosen_one(
    tmp_path: Path,
) -> None:
    for name, milliseconds in (("cpu-a", 10.0), ("cpu-b", 20.0)):
        own = row("pairs K=1000 D=2048", "cwbr cpu", median=milliseconds)
        Results(tmp_path / f"{name}.csv", "abc").add([own])
    files = [str(path) for path in sorted(tmp_path.glob("*.csv"))]
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table:start -->\n<!-- table:end -->\nafter\n")
    for arguments, name, shown in (([], "cpu-a", "10.0 ms"), (["--shown", "cpu-b"], "cpu-b", "20")):
        plots.main([*files, *arguments, "--readme", str(readme)])
        text = readme.read_text()
        assert f"/benchmarks/results/{name}.png)" in text
        assert f"/benchmarks/results/{name}.md)" in text
        assert shown in text
        assert "| all pairs of K=1000, D=2048 |" in text
        assert text.endswith("<!-- table:end -->\nafter\n")
    assert "10.0 ms" in (tmp_path / "cpu-a.md").read_text()
    assert "20.0 ms" in (tmp_path / "cpu-b.md").read_text()
    assert (tmp_path / "cpu-b.png").exists()
