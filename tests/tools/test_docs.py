"""The documentation tells the truth: every Python snippet runs, and both first pages agree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).parents[2]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?:python|sh)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Imported by snippets; an environment without one skips the snippet.
LIBRARIES = (
    "timm",
    "torchvision",
    "pytorch_metric_learning",
    "lightning",
    "transformers",
    "accelerate",
)
# The home page shows the lines to add in the middle of somebody's loop.
FRAGMENT = "cwbr = cwbr_fused.CWBR(num_classes=200)\nfeatures = cwbr.catch(model)\n..."


def snippets() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for number, code in enumerate(PYTHON.findall(page.read_text())):
            if not code.startswith(FRAGMENT):
                yield f"{page.stem}-{number}", code


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "code"), list(snippets()), ids=lambda value: value.splitlines()[0]
)
def test_every_snippet_runs(
    name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in LIBRARIES:
        if re.search(rf"(import|from) .*\b{library}\b", code):
            pytest.importorskip(library, exc_type=Exception)
    monkeypatch.chdir(tmp_path)  # where a snippet may write
    torch.manual_seed(0)
    exec(compile(code, name, "exec"), {"__name__": "snippet"})


def test_the_chinese_first_page_shows_the_same_code() -> None:
    english, chinese = (
        BLOCK.findall((CHECKOUT / name).read_text()) for name in ("README.md", "README.zh-TW.md")
    )
    assert len(english) == 3
    assert chinese == english


def test_the_first_page_is_short_and_its_pictures_show_elsewhere() -> None:
    text = (CHECKOUT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert pictures
    assert all(address.startswith("https://") for address in pictures)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
