"""Draw the README's figures that need no kept results.

python -m media.draw                                  # architecture.png and nesting.png
python -m media.draw --demo_run experiments/runs/...  # also demo.png, from a run's files
"""

from collections.abc import Sequence
from pathlib import Path

from common.cli import Parser, run_cli

MEDIA = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    """Draw into media/."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo_run", type=Path, metavar="FOLDER", help="run of the demo to draw demo.png from")
    parser.add_argument("--out", type=Path, default=MEDIA, metavar="FOLDER", help="folder to write to (default: media)")
    arguments = parser.parse_args(argv)
    from media.pictures import draw_architecture, draw_demo, draw_nesting  # slow imports

    draw_architecture(arguments.out / "architecture.png")
    draw_nesting(arguments.out / "nesting.png")
    if arguments.demo_run:
        draw_demo(arguments.demo_run, arguments.out / "demo.png")


if __name__ == "__main__":
    run_cli(main)
