"""Fixtures shared by all tests."""

import os
import sys
from pathlib import Path


# Set before any test module imports huggingface_hub: the suite never reaches for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before torch is imported, for the scripts that tests start, too.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

import pytest


REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with reference data, which is next to the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference data folder `shared` next to the repository")
    return SHARED


@pytest.fixture(scope="session")
def goldens(shared: Path) -> Path:
    """Return the recorded inputs and outputs of the original Mask2Former, one folder for each model."""
    folder = shared / "goldens"
    if not folder.is_dir():
        pytest.skip("needs the recorded outputs of the original in `shared/goldens`")
    return folder


@pytest.fixture(autouse=True)
def transformers_warns():
    """Turn transformers' warnings on again: scripts turn them off for their process, and some tests wait for them."""
    from transformers.utils import logging

    logging.set_verbosity_warning()


@pytest.fixture(params=[True, False], ids=["by oneDNN", "by PyTorch's choice"])
def by_onednn(request, monkeypatch):
    """Whether oneDNN multiplies what it can, however few rows there are and whatever the processor is."""
    from m2f_hf.kernels import products

    monkeypatch.setattr(products, "_mkl_leaves_instructions_unused", lambda: request.param)
    monkeypatch.setattr(products, "_LEAST_ROWS", 1)
    products._onednn_linear.cache_clear()
    if request.param and products._onednn_linear() is None:
        pytest.skip("this PyTorch has no such operator for this machine")
    yield request.param
    products._onednn_linear.cache_clear()


@pytest.fixture(scope="module")
def load_measure(tmp_path_factory):
    """Return `evaluate.load`, with its caches in a temporary folder, and check that nothing is stored there."""
    evaluate = pytest.importorskip("evaluate")
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(cache / "modules"))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(cache / "metrics"))
        patch.setattr(sys, "path", list(sys.path))
        yield evaluate.load
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        del sys.modules[name]  # imported from this cache
    assert list(cache.rglob("*.arrow")) == []
