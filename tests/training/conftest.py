"""Fixtures of the tests that train."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from runs import save_small_model, write_config


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums depend on the number of threads in their last digits; the processes started here have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps the precision of a process's first run for all others."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def config(tmp_path) -> Path:
    return write_config(tmp_path / "config.json")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A checkpoint of the small model with the classes of the shapes."""
    return save_small_model(tmp_path_factory.mktemp("small") / "small-model")
