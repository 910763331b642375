"""A small folder of speech, checkpoints on disk, and a bundle, for the tests of the road."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from edgefuse import store
from edgefuse.lower import Chunks
from edgefuse.pipeline import Order, Verified, export
from edgefuse.speech import shipped
from tests.conftest import a_checkpoint

SECONDS = 2.0
FUSIONFORMER = Path(__file__).parents[2] / "demo_app" / "shared" / "models" / "fusionformer-tiny"
ONE_LAYER = {"dimension": 8, "layers": 1, "heads": 2, "feed_forward": 12, "kernel": 3, "subsampling_channels": 2}


@pytest.fixture(scope="session")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two shortest utterances of the shipped test set."""
    return some_of_the_shipped_speech(tmp_path_factory.mktemp("speech"), slice(2))


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight others of them."""
    return some_of_the_shipped_speech(tmp_path_factory.mktemp("calibration"), slice(2, 10))


def some_of_the_shipped_speech(folder: Path, which: slice) -> Path:
    """A folder of speech with some utterances of the shipped test set, the shortest first."""
    lines = (shipped() / "manifest.tsv").read_text(encoding="utf-8").splitlines()
    rows = sorted((line.split("\t") for line in lines[1:]), key=lambda row: (float(row[4]), row[0]))[which]
    for row in rows:
        (folder / row[1]).parent.mkdir(exist_ok=True)
        shutil.copyfile(shipped() / row[1], folder / row[1])
        assert hashlib.sha256((folder / row[1]).read_bytes()).hexdigest() == row[6]
    (folder / "manifest.tsv").write_text("\n".join([lines[0], *("\t".join(row) for row in rows)]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def whole_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FusionFormer of one layer, on disk; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints") / "fusionformer"
    store.write_checkpoint(folder, a_checkpoint("batch", **ONE_LAYER))
    return folder


@pytest.fixture
def checkpoint_folder(whole_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(whole_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def order(speech: Path) -> Order:
    """The reference target, one entry of two seconds, the small folder of speech."""
    return Order(("reference",), seconds=(SECONDS,), speech=speech)


@pytest.fixture(scope="session")
def whole_bundle(whole_checkpoint: Path, order: Order, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one artifact; not to be changed."""
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    assert export(whole_checkpoint, folder, order).passed
    return folder


@pytest.fixture(scope="session")
def both(order: Order, tmp_path_factory: pytest.TempPathFactory) -> Verified:
    """The shipped model, whole utterances and chunks in one artifact; not to be changed."""
    folder = tmp_path_factory.mktemp("both") / "bundle"
    return export(FUSIONFORMER, folder, replace(order, chunks=(Chunks(640, 1280),)))


@pytest.fixture(scope="session")
def both_from_samples(order: Order, tmp_path_factory: pytest.TempPathFactory) -> Verified:
    """The same, but it hears samples."""
    folder = tmp_path_factory.mktemp("samples") / "bundle"
    return export(FUSIONFORMER, folder, replace(order, chunks=(Chunks(640, 1280),), hears="pcm"))


@pytest.fixture(scope="session")
def looking_ahead(order: Order, tmp_path_factory: pytest.TempPathFactory) -> Verified:
    """The shipped model in chunks that wait for what is ahead of them, from samples; not to be changed."""
    folder = tmp_path_factory.mktemp("ahead") / "bundle"
    chunks = Chunks(320, 1280, look_ahead_ms=320)
    return export(FUSIONFORMER, folder, replace(order, seconds=(), chunks=(chunks,), hears="pcm"))


@pytest.fixture
def bundle_folder(whole_bundle: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(whole_bundle, tmp_path / "bundle"))
