"""Imports between the packages point down only."""

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
# package -> the packages that it may import beside itself
BELOW = {
    "common": set(),
    "config": {"common"},
    "datasets": {"common", "config"},
    "dataloader": {"common", "config", "datasets"},
    "model": {"config"},
    "trainer": {"common", "config", "datasets", "dataloader", "model"},
    "serving": {"common", "config", "datasets", "dataloader", "model", "trainer"},
}
ROOMS = {*BELOW, "train", "eval", "experiments", "benchmarks", "media", "tests"}
LIBRARIES_OF_MODEL = {"torch", "numpy"}


def files_of(room: str) -> list[Path]:
    """Return the Python files of a package."""
    alone = REPOSITORY / f"{room}.py"
    return [alone] if alone.exists() else sorted((REPOSITORY / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Return the top-level names of every import in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize("room", BELOW)
def test_imports_point_down(room):
    assert files_of(room)
    for path in files_of(room):
        above = imports(path) & ROOMS - BELOW[room] - {room}
        assert not above, f"{path.relative_to(REPOSITORY)} imports {sorted(above)}"


def test_the_model_needs_torch_and_numpy_alone():
    for path in files_of("model"):
        others = imports(path) - set(sys.stdlib_module_names) - ROOMS - LIBRARIES_OF_MODEL
        assert not others, f"{path.relative_to(REPOSITORY)} imports {sorted(others)}"
