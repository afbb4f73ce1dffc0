"""Recommend items with an export.

python -m serving.recommend exports/beauty-64 --history B004756YJA,B004ZT0SSG --top_k 10

Installed, the same command is called fmrlrec-recommend.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from common.cli import Parser, run_cli
from common.errors import InputError
from serving.engines import ENGINES
from serving.recommender import Recommender


def main(argv: Sequence[str] | None = None) -> None:
    """Print the recommendations as a table or as JSON."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the export, as serving.export printed it")
    parser.add_argument(
        "--history", default="", metavar="ID,ID", help="item ids or numbers, oldest first (default: empty)"
    )
    parser.add_argument("--top_k", type=int, default=10, metavar="N", help="how many items to recommend (default: 10)")
    parser.add_argument("--candidates", metavar="ID,ID", help="rank only these items (default: all)")
    parser.add_argument("--keep_history", action="store_true", help="also recommend items of the history")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="what computes the answers (default: onnx if the export has graphs, else torch)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    recommender = Recommender.from_pretrained(arguments.folder, arguments.engine)
    items = recommender.items

    def split(text: str) -> list[str | int]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        # A number, unless the catalogue has an id that looks like one.
        return [int(p) if not items.number(p) and p.isdecimal() and str(int(p[:18])) == p else p for p in parts]

    history = split(arguments.history)
    if history and not any(items.numbers(history)):
        raise InputError(
            f"--history {arguments.history!r}: {items.unknown(history)}; give ids of this catalogue, "
            f"separated by commas, or leave --history out for a new user"
        )
    (answer,) = recommender.recommend(
        [history],
        top_k=arguments.top_k,
        exclude_history=not arguments.keep_history,
        candidates=None if arguments.candidates is None else split(arguments.candidates),
    )
    if arguments.json:
        print(json.dumps(asdict(answer), ensure_ascii=False))
        return
    for note in answer.notes:
        print(f"note: {note}", file=sys.stderr)
    width = max(map(len, answer.ids), default=0)
    for rank, (item, title, score) in enumerate(zip(answer.ids, answer.titles, answer.scores, strict=True), start=1):
        print(f"{rank:4d}  {score:9.4f}  {item:{width}}  {title}")


def command() -> None:
    """Run fmrlrec-recommend, the installed command."""
    run_cli(main)


if __name__ == "__main__":
    command()
