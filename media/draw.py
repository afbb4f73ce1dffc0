"""Draw the README's figures that need no saved results.

python -m media.draw                                  # architecture.png and nesting.png
python -m media.draw --demo_run experiments/runs/...  # also demo.png, from a run of the demo
"""

from collections.abc import Sequence
from pathlib import Path

from common.cli import Parser, run_cli

MEDIA = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figures into media/."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo_run", type=Path, metavar="FOLDER", help="also draw demo.png, from this run of the demo")
    parser.add_argument("--out", type=Path, default=MEDIA, metavar="FOLDER", help="output folder (default: media)")
    arguments = parser.parse_args(argv)
    from media.pictures import draw_architecture, draw_demo, draw_nesting  # slow imports

    draw_architecture(arguments.out / "architecture.png")
    draw_nesting(arguments.out / "nesting.png")
    if arguments.demo_run:
        draw_demo(arguments.demo_run, arguments.out / "demo.png")


if __name__ == "__main__":
    run_cli(main)
