"""Recommend from an exported model.

python -m serving.recommend exports/beauty-64 --history B004756YJA,B004ZT0SSG --top_k 10
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from common.cli import Parser, run_cli


def main(argv: Sequence[str] | None = None) -> None:
    """Print the answer as a table, or as JSON."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the export, as serving.export printed it")
    parser.add_argument(
        "--history", default="", metavar="ID,ID", help="item ids or numbers, oldest first (default: none)"
    )
    parser.add_argument("--top_k", type=int, default=10, metavar="N", help="how many items to recommend (default: 10)")
    parser.add_argument("--candidates", metavar="ID,ID", help="rank these alone (default: all items)")
    parser.add_argument("--keep_history", action="store_true", help="recommend what is in the history, too")
    parser.add_argument("--engine", choices=("torch", "onnx"), help="(default: onnx where the export has graphs)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    from serving import Recommender

    recommender = Recommender.from_pretrained(arguments.folder, arguments.engine)

    def split(text: str) -> list[str | int]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        # A number, unless the dataset has an id that looks like it.
        return [int(p) if p not in recommender and p.isdecimal() and str(int(p[:18])) == p else p for p in parts]

    (answer,) = recommender.recommend(
        [split(arguments.history)],
        top_k=arguments.top_k,
        exclude_history=not arguments.keep_history,
        candidates=None if arguments.candidates is None else split(arguments.candidates),
    )
    if arguments.json:
        print(json.dumps(asdict(answer), ensure_ascii=False))
        return
    for note in answer.notes:
        print(f"note: {note}", file=sys.stderr)
    width = max(map(len, answer.ids))
    for rank, (item, title, score) in enumerate(zip(answer.ids, answer.titles, answer.scores, strict=True), start=1):
        print(f"{rank:4d}  {score:9.4f}  {item:{width}}  {title}")


if __name__ == "__main__":
    run_cli(main)
