"""After training: export one size of a run, and serve it.

`pip install .` installs the runtime of this folder as the package fmrlrec (serving/packaging.py).
"""

from typing import TYPE_CHECKING, Any

from common.errors import InputError

if TYPE_CHECKING:
    from serving.recommender import Recommender

__all__ = ["InputError", "Recommender", "__version__"]


def __getattr__(name: str) -> Any:
    """Import Recommender when it is used, so that `python -m serving.hub` does not import serving.hub twice.

    Looks up __version__ too: the installed package's, or in a clone the one in pyproject.toml.
    """
    if name == "Recommender":
        from serving.recommender import Recommender

        return Recommender
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if __name__ == "fmrlrec":
        from importlib.metadata import version

        return version(__name__)
    import tomllib
    from pathlib import Path

    return tomllib.loads(Path(__file__).parent.with_name("pyproject.toml").read_text("utf-8"))["project"]["version"]
