"""Fixtures shared by all tests."""

import os
from pathlib import Path


# Set before any test module imports huggingface_hub: the suite never reaches for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest


REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the source tree the tests lie in."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with reference data, kept next to the repository rather than in it."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference data folder `shared` next to the repository")
    return SHARED


@pytest.fixture(scope="session")
def goldens(shared: Path) -> Path:
    """Recorded inputs and outputs of the original Mask2Former, one folder for each model."""
    folder = shared / "goldens"
    if not folder.is_dir():
        pytest.skip("needs the recorded outputs of the original in `shared/goldens`")
    return folder


@pytest.fixture(autouse=True)
def transformers_warns():
    """Scripts quieten transformers for their process; here that would deafen the tests that listen to it."""
    from transformers.utils import logging

    logging.set_verbosity_warning()
