"""Exemplar banks: what they promise about determinism, statistics, damaged sources and downloads."""

import hashlib
import http.server
import io
import json
import math
import socket
import sys
import threading
import time
import types
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from ihbook import Store, banks
from ihbook.banks import authors as h5_file
from ihbook.banks import downloads, encoder, load_bank, teach
from ihbook.banks import omniglot as archives
from ihbook.banks.embeddings import RANDOM
from ihbook.banks.glyphs import draw_glyphs
from ihbook.config import BankConfig, RunConfig
from ihbook.engine.train import train

LEARNT = "3edbc70b217d21390f0b9b8b38ecea375b072812d1e3112544e4f5d1993596b2"  # of 24 glyphs in 3 hands, on every machine
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def shared():
    if not SHARED.is_dir():
        pytest.skip(f"the data shared between sessions is not at {SHARED}")
    return SHARED


def downloads_are_from(monkeypatch, url):
    monkeypatch.setattr(archives, "OMNIGLOT_URL", url)
    monkeypatch.setattr(h5_file, "AUTHORS_URL", url)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache per test; no test may reach another machine."""
    monkeypatch.setenv("IHBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    downloads_are_from(monkeypatch, "http://127.0.0.1:1/")  # a port where nobody listens
    return tmp_path / "cache"


@pytest.fixture
def no_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)


def similarity(features):
    """Mean cosine of two exemplars of one class and of two classes, and 20-way one-shot accuracy."""
    n, k = features.shape[:2]
    unit = torch.nn.functional.normalize(features, dim=-1).flatten(0, 1)
    cosine = (unit @ unit.T).view(n, k, n, k).transpose(1, 2)
    same, other = torch.eye(n, dtype=torch.bool), ~torch.eye(k, dtype=torch.bool)
    match = cosine[:, :, 1, 0]  # the second exemplar of each class against the first of every class
    generator = torch.Generator().manual_seed(0)
    ways = torch.stack([torch.randperm(n, generator=generator)[:20] for _ in range(300)])
    hits = match[ways[:, :, None], ways[:, None]].argmax(-1) == torch.arange(20)
    return cosine[same][:, other].mean().item(), cosine[~same].mean().item(), hits.float().mean().item()


# --- generated banks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, embedding, dim", [("glyphs", "auto", 512), ("glyphs", "random", 96), ("gaussian", "auto", 96)])
def test_a_larger_generated_bank_extends_a_smaller_one_bit_for_bit(name, embedding, dim):
    small = load_bank(BankConfig(name, n_classes=70, n_exemplars=2, dim=dim, embedding=embedding))
    large = load_bank(BankConfig(name, n_classes=150, n_exemplars=3, dim=dim, embedding=embedding))
    assert (large.n_classes, large.n_exemplars, large.dim) == (150, 3, dim)
    assert large.features.dtype == torch.float32
    assert torch.equal(large.features[:70, :2], small.features)
    assert small.digest != large.digest
    if name == "glyphs":
        assert torch.equal(large.images[:70, :2], small.images)


@pytest.mark.parametrize("name", ["glyphs", "gaussian", "onehot"])
def test_generated_banks_are_values_of_their_config(name):
    config = BankConfig(name, n_classes=30, n_exemplars=2)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = load_bank(config)
    assert torch.equal(torch.get_rng_state(), torch_state) and np.array_equal(np.random.get_state()[1], numpy_state)
    assert banks._load(config).digest == first.digest
    other = load_bank(BankConfig(name, n_classes=30, n_exemplars=2, seed=1))
    assert (other.digest == first.digest) == (name == "onehot")
    json.dumps(first.metadata)
    assert first.metadata["name"] == name


@pytest.mark.parametrize("embedding, n_draws", [("auto", 1), ("random", 2)])  # also those that set the standardisation
def test_drawn_glyphs_are_kept_and_drawn_again_where_damaged(tmp_path, monkeypatch, embedding, n_draws):
    """A second process reads them; a damaged file, another config or a cache that can't be written make it draw."""
    monkeypatch.setenv("IHBOOK_CACHE", str(tmp_path))
    monkeypatch.setenv("IHBOOK_STORE", str(tmp_path / "store"))
    config, draws = BankConfig(n_classes=20, n_exemplars=2, embedding=embedding), []
    monkeypatch.setattr(banks, "draw_glyphs", lambda *args: draws.append(args) or draw_glyphs(*args))

    def load(config=config):
        draws.clear()
        bank = banks._load(config)  # not from this process's memory
        return bank.digest, torch.equal(bank.images, draw_glyphs(20, 2, config.seed)), len(draws)

    digest, same, n = load()
    assert same and n == n_draws
    [path] = banks.folder().glob("*.safetensors")
    assert load() == (digest, True, 0)
    content = path.read_bytes()
    for damage in (content[:-1] + bytes([content[-1] ^ 1]), b""):
        path.write_bytes(damage)
        assert load() == (digest, True, n_draws) and path.read_bytes() == content
    assert load(replace(config, seed=1))[1:] == (True, n_draws)
    assert Store().prune() == [] and load()[2] == 0
    assert Store(tmp_path / "other").prune(everything=True) == [] and path.exists()  # it is not the cache's only store
    assert path in Store().prune(everything=True) and not path.exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IHBOOK_CACHE", str(tmp_path / "file"))
    assert load() == (digest, True, n_draws)


@pytest.mark.parametrize("embedding", ["auto", "random"])
def test_glyphs_do_not_depend_on_the_thread_count(embedding):
    threads = torch.get_num_threads()
    config = BankConfig(n_classes=40, n_exemplars=2, embedding=embedding)
    digests = set()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            digests.add(banks._load(config).digest)
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


def test_glyphs_look_like_ink_on_paper():
    images = draw_glyphs(400, 5)
    assert images.shape == (400, 5, 28, 28) and images.dtype == torch.uint8
    ink = images.float().mean((2, 3)) / 255
    assert ink.min() > 0.01 and ink.max() < 0.3 and 0.05 < ink.mean() < 0.10  # Omniglot: 0.084
    assert (images.flatten(2).amax(-1) > 200).all()
    assert len(torch.unique(images.flatten(0, 1).flatten(1), dim=0)) == 2000
    grey = (images > 0) & (images < 255)
    assert grey.float().mean() > 0.05  # anti-aliased


@pytest.mark.parametrize("embedding, least, most", [("auto", 0.9, 0.98), ("random", 0.3, 0.9)])
def test_glyphs_are_recognisable_from_one_exemplar(embedding, least, most):
    bank = load_bank(BankConfig(n_classes=300, embedding=embedding))
    within, between, accuracy = similarity(bank.features)
    assert within > between + 0.15
    assert least < accuracy < most  # chance is 0.05; no two hands are alike
    assert bank.features.isfinite().all() and bank.features.min() == 0


def test_glyph_features_are_on_the_scale_of_omniglot_features(shared):
    real = load_bank(BankConfig("authors", path=str(shared / "omniglot_relu.h5"))).features
    drawn = load_bank(BankConfig(n_classes=242, embedding="random")).features
    for statistic in (torch.mean, torch.std, lambda x: x.norm(dim=-1).mean()):
        assert statistic(drawn).item() == pytest.approx(statistic(real).item(), rel=0.1)
    for ours, theirs in zip(similarity(drawn), similarity(real), strict=True):
        assert ours == pytest.approx(theirs, abs=0.12)


def test_gaussian_and_onehot():
    gaussian = load_bank(BankConfig("gaussian", n_classes=100, dim=256))
    within, between, accuracy = similarity(gaussian.features)
    assert within == pytest.approx(1 / (1 + 0.25**2), abs=0.01) and abs(between) < 0.01 and accuracy == 1
    assert gaussian.features.std().item() == pytest.approx(1, abs=0.02) and gaussian.images is None
    onehot = load_bank(BankConfig("onehot", n_classes=7, n_exemplars=2, dim=512))
    assert onehot.features.shape == (7, 2, 7)
    assert torch.equal(onehot.features[:, 1], torch.eye(7))


def test_what_a_bank_cannot_use_is_refused():
    with pytest.raises(ValueError, match="embedding='resnet18'.*'auto', 'random'"):
        load_bank(BankConfig("glyphs", embedding="resnet18"))
    with pytest.raises(ValueError, match="embedding='random'.*'auto'"):
        load_bank(BankConfig("onehot", embedding="random"))
    with pytest.raises(ValueError, match="path='some.h5'.*drop path"):
        load_bank(BankConfig("glyphs", path="some.h5"))


# --- the authors' file -----------------------------------------------------------------------------------------------


def h5_bytes(features, name=h5_file.AUTHORS_DATASET):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file[name] = features
    return buffer.getvalue()


def features(shape=(6, 3, 512), dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def authors(path, **kwargs):
    return load_bank(BankConfig("authors", path=str(path), **{"n_exemplars": 2, **kwargs}))


def test_authors_file_is_read_in_its_own_order(tmp_path):
    values, path = features(), tmp_path / "bank.h5"
    path.write_bytes(h5_bytes(values))
    bank = authors(path)
    assert np.array_equal(bank.features.numpy(), values[:, :2]) and bank.images is None
    assert bank.metadata["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert np.array_equal(authors(path, n_classes=4, n_exemplars=3).features.numpy(), values[:4])


@pytest.mark.parametrize(
    "content, message",
    [
        (h5_bytes(features(), "resnet18/224/labels"), "no dataset 'resnet18/224/feat'.*'resnet18/224/labels'"),
        (h5_bytes(features(), "resnet18/224/feat/x"), "no dataset 'resnet18/224/feat'.*'resnet18/224/feat/x'"),
        (h5_bytes(features((6, 512))), r"float32 \[6, 512\], not float32 \[class, exemplar, dim\]"),
        (h5_bytes(features((0, 3, 512))), r"float32 \[0, 3, 512\]"),
        (h5_bytes(features(dtype=np.float64)), "float64"),
        (h5_bytes(features((6, 3, 64))), "dim 64, not dim=512; set dim"),
        (h5_bytes(features((6, 1, 512))), "n_exemplars=2 but .* has 1; ask for fewer"),
        (h5_bytes(np.where(features() > 3, np.nan, features())), r"NaN or infinite features, the first at \["),
        (h5_bytes(np.where(features() > 3, np.float32(np.inf), features())), "NaN or infinite"),
        (h5_bytes(np.ones((6, 3, 512), np.float32)), "zero variance"),
        (b"PK\3\4 is no HDF5", "not a whole HDF5 file.*path=None"),
        (b"", "not a whole HDF5 file"),
    ],
)
def test_unusable_authors_files_are_named_with_their_remedy(tmp_path, content, message):
    path = tmp_path / "bank.h5"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        authors(path)


def test_truncated_or_damaged_h5_is_refused_or_read_whole(tmp_path):
    whole, path = h5_bytes(features()), tmp_path / "bank.h5"
    for length in np.linspace(1, len(whole) - 1, 40).astype(int):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="bank.h5 is not a whole HDF5 file"):
            authors(path)
    refused = 0
    for position in range(0, 800, 16):  # the part of the file that is not features
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            authors(path)
        except ValueError:
            refused += 1
    assert refused > 5


def test_missing_authors_file(tmp_path):
    for path in (tmp_path / "nowhere.h5", tmp_path):
        with pytest.raises(FileNotFoundError, match="is not a file; .*path=None"):
            authors(path)


# --- Omniglot --------------------------------------------------------------------------------------------------------


def png(seed, size=105):
    """A page with a few thick dark lines."""
    edge = size // 5
    rng = np.random.default_rng(seed)
    page = np.full((size, size), 255, np.uint8)
    for at in rng.integers(10, size - 14, 3):
        page[at : at + 4, edge:-edge] = 0
        page[edge:-edge, -at : 4 - at] = 0
    buffer = io.BytesIO()
    Image.fromarray(page).convert("1").save(buffer, "png")
    return buffer.getvalue()


def omniglot_zip(path, characters, drawers=3, page=png):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/x/A/c1/._0001_01.png", b"not an image")
        for i, character in enumerate(characters):
            for drawer in range(1, drawers + 1):
                archive.writestr(f"{path.stem}/{character}/{i:04d}_{drawer:02d}.png", page(hash((i, drawer)) % 997))
    return path


NAMES = [f"{alphabet}/character{n:02d}" for alphabet in ("Aa", "Bb") for n in (1, 2, 3)]


def omniglot(path, embedding="random", n_exemplars=2, **kwargs):
    path = None if path is None else str(path)
    return load_bank(BankConfig("omniglot", path, n_exemplars=n_exemplars, embedding=embedding, **kwargs))


def test_omniglot_is_the_same_from_a_zip_a_folder_of_zips_and_extracted_images(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    path = omniglot_zip(folder / "images_background.zip", NAMES)
    bank = omniglot(path)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "extracted")
    assert omniglot(folder).digest == omniglot(tmp_path / "extracted").digest == bank.digest
    assert (bank.n_classes, bank.n_exemplars, bank.dim) == (6, 2, 512)
    assert bank.images.shape == (6, 2, 28, 28) and bank.images.dtype == torch.uint8
    assert bank.images.max() > 200 and bank.images.float().mean() < 80  # dark ink became light on black
    assert sorted(bank.metadata["classes"]) == NAMES
    assert bank.metadata["archives_sha256"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    json.dumps(bank.metadata)


def test_omniglot_order_is_a_matter_of_the_seed_and_duplicates_count_once(tmp_path):
    omniglot_zip(tmp_path / "images_background_small1.zip", NAMES)
    omniglot_zip(tmp_path / "images_background_small2.zip", NAMES[3:] + ["Cc/character01"])
    first, again, other = (omniglot(tmp_path, seed=seed) for seed in (0, 0, 1))
    assert sorted(first.metadata["classes"]) == [*NAMES, "Cc/character01"]
    assert first.digest == again.digest and first.metadata["classes"] != other.metadata["classes"]
    few = omniglot(tmp_path, n_classes=3)
    assert few.metadata["classes"] == first.metadata["classes"][:3]
    assert torch.equal(few.images, first.images[:3])


@pytest.mark.parametrize("side", [28, 60, 105])
def test_omniglot_of_any_side_is_learnt_from_the_other_alphabets(tmp_path, side):
    path = omniglot_zip(tmp_path / "images.zip", [*NAMES, "Greek/character01"], page=lambda seed: png(seed, side))
    learnt, every = omniglot(path, "auto"), omniglot(path, "random")
    assert sorted(learnt.metadata["classes"]) == NAMES and len(every.metadata["classes"]) == 7  # Greek trained the encoder
    assert learnt.features.shape == (6, 2, 512) and learnt.images.shape[2:] == (28, 28)
    assert learnt.metadata["embedding"].startswith("learnt on 764 characters") and learnt.metadata["embedding"] != RANDOM
    encoded = encoder.learnt_features(learnt.images, 512, "omniglot")
    assert torch.equal(encoded, learnt.features)


def test_all_of_real_omniglot(shared):
    """Shuffled, embedded, split, trained: the whole path, on the 20 alphabets that did not train the encoder and on all 50."""
    path = shared / "omniglot_28.zip"
    bank = omniglot(path, "auto", n_exemplars=5)
    assert bank.n_classes == 659 and not {name.split("/")[0] for name in bank.metadata["classes"]} & archives.BACKGROUND
    assert len(archives.BACKGROUND) == 30
    within, between, accuracy = similarity(bank.features)
    assert accuracy > 0.85 and within > between + 0.25 and bank.features.square().mean() == pytest.approx(1, abs=0.15)
    every = omniglot(path, "random", n_exemplars=5)
    assert every.features.shape == (1623, 5, 512) and similarity(every.features)[2] < accuracy
    run = RunConfig(bank=BankConfig("omniglot", str(path), n_exemplars=5), n_sequences=3200, lr=1e-3, eval_every=0)
    [result] = train([run], progress=False)
    assert result.metrics["value"].notna().all() or result.metrics.empty


def test_learnt_features_are_exact(tmp_path):
    """Whatever the batch, the threads and the order of sums: every number is a multiple of a power of two that float64 holds."""
    images = draw_glyphs(24, 3)
    whole = encoder.learnt_features(images, 512, "glyphs")
    assert torch.equal(torch.stack([encoder.learnt_features(image, 512, "glyphs") for image in images]), whole)
    numbers, record = encoder.load("glyphs")
    x = images.flatten(0, 1)[:, None].double() / 256
    for i in range(4):  # by PyTorch's own convolution, which sums in another order
        x = torch.nn.functional.max_pool2d(x, 2) if i else x
        weight = numbers[f"{i}.weight"] * 2.0 ** -numbers[f"{i}.exponent"].double().view(-1, 1, 1, 1)
        y = torch.nn.functional.conv2d(x, weight, numbers[f"{i}.bias"].double() * encoder.GRID, padding=1)
        x = ((y / encoder.GRID).round() * encoder.GRID).relu()
    assert torch.equal(x.sum((2, 3)), encoder.encode(images.flatten(0, 1), numbers))
    assert hashlib.sha256(whole.numpy().tobytes()).hexdigest() == LEARNT
    for name, kind in (("weight", torch.int8), ("exponent", torch.int8), ("bias", torch.int32)):
        assert all(numbers[f"{i}.{name}"].dtype == kind for i in range(4))
    assert float(record["one_shot_accuracy"]) > 0.9
    assert sum(encoder.weights_path(kind).stat().st_size for kind in encoder.KINDS) < 2e6
    with pytest.raises(ValueError, match="dim=64 but the learnt encoder has 512"):
        encoder.learnt_features(images, 64, "glyphs")


def test_no_bank_has_the_characters_that_trained_the_encoder():
    with pytest.raises(ValueError, match="trained the learnt encoder; choose another seed"):
        load_bank(BankConfig(seed=encoder.GLYPH_SEED))
    assert load_bank(BankConfig(seed=encoder.GLYPH_SEED, n_classes=20, embedding="random")).n_classes == 20


def test_teaching_makes_whole_numbers_that_tell_characters_apart(tmp_path):
    """A short training, far below the shipped one's, is already better than chance; what is written is read as it was."""
    images = draw_glyphs(60, 6, 5)
    numbers = teach.whole_numbers(teach.teach(images[:40], teach.Recipe(epochs=2, batch=40)))
    accuracy, scale = teach.judge(numbers, images[40:])
    assert accuracy > 0.25 and math.isfinite(scale)  # chance is 0.05
    features = encoder.encode(images[40:].flatten(0, 1), numbers)
    assert float((features * scale).square().mean()) == pytest.approx(1, rel=1e-6)
    shuffled = features.unflatten(0, (20, 6))[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    assert teach.one_shot(torch.randn(200, 20, 512, generator=torch.Generator().manual_seed(0))) == pytest.approx(0.05, abs=0.02)
    assert teach.one_shot(shuffled) == pytest.approx(accuracy, abs=0.03)


def test_real_omniglot(shared):
    bank = omniglot(shared, n_exemplars=5)
    assert bank.features.shape == (242, 5, 512) and len(set(bank.metadata["classes"])) == 242
    real = load_bank(BankConfig("authors", path=str(shared / "omniglot_relu.h5"))).features
    for statistic in (torch.mean, torch.std, lambda x: x.norm(dim=-1).mean()):
        assert statistic(bank.features).item() == pytest.approx(statistic(real).item(), rel=0.1)
    for ours, theirs in zip(similarity(bank.features), similarity(real), strict=True):
        assert ours == pytest.approx(theirs, abs=0.03)


def test_unusable_omniglot_sources_are_named_with_their_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist; give images_background.zip"):
        omniglot(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no alphabet/character/NNNN_EE.png in .*; give"):
        omniglot(tmp_path)
    empty = omniglot_zip(tmp_path / "empty.zip", [])
    with pytest.raises(ValueError, match="no alphabet/character/NNNN_EE.png in .*empty.zip"):
        omniglot(empty)
    path = omniglot_zip(tmp_path / "images.zip", NAMES)
    with pytest.raises(ValueError, match=r"n_exemplars=4 but (Aa|Bb)/character0\d has 3; ask for fewer"):
        omniglot(path, n_exemplars=4)
    small = omniglot_zip(tmp_path / "small.zip", NAMES, page=lambda seed: png(seed, 27))
    with pytest.raises(ValueError, match=r"drawer 1 is \(27, 27\); it must be a square of at least 28 pixels"):
        omniglot(small)
    sides = iter([60] * 5 + [61] * 100)
    mixed = omniglot_zip(tmp_path / "mixed.zip", NAMES, page=lambda seed: png(seed, next(sides)))
    with pytest.raises(ValueError, match=r"is \(6[01], 6[01]\), the first \(6[01], 6[01]\); give images of one size"):
        omniglot(mixed)
    with pytest.raises(ValueError, match="all alphabets in .* trained the shipped encoder.*images_evaluation.zip too, or choose "
                                         "embedding='random'"):
        omniglot(omniglot_zip(tmp_path / "known.zip", ["Greek/character01", "Latin/character01"]), "auto")
    blank = omniglot_zip(tmp_path / "blank.zip", NAMES, page=lambda seed: png(1))
    with pytest.raises(ValueError, match="blank.zip.* zero variance"):
        omniglot(blank)
    broken = omniglot_zip(tmp_path / "broken.zip", NAMES, page=lambda seed: png(seed)[:80])
    with pytest.raises(ValueError, match="by drawer 1 is damaged.*give"):
        omniglot(broken)


def test_truncated_or_damaged_zips_are_refused_or_read_whole(tmp_path):
    whole = omniglot_zip(tmp_path / "images.zip", NAMES).read_bytes()
    good, path = omniglot(tmp_path / "images.zip").digest, tmp_path / "damaged.zip"
    for length in np.linspace(0, len(whole) - 1, 20).astype(int):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged.zip is not a whole zip file.*give"):
            omniglot(path)
    refused = 0
    contents = whole.index(b"PK\1\2")  # no checksum covers the names in the directory after the images
    for position in range(0, contents, contents // 60):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            assert omniglot(path).digest == good
        except ValueError as error:
            refused += 1
            assert "is damaged" in str(error) and "give images_background.zip" in str(error)
    assert refused > 15


# --- ResNet-18 -------------------------------------------------------------------------------------------------------


class Pooling(torch.nn.Module):
    """A stand-in for torchvision's ResNet-18, with 512 pooled pixels in place of 512 activations."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(512, 1000)

    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224) and not self.training
        self.seen = x
        return self.fc(torch.nn.functional.adaptive_avg_pool2d(x, (16, 32))[:, 0].flatten(1))


@pytest.fixture
def fake_torchvision(monkeypatch):
    models = types.ModuleType("torchvision.models")
    models.ResNet18_Weights = types.SimpleNamespace(IMAGENET1K_V1="imagenet")
    models.made = []

    def resnet18(weights):
        assert weights == "imagenet"
        models.made.append(Pooling())
        return models.made[-1]

    models.resnet18 = resnet18
    package = types.ModuleType("torchvision")
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return models


def test_resnet18_features_are_made_once(tmp_path, cache, fake_torchvision, embedding="resnet18"):
    path = omniglot_zip(tmp_path / "images.zip", NAMES)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank = omniglot(path, embedding)
    assert torch.equal(torch.get_rng_state(), state)
    assert bank.features.shape == (6, 2, 512) and bank.metadata["embedding"].startswith("resnet18")
    white = torch.tensor([(1 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))])
    torch.testing.assert_close(fake_torchvision.made[0].seen[0, :, 0, 0], white)
    assert bank.features[0, 0, 0].item() == pytest.approx(white[0].item(), rel=1e-5)
    assert omniglot(path, embedding).digest == bank.digest and len(fake_torchvision.made) == 1

    (cached,) = cache.iterdir()
    content = bytearray(cached.read_bytes())
    content[len(content) // 2] ^= 0xFF
    cached.write_bytes(content)
    assert omniglot(path, embedding).digest == bank.digest and len(fake_torchvision.made) == 2
    cached.write_bytes(content[:100])
    assert omniglot(path, embedding).digest == bank.digest and len(fake_torchvision.made) == 3
    assert omniglot(path, embedding, seed=1).digest != bank.digest


def test_resnet18_that_cannot_be_kept_is_still_used(tmp_path, cache, fake_torchvision):
    cache.write_text("a file where the folder should be")
    path = omniglot_zip(tmp_path / "images.zip", NAMES)
    with pytest.warns(UserWarning, match="can't be kept.*IHBOOK_CACHE"):
        assert omniglot(path, "resnet18").metadata["embedding"].startswith("resnet18")


def test_without_torchvision_resnet18_says_the_remedy(tmp_path, no_torchvision):
    path = omniglot_zip(tmp_path / "images.zip", NAMES)
    with pytest.raises(RuntimeError, match="pip install torchvision.*or choose embedding='random'"):
        omniglot(path, "resnet18")


def test_resnet18_has_512_dimensions(tmp_path, fake_torchvision):
    path = omniglot_zip(tmp_path / "images.zip", NAMES)
    with pytest.raises(ValueError, match="dim=64 but ResNet-18 has 512; set dim=512"):
        omniglot(path, "resnet18", dim=64)


def test_weights_out_of_reach_are_like_no_torchvision(tmp_path, fake_torchvision, monkeypatch):
    def resnet18(weights):
        socket.create_connection(("127.0.0.1", 1))

    monkeypatch.setattr(fake_torchvision, "resnet18", resnet18)
    patience = socket.getdefaulttimeout()
    with pytest.raises(RuntimeError, match="ConnectionRefusedError.*embedding='random'"):
        omniglot(omniglot_zip(tmp_path / "images.zip", NAMES), "resnet18")
    assert socket.getdefaulttimeout() == patience


# --- downloads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine in place of GitHub, which serves the folder `root`; `asked` lists the requests."""
    root = tmp_path / "served"
    root.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(root))

        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        downloads_are_from(monkeypatch, f"http://127.0.0.1:{httpd.server_port}/")
        yield types.SimpleNamespace(root=root, asked=asked)
        httpd.shutdown()


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def test_authors_file_is_downloaded_once_and_verified_each_time(server, cache, monkeypatch):
    content = h5_bytes(features((8, 2, 512)))
    (server.root / h5_file.AUTHORS_FILE).write_bytes(content)
    monkeypatch.setattr(h5_file, "AUTHORS_BLOB", blob_id(content))
    config = BankConfig("authors", n_exemplars=2)
    bank = load_bank(config)
    assert bank.n_classes == 8 and len(server.asked) == 1
    assert load_bank(config).digest == bank.digest and len(server.asked) == 1
    cached = cache / h5_file.AUTHORS_FILE
    assert list(cache.iterdir()) == [cached]
    cached.write_bytes(content[:-1] + b"x")
    assert load_bank(config).digest == bank.digest and len(server.asked) == 2
    assert cached.read_bytes() == content


def test_wrong_bytes_for_the_authors_file_leave_nothing_behind(server, cache):
    (server.root / h5_file.AUTHORS_FILE).write_bytes(h5_bytes(features()))
    with pytest.raises(RuntimeError, match="not the expected file.*git blob id .* not 9eb588c5.*path="):
        load_bank(BankConfig("authors"))
    assert list(cache.iterdir()) == []


def test_omniglot_archives_are_downloaded_once_and_verified_each_time(server, cache, monkeypatch):
    config = BankConfig("omniglot", n_exemplars=2, embedding="random")
    omniglot_zip(server.root / "images_background.zip", NAMES)
    omniglot_zip(server.root / "images_evaluation.zip", ["Zz/character01"])
    with pytest.raises(RuntimeError, match="images_background.zip is not the expected file.*path="):
        load_bank(config)
    assert list(cache.iterdir()) == []
    md5 = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in sorted(server.root.iterdir())}
    monkeypatch.setattr(archives, "OMNIGLOT_MD5", md5)
    server.asked.clear()
    bank = load_bank(config)
    assert bank.n_classes == 7 and set(bank.metadata["archives_sha256"]) == set(md5) and len(server.asked) == 2
    assert load_bank(config).digest == bank.digest and len(server.asked) == 2
    (cache / "images_evaluation.zip").write_bytes(b"damaged")
    assert load_bank(config).digest == bank.digest and len(server.asked) == 3


@pytest.mark.parametrize("name", ["authors", "omniglot"])
def test_no_network_is_said_within_seconds(name, cache, monkeypatch):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="could not download http.*check the network.*IHBOOK_CACHE.*path="):
        load_bank(BankConfig(name))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts the connection and never answers
        downloads_are_from(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}/")
        monkeypatch.setattr(downloads, "TIMEOUT", 0.5)
        with pytest.raises(RuntimeError, match="could not download"):
            load_bank(BankConfig(name))
    assert time.monotonic() - began < 8
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_missing_page_and_an_unwritable_cache_are_errors(server, cache, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="could not download.*404"):
        load_bank(BankConfig("authors"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IHBOOK_CACHE", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="IHBOOK_CACHE"):
        load_bank(BankConfig("authors"))


def test_the_cache_is_the_users_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("IHBOOK_CACHE")
    assert "ihbook" in str(downloads.cache_dir())
    monkeypatch.setenv("IHBOOK_CACHE", "/elsewhere")
    assert downloads.cache_dir() == Path("/elsewhere")
