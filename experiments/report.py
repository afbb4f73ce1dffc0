"""Make RESULTS.md, REPORT.md and the figures in media/ from kept results, beside published numbers.

python -m experiments.report                              # from experiments/results/
python -m experiments.report --keep experiments/runs/...  # keep a run's results first; experiments.run does so itself
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import Parser, run_cli
from common.errors import InputError
from common.files import write_text
from experiments import MEDIA, RESULTS

if TYPE_CHECKING:
    from experiments.store import KeptRun

OUT = Path(__file__).parent / "RESULTS.md"

INTRODUCTION = """# Results

Made by `python -m experiments.report` from `experiments/results/`; no metric of ours is typed by hand. Test metrics of
the best epoch by validation, full ranking over all items, means over users; with several seeds, mean ± standard
deviation. History items stay candidates, as in the paper, unless a column says that they are masked. All kept runs,
with metrics of every size, settings, command lines and versions, are in [metrics.csv](results/metrics.csv) and
[runs.jsonl](results/runs.jsonl).
"""


def report(runs: list[KeptRun]) -> str:
    """Return the text of RESULTS.md."""
    from experiments import cold_items, tables
    from experiments.definition import definitions

    experiments = [line for definition in definitions().values() for line in tables.section(definition, runs)]
    return "\n".join(
        [
            INTRODUCTION,
            *tables.best_section(runs),
            *experiments,
            *tables.parameters_section(),
            *tables.deployment_section(runs),
            *cold_items.section(runs),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Keep a run if asked to, and write RESULTS.md, REPORT.md and the figures."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="RUN", help="first add the results of this finished run")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help="kept results (default: experiments/results)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        metavar="FILE",
        help="the results; REPORT.md lies beside it (default: experiments/RESULTS.md)",
    )
    parser.add_argument("--media", type=Path, default=MEDIA, metavar="FOLDER", help="its figures (default: media)")
    arguments = parser.parse_args(argv)
    if arguments.results != RESULTS and (arguments.out == OUT or arguments.media == MEDIA):
        raise InputError(f"--results {arguments.results} would replace the report of {RESULTS}; give --out and --media")
    from experiments.figures import draw_figures
    from experiments.store import keep, kept_runs
    from experiments.tables import write_reproduction

    if arguments.keep:
        keep(arguments.keep, arguments.results)
    runs = kept_runs(arguments.results)
    if not runs:
        raise InputError(f"{arguments.results} has no kept runs; --keep RUN adds one")
    reproduction = arguments.out.with_name("REPORT.md")
    write_text(arguments.out, report(runs))
    write_text(reproduction, write_reproduction(runs))
    for path in (arguments.out, reproduction, *draw_figures(runs, arguments.media)):
        print(path)


if __name__ == "__main__":
    run_cli(main)
