"""What is in the package, and that the README's commands are the ones that are checked."""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

import m2f_hf
from m2f_hf.hub.code import code_files
from m2f_hf.hub.families import IMAGES, VIDEOS


if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MODULES = sorted((ROOT / "m2f_hf").rglob("*.py"))
# From the top: a room imports from itself and from rooms below it.
ROOMS = ["cli", "training", "metrics", "data", "inference", "draw"]
ROOMS += ["hub", "model", "loss", "processing", "known", "kernels"]


def test_version_is_the_same_everywhere():
    assert m2f_hf.__version__ == PROJECT["project"]["version"]
    changelog = (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.M)[1] == m2f_hf.__version__


def test_installed_package_has_every_file_of_the_source():
    # Building leaves a description in the source tree, which is found first and says nothing of what was installed.
    elsewhere = [
        each
        for each in metadata.distributions(name="m2f_hf")
        if Path(each.locate_file("")).resolve() != ROOT
        and '"editable": true' not in (each.read_text("direct_url.json") or "")
    ]
    if not elsewhere:
        pytest.skip("m2f_hf is not installed, or in place: the tests run from the source tree")
    distribution = elsewhere[0]
    installed = {str(file) for file in distribution.files if str(file).startswith("m2f_hf/")}
    source = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "m2f_hf").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert source - installed == set()


def test_public_names_exist():
    assert [name for name in m2f_hf.__all__ if not hasattr(m2f_hf, name)] == []
    assert set(m2f_hf.__all__) <= set(dir(m2f_hf))


def test_command_is_declared():
    assert PROJECT["project"]["scripts"] == {"m2f": "m2f_hf.cli.main:main"}


def test_licence_files_are_there():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "arXiv:2112.01527" in (ROOT / "NOTICE").read_text()


@pytest.mark.parametrize("command", ["pip install .", "m2f demo --output out", 'pip install ".[test]"', "pytest"])
def test_readme_commands_are_run_by_ci(command):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```bash\n(.*?)```", readme, re.S))
    assert command in code
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("pip install -q", "pip install")
    lines = [line.split("#")[0] for line in script.splitlines() if not line.lstrip().startswith("echo")]
    assert any(re.search(rf"(^|[ =1]){re.escape(command)}( |$)", line) for line in lines)


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere outside of `try:`, relative imports left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_every_import_of_what_runs_a_model_is_a_declared_dependency():
    declared = {re.split(r"[><=\[; ]", dependency)[0] for dependency in PROJECT["project"]["dependencies"]}
    declared = {{"pillow": "PIL"}.get(name, name) for name in declared}
    needs_more = {"data", "metrics", "training"}  # what `m2f_hf[train]` brings
    base = [path for path in MODULES if not needs_more & set(path.relative_to(ROOT).parts)]
    undeclared = {path.name: imports(path) - declared - sys.stdlib_module_names for path in base}
    assert {name: found for name, found in undeclared.items() if found} == {}


def test_rooms_import_downwards():
    upwards = []
    for path in MODULES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) < 3:
            continue  # `__init__.py` and `auto.py` put the rooms together
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                source = [*parts[: -node.level], *(node.module or "").split(".")]
                if source[1] in ROOMS and ROOMS.index(source[1]) < ROOMS.index(parts[1]):
                    upwards.append(f"{'/'.join(parts)}:{node.lineno} imports from {source[1]}")
    assert upwards == []


@pytest.mark.parametrize("family", [IMAGES, VIDEOS], ids=["images", "videos"])
def test_published_modules_import_from_modules(family):
    """`code_files` raises where one imports from a package, which `transformers` would not follow."""
    assert len(code_files(family)) > 10


def test_every_room_says_in_one_sentence_what_is_in_it():
    for room in ROOMS:
        tree = ast.parse((ROOT / "m2f_hf" / room / "__init__.py").read_text(encoding="utf-8"))
        assert re.fullmatch(r"[^.]+\.", ast.get_docstring(tree).split("\n\n")[0]), room
