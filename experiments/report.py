"""Make experiments/RESULTS.md and its pictures in media/ from the kept files of runs, beside published numbers.

python -m experiments.report                              # from experiments/results/
python -m experiments.report --keep experiments/runs/...  # keep a run's small files there first; experiments.run does
"""

from collections.abc import Sequence
from pathlib import Path

from common.cli import Parser, run_cli
from common.errors import InputError
from common.files import read_json, write_text
from experiments import parameters, tables
from experiments.definition import definitions, unusual
from experiments.deployment import card_table
from experiments.figures import draw_figures
from experiments.kept import RESULTS, KeptRun, keep, kept_runs
from experiments.paper import COLUMNS, PUBLISHED
from experiments.tables import settings_text, table, unlike_paper
from trainer.runs import COLD_ITEMS, DEPLOYMENT, DEPLOYMENT_PICTURE

OUT = Path(__file__).parent / "RESULTS.md"
MEDIA = Path(__file__).parent.parent / "media"

INTRODUCTION = """# Results

Made by `python -m experiments.report` from the files below `experiments/results/`; nothing here is typed by hand.
Test metrics of the epoch that validated best, full ranking over all items, exact means over users; of several seeds,
mean ± standard deviation. The history stays a candidate, as in the paper, unless a column says that it is masked.
"""


def report(results: Path) -> str:
    """The text of RESULTS.md."""
    runs = kept_runs(results)
    if not runs:
        raise InputError(f"there is no kept run below {results}; --keep FOLDER keeps one")
    experiments = [line for definition in definitions().values() for line in tables.section(definition, runs)]
    every_run = [section(run) for run in runs if run.tested]
    return "\n".join([INTRODUCTION, *experiments, *parameters.section(), "# Every run", "", *every_run])


def section(run: KeptRun) -> str:
    """One run: how it was made, the metrics of every size, the paper's row."""
    config, last = run.config, run.log[-1]
    masked = run.metrics(masked=True)
    lines = [
        f"## {config.dataset_code}, {config.model_code}, {config.branch}, "
        f"sizes {config.mrl_hidden_sizes[0]}..{config.mrl_hidden_sizes[-1]}",
        "",
        f"- Run `{run.folder.name}`, seed {config.seed}; differs from the dataset's settings in: "
        f"{settings_text(unusual(config, {'seed'})) or 'nothing'}.",
        f"- `{' '.join(['python', *run.environment['command']])}`",
        f"- {len(run.log)} of {config.num_epochs} epochs in {last['seconds'] / 60:.1f} minutes "
        f"({last['train_seconds']:.0f} s the last), best epoch {last['best_epoch']}; "
        f"{tables.where_made(run.environments)}.",
    ]
    paper = PUBLISHED.get(config.branch, {}).get(config.dataset_code) if config.model_code == "fmrlrec" else None
    if paper and (unlike := unlike_paper(config, config.branch)):
        lines.append(f"- Unlike the paper: {unlike}.")
    columns = (*COLUMNS, "MRR@10")
    rows = []
    for size, values in run.metrics().items():
        cells = [f"{values[name]:.4f}" if name in values else "" for name in columns]
        cells += [
            f"{masked[size][name]:.4f}" if name in masked.get(size, ()) else "" for name in ("NDCG@10", "Recall@10")
        ]
        rows.append([str(size), *cells])
    if paper:
        rows.append(["paper, 1024", *(f"{paper[name]:.4f}" for name in COLUMNS), "", "", ""])
    heads = ["size", *columns, "NDCG@10, history masked", "Recall@10, history masked"]
    lines += ["", *table(heads, rows, text=())]
    if (run.folder / DEPLOYMENT).exists():
        lines += deployment(run.folder)
    if (run.folder / COLD_ITEMS).exists():
        lines += cold_items(run.folder)
    return "\n".join(lines)


def deployment(run: Path) -> list[str]:
    """What serving every size costs, as benchmarks/deploy.py measured it."""
    card = read_json(run / DEPLOYMENT, "keep the run again")
    environment, versions = card["environment"], card["environment"]["versions"]
    lines = [
        f"### What serving it costs: {card['dataset']}",
        "",
        f"- `{' '.join(['python', '-m', 'benchmarks.deploy', *environment['command'][1:]])}`; {environment['device']}; "
        f"torch {versions['torch']}, onnxruntime {versions['onnxruntime']}; "
        f"commit `{(environment['commit'] or 'unknown')[:10]}`.",
        f"- Times of one answer (p50, p95), of one event with the answer after it, and of 256 users together. Metrics "
        f"of {card['users']:,} users, history kept. The same top 10: as float32 in torch; as torch on the same file.",
        "",
        *card_table(card),
    ]
    if (run / DEPLOYMENT_PICTURE).exists():
        lines += [f"![NDCG@10 against bytes and time](results/{run.name}/{DEPLOYMENT_PICTURE})", ""]
    return lines


def cold_items(run: Path) -> list[str]:
    """How well items are found that were added after training, as experiments/cold_items.py measured it."""
    found = read_json(run / COLD_ITEMS, "keep the run again")
    names = [name for name in found["users"]["chance"] if name != "count"]
    rows = [
        [users, f"{result['count']:,}", *(f"{result[name]:.4f}" for name in names)]
        for users, result in found["users"].items()
    ]
    return [
        f"{found['held_out']:,} items were held out of training and added to the export of size {found['size']} by "
        f"their features alone. Ranked among all {found['items']:,} are the last items of users of whom it was held "
        f"out, and the last of those that stayed:",
        "",
        *table(["last item", "users", *names], rows),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Keep a run if asked to, and write RESULTS.md."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--keep", type=Path, metavar="RUN", help="first copy the small files of this finished run there"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help="the kept files (default: experiments/results)"
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="FILE", help="the report (default: experiments/RESULTS.md)"
    )
    parser.add_argument("--media", type=Path, default=MEDIA, metavar="FOLDER", help="the pictures (default: media)")
    arguments = parser.parse_args(argv)
    if arguments.results != RESULTS and (arguments.out == OUT or arguments.media == MEDIA):
        raise InputError(f"--results {arguments.results} would replace the report of {RESULTS}; give --out and --media")
    if arguments.keep:
        keep(arguments.keep, arguments.results)
    write_text(arguments.out, report(arguments.results))
    for path in (arguments.out, *draw_figures(kept_runs(arguments.results), arguments.media)):
        print(path)


if __name__ == "__main__":
    run_cli(main)
