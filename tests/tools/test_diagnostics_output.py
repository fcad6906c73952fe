"""Reports as a page, as a picture and as TensorBoard events."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cwbr_fused.diagnostics import report, write_report, write_tensorboard
from cwbr_fused.diagnostics.images import thumbnails

MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
EXTRA = MATPLOTLIB and importlib.util.find_spec("jinja2") is not None
needs_extra = pytest.mark.skipif(not EXTRA, reason="needs matplotlib and Jinja2")
METHODS = (("cross-entropy", 0), ("$CWBR_{", 100))
VOID = {"meta", "br", "img"}
HOSTILE_NAMES = ["<b>&", "\"quoted'", "<script>alert(1)</script>", "木/未", "$x$_{y", ""]
HOSTILE_LAYERS = ["<i>&layer", "_hidden.0"]


def some_report(step: int | None = None, **options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step or 0)
    y = torch.arange(60) % 6
    z = torch.randn(60, 8, generator=generator) + y[:, None] / 3
    logits = torch.randn(60, 6, generator=generator)
    features = dict(zip(HOSTILE_LAYERS, (z, z[:, :2]), strict=True))
    norms = {"ce_norm": 1.0, "reg_norm": 0.0, "cosine": -0.25}
    gradients = {HOSTILE_LAYERS[0]: norms}
    usual: dict[str, Any] = {"class_names": HOSTILE_NAMES, "gradients": gradients, "step": step}
    return report(features, logits, y, train=(features, y), **usual | options)


class Page(HTMLParser):
    """The text, the tags and the attributes of a page; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def page(tmp_path: Path, what: Any, **options: Any) -> tuple[str, Page]:
    path = tmp_path / "report.html"
    write_report(path, what, **options)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@needs_extra
def test_page_parses_and_shows_every_pair_and_layer_with_its_name_escaped(tmp_path: Path) -> None:
    what = some_report()
    text, parsed = page(tmp_path, what)
    shown = {name for pair in what["pairs"] for name in pair["names"]}
    assert shown == set(HOSTILE_NAMES)
    assert {*shown, *HOSTILE_LAYERS} - {""} <= set(parsed.texts)
    assert not {"b", "i", "script"} & (set(parsed.tags) - {"b"})
    assert "<b>&" not in text
    assert "<script" not in text


@needs_extra
def test_page_reaches_for_nothing_outside_itself(tmp_path: Path) -> None:
    images = {k: torch.rand(3, 8, 8) for k in range(6)}
    text, parsed = page(tmp_path, [some_report(0), some_report(5)], images=images)
    without_data = re.sub(r'(url\(|src=)"data:[^"]*"', "", text)
    assert not re.search(r"https?:|//|@import|src=|href=", without_data)
    assert not {"link", "script", "iframe"} & set(parsed.tags)


@needs_extra
def test_page_draws_each_image_once_and_only_those_of_shown_classes(tmp_path: Path) -> None:
    asked = []

    def find(k: int) -> Tensor | None:
        asked.append(k)
        return torch.full((5, 4), k, dtype=torch.uint8) if k % 2 else None

    what = some_report(pairs=torch.tensor([[1, 2], [3, 2]]))
    text, _ = page(tmp_path, what, images=find)
    assert asked == [1, 2, 3]
    assert text.count("data:image/png") == 2


def decoded(image: Tensor) -> Tensor:
    """The image as a page holds it, read by matplotlib: (H, W, 3) in [0, 255]."""
    from matplotlib.image import imread

    from cwbr_fused.diagnostics.page import png_url

    url = png_url(thumbnails({1: image}, [1])[1])
    png = base64.b64decode(url.removeprefix("data:image/png;base64,"), validate=True)
    return torch.from_numpy(imread(io.BytesIO(png), format="png")[..., :3] * 255).round()


@needs_extra
@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_images_keep_their_pixels(channels: int | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (channels or 1, 7, 5), generator=generator, dtype=torch.uint8)
    image = pixels if dtype == torch.uint8 else (pixels / 255).to(dtype)
    shown = decoded(image if channels else image[0])
    assert (shown - pixels.expand(3, -1, -1).permute(1, 2, 0)).abs().max() <= (dtype != torch.uint8)


@needs_extra
def test_normalized_images_are_stretched_and_large_ones_shrunk() -> None:
    ramp = torch.linspace(-2, 3, 6).expand(4, 6)
    expected = torch.tensor([0, 51, 102, 153, 204, 255.0])
    assert torch.equal(decoded(ramp)[..., 0], expected.expand(4, 6))
    assert decoded(torch.rand(3, 400, 200)).shape == (96, 48, 3)
    broken = torch.tensor([[0.0, float("nan")], [1.0, float("inf")]])
    assert decoded(broken)[..., 0].tolist() == [[0, 0], [255, 0]]
    assert (decoded(torch.full((2, 2), 7.0)) == 0).all()


def drawn(histories: Any) -> Any:
    """The overview."""
    from cwbr_fused.diagnostics.arguments import checked_histories
    from cwbr_fused.diagnostics.figure import overview

    return overview(checked_histories(histories), {})


def panels(histories: Any) -> dict[str, Any]:
    """The axes of the overview by title."""
    return {ax.get_title(): ax for ax in drawn(histories).axes}


@needs_extra
@pytest.mark.parametrize("layer", HOSTILE_LAYERS)
def test_overlap_of_each_layer_and_method_is_drawn_over_the_steps(layer: str) -> None:
    histories = {name: [some_report(k + shift) for k in (0, 10, 30)] for name, shift in METHODS}
    ax = panels(histories)[f"overlap, {layer}"]
    for line, history in zip(ax.lines, histories.values(), strict=True):
        steps, values = line.get_data()
        assert list(steps) == [r["step"] for r in history]
        assert list(values) == [r["layers"][layer]["overlap"] for r in history]
        low, high = ax.get_ylim()
        assert max(values) - min(values) > (high - low) / 4  # a change is seen
    assert ax.get_xlabel() == "step"
    assert ax.get_ylabel() == "per dimension"


@needs_extra
def test_gradient_that_cwbr_added_is_drawn_for_each_layer() -> None:
    norms = {"ce_norm": 4.0, "reg_norm": 3.0, "cosine": 0.5}
    what = some_report(2, gradients=dict.fromkeys(HOSTILE_LAYERS, norms))
    by_title = panels(what)
    assert [bar.get_height() for bar in by_title["gradient added by CWBR"].patches] == [75, 75]
    assert "gradient added by CWBR" not in panels(some_report(2, gradients=None))


@needs_extra
def test_single_report_has_no_charts_over_steps_and_undefined_numbers_no_panel() -> None:
    by_title = panels(some_report(3))
    assert "accuracy" not in by_title
    assert "linear probe" in by_title
    assert "separation of the pairs" not in panels(without_numbers())


@needs_extra
def test_pairs_that_change_over_time_are_pointed_out(tmp_path: Path) -> None:
    fixed = {"pairs": torch.tensor([[0, 1], [2, 3]])}
    steady, _ = page(tmp_path, [some_report(0, **fixed), some_report(1, **fixed)])
    moving, _ = page(tmp_path, [some_report(0, count=2), some_report(1, count=2)])
    warning = "most confused at its step"
    assert warning in moving
    assert warning not in steady


@needs_extra
def test_reports_that_went_through_json_write_the_same_page(tmp_path: Path) -> None:
    history = [some_report(0), some_report(1)]
    loaded = json.loads(json.dumps(history, allow_nan=False))
    assert page(tmp_path, loaded)[0] == page(tmp_path, history)[0]


def without_numbers() -> dict[str, Any]:
    """One class: no pairs, nothing measured."""
    return report({"a": torch.randn(4, 3)}, torch.randn(4, 2), torch.zeros(4).long(), step=3)


@needs_extra
def test_page_of_no_pairs_says_so(tmp_path: Path) -> None:
    _, parsed = page(tmp_path, without_numbers())
    assert any("fewer than two classes" in text for text in parsed.texts)


@needs_extra
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_picture_is_written_whatever_the_names(tmp_path: Path, steps: int) -> None:
    from matplotlib.image import imread

    history = [some_report(step, count=3) for step in range(steps)] or without_numbers()
    write_report(tmp_path / "report.PNG", history, images={0: torch.rand(9, 7)})
    assert imread(tmp_path / "report.PNG", format="png").std() > 0.02


@needs_extra
def test_picture_numbers_classes_it_cannot_write_and_shortens_long_names() -> None:
    names = ["\U0010fffd", "finch"] + ["a name too long to be shown"] * 4
    figure = drawn(some_report(0, class_names=names, pairs=torch.tensor([[0, 1], [2, 3]])))
    texts = {text.get_text() for ax in figure.axes for text in ax.texts}
    assert {"class 0", "finch", "a name t… be shown"} <= texts


@needs_extra
def test_picture_is_a_slide() -> None:
    layers = {f"layer{k}": torch.randn(60, 4) for k in range(4)}
    y = torch.arange(60) % 6
    history = [
        report(layers, torch.randn(60, 6), y, train=(layers, y), step=step) for step in (0, 1)
    ]
    width, height = drawn(history).get_size_inches()
    assert 1.4 < width / height < 1.9


WITHOUT_EXTRA = """
import sys
import cwbr_fused
import torch
from cwbr_fused.diagnostics import report, write_report, write_tensorboard
what = report({"a": torch.randn(8, 3)}, torch.randn(8, 2), torch.arange(8) % 2, step=1)
assert not {m for m in sys.modules if m.split(".")[0] in ("matplotlib", "jinja2", "tensorboard")}

sys.modules["matplotlib"] = None  # as if it were not installed
for name in ("/report.png", "/report.html"):
    try:
        write_report(sys.argv[1] + name, what)
    except ImportError as error:
        assert "cwbr_fused[report]" in str(error)
    else:
        raise AssertionError

class Writer:
    def add_scalar(self, *args): pass
    add_text = add_scalar
    def add_figure(self, *args): raise AssertionError

write_tensorboard(Writer(), what)
"""


def test_reports_and_events_need_no_other_package_and_files_name_the_extra(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_EXTRA, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())


class Writer:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}
        self.texts: dict[str, str] = {}
        self.figures: list[str] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert tag not in self.scalars
        self.scalars[tag] = value, step

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts[tag] = text

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        self.figures.append(tag)


def test_every_defined_number_is_logged_at_the_step() -> None:
    what, writer = some_report(5), Writer()
    write_tensorboard(writer, what)
    assert {step for _, step in writer.scalars.values()} == {5}
    values = {tag: value for tag, (value, _) in writer.scalars.items()}
    top = ("accuracy", "cross_entropy", "regularizer", "scale", "error_rate")
    expected = {f"cwbr/{key}": what[key] for key in top}
    for layer, measures in what["layers"].items():
        defined = {key: value for key, value in measures.items() if value is not None}
        expected |= {f"cwbr_{key}/{layer}": value for key, value in defined.items()}
    assert values == expected
    assert f"cwbr_cosine/{HOSTILE_LAYERS[0]}" in values
    assert f"cwbr_cosine/{HOSTILE_LAYERS[1]}" not in values
    assert writer.figures == (["cwbr/confusion"] if MATPLOTLIB else [])


def test_step_of_the_call_goes_before_that_of_the_report() -> None:
    writer = Writer()
    write_tensorboard(writer, some_report(5), 8)
    assert {step for _, step in writer.scalars.values()} == {8}


def test_names_cannot_break_the_table_of_pairs() -> None:
    writer = Writer()
    names = ["a|b", "<img>", "c\nd", "*e*", "f", "g"]
    write_tensorboard(writer, some_report(1, class_names=names))
    lines = writer.texts["cwbr/pairs"].splitlines()
    assert len(lines) == 2 + 15
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {6}
    assert "<img>" not in writer.texts["cwbr/pairs"]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None or not MATPLOTLIB,
    reason="needs tensorboard and matplotlib",
)
def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    what = report({"a": torch.randn(12, 3)}, torch.randn(12, 3), torch.arange(12) % 3)
    with SummaryWriter(str(tmp_path)) as writer:
        write_tensorboard(writer, what, 4, images={0: torch.rand(4, 4)})
    events = EventAccumulator(str(tmp_path)).Reload()
    (rho,) = events.Scalars("cwbr_rho/a")
    assert (rho.step, rho.value) == (4, pytest.approx(what["layers"]["a"]["rho"]))
    assert events.Tags()["images"] == ["cwbr/confusion"]
    assert "cwbr/pairs/text_summary" in events.Tags()["tensors"]


REPORT = some_report(3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: write_report(p / "a.pdf", REPORT), ValueError, "path.*html"),
        (lambda p: write_report(p / "a.html", 3), TypeError, "report"),
        (lambda p: write_report(p / "a.html", []), ValueError, "report"),
        (lambda p: write_report(p / "a.html", {"pairs": []}), ValueError, "report.*layers"),
        (lambda p: write_report(p / "a.html", [REPORT, 3]), TypeError, "report\\[1\\]"),
        (lambda p: write_report(p / "a.html", [REPORT, REPORT]), ValueError, "report\\[1\\].*step"),
        (
            lambda p: write_report(p / "a.html", [some_report(), REPORT]),
            ValueError,
            "report\\[0\\]\\['step'\\]",
        ),
        (lambda p: write_report(p / "a.html", {}), ValueError, "report"),
        (lambda p: write_report(p / "a.html", {"x": 3}), TypeError, "report\\['x'\\]"),
        (lambda p: write_report(p / "a.html", REPORT, images=3), TypeError, "images"),
        (lambda p: write_report(p / "a.html", REPORT, images={0: 3}), TypeError, "images\\[0\\]"),
        (
            lambda p: write_report(p / "a.html", REPORT, images={0: torch.rand(2, 4, 4)}),
            ValueError,
            "images\\[0\\].*\\(3, H, W\\)",
        ),
        (
            lambda p: write_report(p / "a.html", REPORT, images={0: torch.ones(4, 4).long()}),
            TypeError,
            "images\\[0\\].*uint8",
        ),
        (lambda p: write_tensorboard(object(), REPORT), TypeError, "writer.*add_scalar"),
        (lambda p: write_tensorboard(Writer(), [REPORT]), TypeError, "report"),
        (lambda p: write_tensorboard(Writer(), some_report()), ValueError, "step"),
        (lambda p: write_tensorboard(Writer(), REPORT, -2), ValueError, "step"),
    ],
)
def test_wrong_arguments_are_named(
    tmp_path: Path, call: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call(tmp_path)
    assert not list(tmp_path.iterdir())
