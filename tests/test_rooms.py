"""The rooms of the house and the order of their imports, read from the code."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
# room -> the rooms that it may import, beside itself
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
LIBRARIES_OF_MODEL = {"torch"}


def files_of(room: str) -> list[Path]:
    """The Python files of a room."""
    alone = REPOSITORY / f"{room}.py"
    return [alone] if alone.exists() else sorted((REPOSITORY / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The top-level names of all that a file imports, wherever in it."""
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


def test_the_model_needs_torch_alone():
    import sys

    for path in files_of("model"):
        others = imports(path) - set(sys.stdlib_module_names) - ROOMS - LIBRARIES_OF_MODEL
        assert others <= {"numpy"}, f"{path.relative_to(REPOSITORY)} imports {sorted(others)}"
