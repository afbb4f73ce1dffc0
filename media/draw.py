"""Draw the README's figures that need no saved results.

python -m media.draw                                  # architecture.png and nesting.png
python -m media.draw --demo_run experiments/runs/...  # also demo.png, the curve of a run of the demo
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from common.cli import Parser, run_cli
from trainer.runs import EVERY_SIZE

MEDIA = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figures into media/."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo_run", type=Path, metavar="FOLDER", help="also copy the curve of this run to demo.png")
    parser.add_argument("--out", type=Path, default=MEDIA, metavar="FOLDER", help="output folder (default: media)")
    arguments = parser.parse_args(argv)
    from media.pictures import draw_architecture, draw_nesting  # slow imports

    draw_architecture(arguments.out / "architecture.png")
    draw_nesting(arguments.out / "nesting.png")
    if arguments.demo_run:
        shutil.copyfile(arguments.demo_run / Path(EVERY_SIZE).with_suffix(".png"), arguments.out / "demo.png")


if __name__ == "__main__":
    run_cli(main)
