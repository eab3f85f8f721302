"""Penn Treebank: every word in its place, every file verified, no silent fallback."""

import hashlib
import http.client
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from datamodules import PTBDataModule
from datamodules import ptb as ptb_module
from datamodules import source as source_module
from datamodules.source import EMBEDDED, EmbeddedDataWarning
from datamodules.synthetic import WordSource

REAL = Path(os.environ.get("APPROXDROP_DATA", "/nonexistent")) / "ptb"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="APPROXDROP_DATA names no folder with ptb/")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    """Isolate the tests from this machine's data folder and torchtext cache."""
    monkeypatch.delenv("APPROXDROP_DATA", raising=False)
    monkeypatch.setattr(ptb_module, "TORCHTEXT_CACHE", tmp_path / "cache")


def write(folder, train="a b c\nb c\n", valid="a c\n", test="c a b d\n"):
    folder.mkdir(parents=True, exist_ok=True)
    for part, text in {"train": train, "valid": valid, "test": test}.items():
        (folder / f"ptb.{part}.txt").write_text(text)
    return folder


@pytest.fixture
def small_treebank(monkeypatch, tmp_path):
    """Expect the MD5 checksums of the files that ``write`` writes."""
    for part in ptb_module.MD5:
        content = (write(tmp_path / "md5") / f"ptb.{part}.txt").read_bytes()
        monkeypatch.setitem(ptb_module.MD5, part, hashlib.md5(content).hexdigest())
    shutil.rmtree(tmp_path / "md5")


def published(folder):
    data = PTBDataModule(folder, source="files", batch_size=1)
    data.prepare_data()
    data.setup()
    return data


def own(folder, **options):
    data = PTBDataModule(text=folder, **{"batch_size": 1} | options)
    data.prepare_data()
    data.setup()
    return data


def test_a_byte_order_mark_is_no_word(tmp_path):
    plain, marked = own(write(tmp_path / "plain")), write(tmp_path / "marked")
    for path in marked.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = own(marked)
    assert found.vocab == plain.vocab
    assert found.num_tokens == plain.num_tokens
    assert torch.equal(found._test[0][0], plain._test[0][0])


@real_data
def test_the_published_counts():
    data = PTBDataModule(REAL.parent, source="files")
    data.setup()
    assert data.num_tokens == {"train": 929_589, "valid": 73_760, "test": 82_430}
    assert data.vocab_size == 10_000
    assert data.data_source.startswith("files")
    assert data.best_perplexity is None
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == targets.shape == (35, 20)
    # The first stream starts like the text.
    assert [data.vocab[i] for i in inputs[:3, 0]] == ["aer", "banknote", "berlitz"]


@real_data
def test_vocabulary_and_fraction():
    data = PTBDataModule(REAL.parent, source="files", vocabulary=2000, fraction=0.2)
    data.setup()
    assert data.vocab_size == 2000
    assert data.vocab.count("<unk>") == 1
    assert data.num_tokens["train"] == int(929_589 * 0.2)
    assert data.num_tokens["valid"] == 73_760


@real_data
@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader"])
@pytest.mark.parametrize("streams", [1, 10, 7])
def test_every_word_but_the_first_is_scored_once_and_after_its_predecessor(loader, streams):
    data = PTBDataModule(REAL.parent, source="files", eval_batch_size=streams)
    data.setup()
    inputs, targets = (torch.cat(parts).t().reshape(-1) for parts in zip(*getattr(data, loader)(), strict=True))
    part = {"val_dataloader": "valid", "test_dataloader": "test"}[loader]
    words = (REAL / f"ptb.{part}.txt").read_text().replace("\n", "<eos>").split()
    text = torch.tensor([data.vocab.index(word) for word in words[:1000]])
    scored = targets != -100
    assert int(scored.sum()) == data.num_tokens[part] - 1
    assert torch.equal(targets[scored][:-1], inputs[scored][1:])
    assert torch.equal(inputs[:1000], text)


def test_training_streams_go_on_from_batch_to_batch(tmp_path):
    words = [f"w{i}" for i in range(103)]
    data = own(write(tmp_path / "ptb", train=" ".join(words)), batch_size=4, unroll=7)
    batches = list(data.train_dataloader())
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    assert torch.equal(inputs[1:], targets[:-1])
    text = [data.vocab.index(w) for w in [*words, "<eos>"]]
    steps = len(text) // 4
    for stream in range(4):
        assert inputs[:, stream].tolist() == text[stream * steps : (stream + 1) * steps - 1]
    assert [len(x) for x, _ in batches] == [7, 7, 7, 4]


def test_unknown_words_and_line_ends(tmp_path):
    data = own(write(tmp_path / "ptb"))
    assert set(data.vocab) == {"a", "b", "c", "<eos>", "<unk>"}
    _, targets = next(iter(data.test_dataloader()))
    assert [data.vocab[t] for t in targets.t().reshape(-1) if t >= 0] == ["a", "b", "<unk>", "<eos>"]


@pytest.mark.parametrize("layout", ["ptb", ".", "datasets/PennTreebank"])
def test_layouts(tmp_path, small_treebank, layout):
    write(tmp_path / layout)
    assert published(tmp_path).num_tokens["train"] == 7


def test_a_torchtext_cache_is_found(tmp_path, small_treebank):
    folder = write(tmp_path / "cache" / "datasets" / "PennTreebank")
    data = published(tmp_path / "elsewhere")
    assert str(folder) in data.data_source


@pytest.mark.parametrize("prefix", ["", "wiki.", "ptb."])
def test_a_text_of_ones_own_needs_no_md5_and_no_name(tmp_path, prefix):
    for part, text in {"train": "a b\n", "valid": "b a\n", "test": "a c\n"}.items():
        (tmp_path / f"{prefix}{part}.txt").write_text(text)
    (tmp_path / "contrain.txt").write_text("no part")
    data = own(tmp_path)
    assert (data.num_tokens["train"], data.data_kind) == (3, "files")
    assert data.data_source == f"files ({tmp_path})"


def test_a_text_of_ones_own_that_is_not_there_or_there_twice_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"text={tmp_path}: no train.txt or NAME.train.txt there"):
        own(tmp_path)
    write(tmp_path)
    (tmp_path / "train.txt").write_text("a")
    with pytest.raises(ValueError, match="one train.txt expected, train.txt, ptb.train.txt found"):
        own(tmp_path)
    with pytest.raises(ValueError, match="source must be auto or files, got 'embedded'"):
        PTBDataModule(text=tmp_path, source="embedded")


def test_the_embedded_text():
    data = PTBDataModule(source="embedded")
    data.prepare_data()
    data.setup()
    assert data.num_tokens == {"train": 214_127, "valid": 21_919, "test": 20_176}
    assert data.vocab_size == 5_138
    assert data.data_source == "two novels by Jane Austen (214,127 words, embedded)"
    inputs, _ = next(iter(data.train_dataloader()))
    assert [data.vocab[i] for i in inputs[:5, 0]] == ["pride", "and", "prejudice", "by", "jane"]
    share = sum(int((x == data.vocab.index("<unk>")).sum()) for x, _ in data.test_dataloader()) / 20_175
    assert 0 < share < 0.05
    assert (EMBEDDED / "austen.train.txt.bz2").stat().st_size < 300_000


def test_a_corrupted_file_is_named_with_both_md5s_and_never_replaced(tmp_path):
    write(tmp_path / "ptb")
    for source in ("files", "auto"):
        with pytest.raises(
            ValueError, match=r"ptb.train.txt is not .*f26c4b92c5fdc7b3f8c7cdcb991d8420 expected, \w{32}"
        ):
            PTBDataModule(tmp_path, source=source).prepare_data()


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path / "ptb")
    (tmp_path / "ptb" / "ptb.test.txt").unlink()
    with pytest.raises(ValueError, match="incomplete: missing .*ptb.test.txt"):
        PTBDataModule(tmp_path).prepare_data()


def test_no_files_is_said_with_the_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="looked in .*datasets/PennTreebank"):
        PTBDataModule(tmp_path, source="files").prepare_data()


@pytest.mark.parametrize("error", [OSError("no network"), http.client.IncompleteRead(b"no network", 9)])
def test_the_fall_back_is_loud_and_a_demanded_download_fails(tmp_path, monkeypatch, error):
    message = "no network" if isinstance(error, OSError) else "IncompleteRead"

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(ptb_module.urllib.request, "urlopen", refuse)
    data = PTBDataModule(tmp_path)
    monkeypatch.setattr(source_module, "_probe", lambda url: None)
    with pytest.warns(EmbeddedDataWarning, match=f"{message}.*What is embedded is used instead"):
        data.prepare_data()
    data.setup()
    assert data.data_kind == "embedded"
    assert data.best_perplexity is None
    with pytest.raises(ConnectionError, match=message):
        PTBDataModule(tmp_path, source="download").prepare_data()
    assert not list(tmp_path.rglob("*.part"))


@real_data
@pytest.mark.parametrize("damaged", [False, True])
def test_a_download_is_checked_before_it_is_used(tmp_path, monkeypatch, damaged):
    def serve(url, timeout):
        path = tmp_path / "served.txt"
        shutil.copy(REAL / url.rsplit("/", 1)[1], path)
        if damaged:
            path.write_bytes(path.read_bytes()[:-100])
        return path.open("rb")

    monkeypatch.setattr(ptb_module.urllib.request, "urlopen", serve)
    data = PTBDataModule(tmp_path / "data", source="download")
    if damaged:
        with pytest.raises(ValueError, match="MD5"):
            data.prepare_data()
        assert not [p for p in (tmp_path / "data").rglob("*") if p.is_file()]
    else:
        data.prepare_data()
        assert PTBDataModule(tmp_path / "data", source="files")._folder == tmp_path / "data" / "ptb"


def test_the_synthetic_source_has_the_entropy_that_it_claims():
    """The mean surprise of a drawn text under its own source is the entropy rate.

    Per-word surprises have a standard deviation below 2.5 nats (asserted); of 40,000 weakly dependent ones the
    mean deviates by more than 0.08 with probability below 1e-6, allowing for correlation.
    """
    source = WordSource.make(seed=3, vocabulary=200)
    text = source.text(40_000, seed=1)
    surprise = -source.transitions[text[:-1], text[1:]].log()
    assert surprise.std() < 2.5
    assert surprise.mean().item() == pytest.approx(source.entropy, abs=0.08)
    assert torch.allclose(source.transitions.sum(1), torch.ones(200, dtype=torch.float64))
    counts = torch.bincount(text, minlength=200) / len(text)
    assert (counts - source.stationary).abs().max() < 0.02


def test_the_best_perplexity_is_that_of_an_oracle_on_the_batches():
    """The deviation is below 2.5 nats per word (see above): 0.1 is 4 standard errors of 9,999 words."""
    data = PTBDataModule(source="synthetic")
    data.setup()
    inputs, targets = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    scored = targets != -100
    surprise = -WordSource.make(seed=0).transitions[inputs[scored], targets[scored]].log()
    assert surprise.mean().item() == pytest.approx(math.log(data.best_perplexity), abs=0.1)


@pytest.mark.parametrize("vocabulary", [2, 7])
def test_the_smallest_vocabularies_have_a_source_too(vocabulary):
    data = PTBDataModule(source="synthetic", vocabulary=vocabulary)
    data.setup()
    assert data.vocab_size == vocabulary
    assert 1 < data.best_perplexity < vocabulary


def test_synthetic_text_is_reproducible_and_private():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    modules = [PTBDataModule(source="synthetic", vocabulary=100) for _ in range(2)]
    for data in modules:
        data.setup()
    # Checked before any loader is read: reading draws one number, as every DataLoader does.
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*(torch.cat([x for x, _ in data.train_dataloader()]) for data in modules))
    assert data.vocab_size == 100
    assert data.best_perplexity < 100
    assert math.isfinite(data.best_perplexity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "web"}, "source must be one of auto, files, download, embedded, synthetic, got 'web'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"unroll": 0}, "unroll must be"),
        ({"vocabulary": 1}, "vocabulary must be a whole number of at least 2, got 1"),
        ({"fraction": 0}, r"fraction must be in \(0, 1\], got 0"),
        ({"fraction": 1.5}, "got 1.5"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PTBDataModule(**arguments)


def test_a_text_too_short_for_the_streams_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size=50 streams need at least 100 words"):
        own(write(tmp_path / "ptb"), batch_size=50)


def test_own_files_that_cannot_be_scored_or_read_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"the valid text needs at least 2 words to score one, there are 0"):
        own(write(tmp_path / "empty" / "ptb", valid=""))
    folder = write(tmp_path / "latin" / "ptb")
    (folder / "ptb.test.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"ptb.test.txt is not UTF-8 text"):
        own(folder)
