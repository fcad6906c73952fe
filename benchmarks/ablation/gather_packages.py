"""Writes data/packages.tsv: one-line descriptions of Debian packages, and the section of each.

Reads the index `Packages` of an archive; the one used is named in data/README.md:

    python -m benchmarks.ablation.gather_packages Packages
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from benchmarks.ablation.settings import PACKAGES

TEXTS = {"train": 50, "val": 20, "test": 60}  # of each section
# These say what a package is for the archive, not what is in it.
NO_CONTENT = {"debug", "localization", "metapackages", "oldlibs", "tasks"}
# Two texts that share more of their words than this count as one.
NEAR_COPY = 0.75
FIELD = re.compile(r"^(Package|Source|Section|Description): (.*)$", re.MULTILINE)
WORD = re.compile(r"[^\W\d_]+")


class Package(NamedTuple):
    source: str
    section: str
    text: str


def packages(index: str) -> Iterator[Package]:
    """Those of an index whose section is about content."""
    for paragraph in index.split("\n\n"):
        fields = dict(FIELD.findall(paragraph))
        section = fields.get("Section", "").rpartition("/")[2]
        if section and section not in NO_CONTENT:
            source = (fields.get("Source") or fields["Package"]).split()[0]
            yield Package(source, section, fields["Description"])


def one_of_each_source(found: Iterable[Package]) -> list[Package]:
    """Of each source that in its rarest section; in an order that tells nothing."""
    sources = defaultdict(list)
    for package in found:
        sources[package.source].append(package)
    size = Counter(section for own in sources.values() for section in {p.section for p in own})
    chosen = [min(own, key=lambda p: (size[p.section], p)) for own in sources.values()]
    return sorted(chosen, key=lambda p: sha256(p.source.encode()).digest())


def without_near_copies(texts: Iterable[Package]) -> Iterator[Package]:
    """Those of two words or more that are not nearly one before; a number is no word."""
    kept: list[frozenset[str]] = []
    having: defaultdict[str, list[int]] = defaultdict(list)  # which of these a word is in
    for package in texts:
        words = frozenset(WORD.findall(package.text.lower()))
        shared = Counter(chain.from_iterable(having[word] for word in words))
        if len(words) > 1 and not any(
            count > NEAR_COPY * (len(words) + len(kept[other]) - count)
            for other, count in shared.items()
        ):
            for word in words:
                having[word].append(len(kept))
            kept.append(words)
            yield package


def lines(texts: Iterable[Package]) -> Iterator[str]:
    """Part, section and text, of every section with enough texts."""
    sections = defaultdict(list)
    for package in texts:
        sections[package.section].append(package.text)
    for section, own in sorted(sections.items()):
        if len(own) >= sum(TEXTS.values()):
            left = iter(own)
            for part, count in TEXTS.items():
                yield from (f"{part}\t{section}\t{next(left)}\n" for _ in range(count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index", type=Path)
    index = parser.parse_args().index.read_text(encoding="utf-8")
    chosen = lines(without_near_copies(one_of_each_source(packages(index))))
    PACKAGES.path.write_text("".join(chosen), encoding="utf-8")


if __name__ == "__main__":
    main()
