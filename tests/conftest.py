"""Fixtures of several test files: a folder to train in, a web server, an empty cache of the hub, a small CLIP."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.pictures import Server, serving
from tests.made_up import ENGINES, KINDS, Shop, write_prepared, write_tiny_clip

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported, which tests do


def pytest_configure(config: pytest.Config) -> None:
    """Give each worker of pytest-xdist, and what it starts, one thread for torch."""
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def quick_curves() -> Iterator[None]:
    """Write an empty picture instead of a test's curves, which take longer than the training of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("trainer.testing.plot_metric_by_size", "trainer.training_run.plot_training"):
            patch.setattr(name, lambda *given: Image.new("L", (1, 1)).save(given[3]))
        yield


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """Change to an empty folder with data/tiny prepared, and return it."""
    monkeypatch.chdir(tmp_path)
    write_prepared(tmp_path / "data", "tiny", users=20, items=12, pictures=True)
    return tmp_path


@pytest.fixture
def web(monkeypatch) -> Iterator[Server]:
    """Return a running web server; a test sets its pages."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving({}) as server:
        yield server


@pytest.fixture
def encoded(monkeypatch) -> list:
    """Return a list that collects the batches given to the built-in encoders."""
    from datasets.features import image, text

    batches: list = []
    for kind in (text.LexicalEncoder, image.PixelEncoder):
        monkeypatch.setattr(kind, "forward", lambda self, x, f=kind.forward: batches.append(x) or f(self, x))
    return batches


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> str:
    """Return the name of a small random open_clip model whose weights are a file."""
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Return an empty cache of the Hugging Face hub, offline."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """Return the shop of the tests of serving."""
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(params=ENGINES)
def engine(request) -> str:
    return request.param


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    """Return a storage of the item table."""
    return request.param


@pytest.fixture
def r(shop, engine):
    """Open the shop's export in float32 anew."""
    return shop.open(engine)
