"""Make experiments/RESULTS.md from the kept files of runs, beside the paper's numbers.

python -m experiments.report                              # from experiments/results/
python -m experiments.report --keep experiments/runs/...  # keep a run's small files there first
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.deploy import card_table
from config import Config, InputError, resolve, run_cli, shown
from datasets.files import read_json, write_text
from experiments.paper import COLUMNS, ENCODERS, RESULTS
from trainer.runs import read_config, read_log, unfinished

HERE = Path(__file__).parent
KEPT = ("config.json", "env.json", "log.jsonl", "test_metrics.json", "test_mrl_metrics.json")
ALSO = ("test_mrl_metrics.png", "deploy.json", "deploy.png", "cold_items.json")  # where they were made
MASKED = "test_mrl_metrics_history_masked.json"

INTRODUCTION = """# Results

Made by `python -m experiments.report` from the files below `experiments/results/`; nothing here is typed by hand.
Test metrics of the epoch that validated best, full ranking over all items, exact means over users.
"""


def keep(run: Path, results: Path) -> None:
    """Copy a finished run's small files to <results>/<dataset>-<run>/."""
    config, _ = read_config(run)
    if progress := unfinished(run):
        raise InputError(f"{run} is not finished ({progress}); train.py --resume {run} finishes it")
    target = results / f"{config.dataset_code}-{run.name}"
    target.mkdir(parents=True, exist_ok=True)
    for name in (*KEPT, MASKED, *ALSO):
        if (run / name).exists():
            shutil.copyfile(run / name, target / name)


def report(results: Path) -> str:
    """The text of RESULTS.md."""
    runs = sorted(path.parent for path in results.glob("*/config.json"))
    if not runs:
        raise InputError(f"there is no kept run below {results}; --keep FOLDER keeps one")
    return "\n".join([INTRODUCTION, *(section(run) for run in runs)])


def section(run: Path) -> str:
    """One run: how it was made, the metrics of every size, the paper's row."""
    config, _ = read_config(run)
    environment = read_json(run / "env.json", "keep the run again")
    log = read_log(run)
    metrics = read_json(run / "test_mrl_metrics.json", "keep the run again")
    masked = read_json(run / MASKED, "keep the run again") if (run / MASKED).exists() else {}
    seconds = log[-1]["seconds"]
    lines = [
        f"## {config.dataset_code}, {config.branch}, sizes {config.mrl_hidden_sizes[0]}..{config.mrl_hidden_sizes[-1]}",
        "",
        f"- Run `{run.name}`, seed {config.seed}; differs from the dataset's settings in: {differences(config)}.",
        f"- `{' '.join(['python', *environment['command']])}`",
        f"- {len(log)} of {config.num_epochs} epochs in {seconds / 60:.1f} minutes "
        f"({log[-1]['train_seconds']:.0f} s the last), best epoch {log[-1]['best_epoch']}; {environment['device']}; "
        f"torch {environment['versions']['torch']}; commit `{(environment['commit'] or 'unknown')[:10]}`"
        f"{' with uncommitted changes' if environment['uncommitted_changes'] else ''}.",
    ]
    paper = RESULTS[config.branch].get(config.dataset_code)
    if paper and (unlike := unlike_paper(config)):
        lines.append(f"- Unlike the paper: {unlike}.")
    columns = (*COLUMNS, "MRR@10")
    lines += ["", "| size | " + " | ".join(columns) + " | NDCG@10, history masked | Recall@10, history masked |"]
    lines.append("| ---: |" + " ---: |" * (len(columns) + 2))
    for size, values in metrics.items():
        cells = [f"{values[name]:.4f}" if name in values else "" for name in columns]
        cells += [f"{masked[size][name]:.4f}" if masked else "" for name in ("NDCG@10", "Recall@10")]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    if paper:
        lines.append("| paper, 1024 | " + " | ".join(f"{value:.4f}" for value in paper) + " | | | |")
    if (run / "test_mrl_metrics.png").exists():
        lines += ["", f"![metric against size](results/{run.name}/test_mrl_metrics.png)"]
    if (run / "deploy.json").exists():
        lines += deployment(run)
    if (run / "cold_items.json").exists():
        lines += cold_items(run)
    return "\n".join([*lines, ""])


def deployment(run: Path) -> list[str]:
    """What serving every size costs, as benchmarks/deploy.py measured it."""
    card = read_json(run / "deploy.json", "keep the run again")
    environment, versions = card["environment"], card["environment"]["versions"]
    lines = [
        "",
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
    if (run / "deploy.png").exists():
        lines += ["", f"![NDCG@10 against bytes and time](results/{run.name}/deploy.png)"]
    return lines


def cold_items(run: Path) -> list[str]:
    """How well items are found that were added after training, as experiments/cold_items.py measured it."""
    found = read_json(run / "cold_items.json", "keep the run again")
    names = [name for name in found["users"]["chance"] if name != "count"]
    lines = [
        "",
        f"{found['held_out']:,} items were held out of training and added to the export of size {found['size']} by "
        f"their features alone; every user's last item is ranked among all {found['items']:,}:",
        "",
        "| last item | users | " + " | ".join(names) + " |",
        "| --- | ---: |" + " ---: |" * len(names),
    ]
    for users, result in found["users"].items():
        cells = (users, f"{result['count']:,}", *(f"{result[name]:.4f}" for name in names))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def differences(config: Config) -> str:
    """The trained settings that are not the defaults and presets of the dataset, runtime ones aside."""
    usual, _ = resolve({"dataset_code": config.dataset_code})
    names = [f for f, d in Config.__dataclass_fields__.items() if not d.metadata["runtime"]]
    changed = [name for name in names if getattr(config, name) != getattr(usual, name)]
    return ", ".join(f"{name} {shown(getattr(config, name))}" for name in changed) or "nothing"


def unlike_paper(config: Config) -> str:
    """What a run could not use that the paper did."""
    parts = []
    for switch, encoder in (("use_language_encoder", "language_encoder"), ("use_img_encoder", "img_encoder")):
        if getattr(config, switch) and getattr(config, encoder) != ENCODERS[encoder]:
            parts.append(f"{encoder} {getattr(config, encoder)} instead of {ENCODERS[encoder]}")
    if config.mrl_hidden_sizes[-1] != Config.mrl_hidden_sizes[-1]:
        parts.append(f"largest size {config.mrl_hidden_sizes[-1]} instead of {Config.mrl_hidden_sizes[-1]}")
    return ", ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Keep a run if asked to, and write RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="RUN", help="a finished run whose small files are kept")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER", help="the kept files")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md", metavar="FILE", help="the report")
    arguments = parser.parse_args(argv)
    if arguments.keep:
        keep(arguments.keep, arguments.results)
    write_text(arguments.out, report(arguments.results))
    print(arguments.out)


if __name__ == "__main__":
    run_cli(main)
