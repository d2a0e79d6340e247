"""Module paths from before the package had rooms still work, with a warning."""

import importlib
import sys
import warnings

import pytest

import m2f_hf
from m2f_hf._lazy import MOVED_MODULES


@pytest.mark.parametrize("old", MOVED_MODULES)
def test_old_modules_give_the_names_of_the_new_ones(old):
    old_module = importlib.import_module(f"m2f_hf.{old}")
    new = f"m2f_hf.{MOVED_MODULES[old][0]}"
    defined = vars(importlib.import_module(new)).items()
    name, value = next((name, value) for name, value in defined if getattr(value, "__module__", "") == new)
    with pytest.warns(DeprecationWarning, match=rf"m2f_hf\.{old}\.{name} is now {new}\.{name}"):
        assert getattr(old_module, name) is value


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        (
            "import m2f_hf.visualization; found = m2f_hf.visualization.draw_segments",
            "m2f_hf.draw.segments:draw_segments",
        ),
        ("from m2f_hf.data.masks import run_lengths as found", "m2f_hf.processing.rle:run_lengths"),
        ("from m2f_hf.cli import BUNDLED_MODEL as found", "m2f_hf:BUNDLED_MODEL"),
        ("from m2f_hf.cli import Segmenter as found", "m2f_hf:Segmenter"),
    ],
)
def test_old_imports_warn_at_the_line_that_has_them(statement, value):
    scope = {}
    with pytest.warns(DeprecationWarning, match="the old name goes in version") as caught:
        exec(compile(statement, "a_users_script.py", "exec"), scope)
    assert {each.filename for each in caught} == {"a_users_script.py"}
    module, _, name = value.partition(":")
    assert scope["found"] is getattr(importlib.import_module(module), name)


def test_names_of_rooms_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec("from m2f_hf.cli import main; from m2f_hf.hub import Figure, HubFolder, model_card, result_files", {})


def test_names_that_never_were_are_missing():
    for module in (m2f_hf, sys.modules["m2f_hf.visualization"], importlib.import_module("m2f_hf.cli")):
        assert not hasattr(module, "never_was")
        assert not hasattr(module, "__wrapped__")
