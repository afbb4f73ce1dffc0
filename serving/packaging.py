"""Build the package fmrlrec for `pip install .`: the serving runtime, without the training code.

In a clone the runtime imports the rooms common/ and datasets/ by these names. Installed, such names would shadow other
packages (Hugging Face's library is called datasets, too). So the build copies every module that the runtime imports
into fmrlrec/ and renames the imports. pyproject.toml names the classes; setuptools calls them.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = ("serving", "serving.recommender", "serving.recommend", "serving.http")
RENAMED = {"serving": "fmrlrec", "common": "fmrlrec.common", "datasets": "fmrlrec.datasets"}  # copied rooms
TRAINING = {"config", "dataloader", "model", "trainer"}  # a module that imports one of them stays in the clone
IMPORT = re.compile(r"^(\s*from )(serving|common|datasets)(?=[. ])", re.MULTILINE)


class BuildRuntime(build_py):
    """Replaces setuptools' build_py, which copies packages as they are."""

    def run(self) -> None:
        """Write fmrlrec/ into the build folder."""
        shutil.rmtree(Path(self.build_lib, "fmrlrec"), ignore_errors=True)  # a module may have moved since
        for name, source in runtime_modules().items():
            renamed = re.sub(r"^\w+", lambda room: RENAMED[room[0]], name)
            target = Path(self.build_lib, *renamed.split("."))
            target = target / "__init__.py" if source.name == "__init__.py" else target.with_suffix(".py")
            target.parent.mkdir(parents=True, exist_ok=True)
            text = IMPORT.sub(lambda found: found[1] + RENAMED[found[2]], source.read_text(encoding="utf-8"))
            target.write_text(text, encoding="utf-8")

    def get_source_files(self) -> list[str]:
        """Return the files that a source distribution needs."""
        return [str(path.relative_to(ROOT)) for path in (*runtime_modules().values(), Path(__file__).resolve())]


class RefuseEditable(editable_wheel):
    """Stops `pip install -e`, which would install serving/ without renamed imports."""

    def run(self) -> None:
        raise SetupError("pip install -e is not supported; use `import serving` in the clone, or pip install .")


def runtime_modules() -> dict[str, Path]:
    """Return module name -> source file of everything that ENTRIES import, directly or through other modules."""
    found: dict[str, Path] = {}
    todo = list(ENTRIES)
    while todo:
        name = todo.pop()
        source = ROOT.joinpath(*name.split("."))
        source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
        if name in found or name.split(".")[0] not in RENAMED or not source.exists():
            continue
        imported = list(imported_names(source))
        if not TRAINING & {module.split(".")[0] for module in imported}:
            found[name] = source
            todo += [*imported, name.rpartition(".")[0]]  # and the package that the module is in
    return dict(sorted(found.items()))


def imported_names(source: Path) -> Iterator[str]:
    """Yield the modules that a file imports when it runs; of `from a import b`, a and a.b, since b may be a module."""
    nodes = list(ast.walk(ast.parse(source.read_text(encoding="utf-8"))))
    for_types = [node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for node in set(nodes).difference(*map(ast.walk, for_types)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
