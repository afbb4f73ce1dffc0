"""The README's commands, letter by letter, and what the demo must show."""

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from config import Config
from dataloader import eval_rows
from datasets.catalog import load_catalog
from datasets.features import image, text
from datasets.features.encoder import Encoder, normalised
from tests.prepared import draw_picture, feature_parts, write_prepared
from tests.raw import reviews_of, write_raw
from trainer.metrics import ranking_metrics, target_ranks

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
REPORT = "python -m experiments.report"
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(REPOSITORY),  # for python -m: the rooms of the clone
    "HF_HUB_OFFLINE": "1",
}


def commands():
    """The lines of the README's shell blocks, comments aside."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]


def shell(command, cwd, **environment):
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env=ENVIRONMENT | {"HOME": str(cwd)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def side_by_side(lanes, cwd):
    """Run lists of commands, each list in its order, two lists at a time on a core each."""

    def run(lane):
        for command in lane:
            shell(command, cwd, OMP_NUM_THREADS="1")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, lanes))


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """A folder that looks like a fresh clone, in which the demo was trained by the README's command."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("train.py", "eval.py"):
        (folder / name).symlink_to(REPOSITORY / name)
    write_prepared(folder / "data", "mine", users=6, items=10, pictures=True)
    write_raw_files(folder)
    assert "pip install -r requirements.txt && python train.py" in commands()
    (folder / "first_output.txt").write_text(shell("python train.py", folder))
    return folder


def write_raw_files(folder):
    """Raw files, and pictures, where the README's commands of datasets.prepare look for them: as fetched for the first
    command, in ~/amazon for the others."""
    histories = [(f"U{u}", [f"B{(u + k) % 7}" for k in range(5)]) for u in range(12)]
    for category, dataset in (("Beauty", "beauty"), ("Office_Products", "office")):
        for root in (folder / "data/raw", folder / "amazon"):
            write_raw(root / f"reviews_{category}_5.json.gz", reviews_of(histories))
            write_raw(root / f"meta_{category}.json.gz", [{"asin": f"B{i}", "title": f"Tent {i}"} for i in range(7)])
        photos = folder / "data/photos" / dataset
        photos.mkdir(parents=True)
        for i in range(7):
            draw_picture(photos / f"B{i}.png", (40 * i, 90, 90))


def metrics_below(runs):
    """size -> metrics of the one run there."""
    (file,) = runs.glob("*/test_mrl_metrics.json")
    return {int(size): metrics for size, metrics in json.loads(file.read_text()).items()}


@pytest.fixture(scope="session")
def demo_metrics(clone):
    return metrics_below(clone / "experiments/runs/demo")


def test_the_first_command_prints_every_sizes_metrics_and_draws_the_curve(clone, demo_metrics):
    printed = (clone / "first_output.txt").read_text()
    for size, metrics in demo_metrics.items():
        assert re.search(rf"^ +{size} .*{metrics['NDCG@10']:.4f}", printed, re.MULTILINE)
    (run,) = (clone / "experiments/runs/demo").iterdir()
    assert (run / "test_mrl_metrics.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="session")
def export(clone):
    """The README's export, made of the first run."""
    (command,) = [
        command for command in commands() if command.startswith("python -m serving.export") and "--size 64" in command
    ]
    shell(command, clone)
    return clone / "exports/demo-64"


def test_the_readmes_python_serves_the_export(clone, export):
    (program,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (clone / "serve.py").write_text(f"{program}\nimport sys\nprint(len(recommender), 'torch' in sys.modules)\n")
    lines = shell("python serve.py", clone).splitlines()
    assert len(lines) == 3  # two answers, and what was added
    assert lines[0].count("'") + lines[0].count('"') >= 6  # three titles
    assert lines[-1] == "801 False"  # the demo's encoders need no torch either


def popularity_ndcg(clone):
    """NDCG@10 of ranking every user's test item by how often items were in training."""
    catalog = load_catalog(clone / "data", "demo")
    rows = eval_rows(catalog.sequences, 50, "test")
    trained = np.concatenate([catalog.sequences.of(u)[:-2] for u in range(len(catalog.sequences))])
    counts = np.bincount(trained, minlength=catalog.num_items + 1).astype(np.float32)
    scores = torch.from_numpy(counts).expand(len(rows), -1).clone()
    scores[:, 0] = -torch.inf
    return ranking_metrics(target_ranks(scores, torch.from_numpy(rows.targets)), (10,))["NDCG@10"]


def test_the_demos_largest_model_beats_popularity_threefold(clone, demo_metrics):
    assert demo_metrics[256]["NDCG@10"] > 3 * popularity_ndcg(clone)


def test_on_the_demo_larger_sizes_beat_smaller_ones(demo_metrics):
    values = [metrics["NDCG@10"] for metrics in demo_metrics.values()]
    assert values == sorted(values) and values[-1] > 1.2 * values[0]


def test_on_the_demo_text_and_pictures_beat_text_beats_pictures_beats_popularity(clone, demo_metrics):
    flags = {"text": "--no-use_img_encoder", "pictures": "--no-use_language_encoder"}
    shorter = "--mrl_hidden_sizes 64 --lru_num_blocks 1 --num_epochs 8"
    side_by_side([[f"python train.py {flags[name]} {shorter} --runs_root {name}"] for name in flags], clone)
    ndcg = {name: metrics_below(clone / name / "demo")[64]["NDCG@10"] for name in flags}
    ndcg |= {"both": demo_metrics[64]["NDCG@10"], "popularity": popularity_ndcg(clone)}
    assert ndcg["both"] > 1.05 * ndcg["text"] > 1.05**2 * ndcg["pictures"] > 1.05**3 * ndcg["popularity"]


def test_every_other_command_of_the_readme_runs(clone, export):
    elsewhere = {  # what .ci/run and other tests run
        "pip install -r requirements.txt && python train.py",
        "pip install -r requirements-dev.txt && python -m pytest",
    }
    shorter = {  # for those that train anew or measure long
        "python train.py --model_code": " --num_epochs 1",
        "python train.py": " --num_epochs 1 --lru_num_blocks 1 --mrl_hidden_sizes 8,64",
        "torchrun --nproc_per_node=2 train.py": " --num_epochs 1 --lru_num_blocks 1 --mrl_hidden_sizes 8,64",
        "python -m datasets.prepare": " --language_encoder lexical --img_encoder pixel",
        "torchrun": " --language_encoder lexical --img_encoder pixel --encoder_batch_size 2",
        "python -m experiments.run": " --dry_run",
        "python -m experiments.run table3": " --dry_run --data_root elsewhere",
        "python -m benchmarks.deploy": " --size 32 --users 50 --requests 5 --catalogue 2000",
    }
    ci = (REPOSITORY / ".ci/run").read_text()
    for command in elsewhere:
        for part in command.split(" && "):
            assert part.replace("pip install", "pip install -q") in ci
    trainings, others, on_data = [], [], []
    for command in commands():
        if command in (*elsewhere, REPORT) or command.startswith("CUDA_VISIBLE_DEVICES"):
            continue
        assert shlex.split(command)[0] in ("python", "torchrun"), command
        if export.name in command and command.startswith("python -m serving.export"):
            continue
        trained = "--help" not in command and "--resume" not in command
        start = max((start for start in shorter if command.startswith(start)), key=len, default="")
        command += shorter.get(start, "") * trained
        if "train.py" in command:
            trainings.append([command])
        elif "datasets.prepare" in command or "experiments." in command:
            on_data.append(command)
        else:
            others.append(command)
    assert len(trainings) >= 5 and len(others) >= 5 and len(on_data) >= 5
    side_by_side([on_data, others], clone)  # others first: they read the newest run, which is that of the first command
    side_by_side(trainings, clone)


def test_the_papers_two_commands_work_letter_by_letter(tmp_path, monkeypatch):
    """With its data in place: a tiny Beauty, and features of its encoders that were cached where they could be had."""
    train_command, eval_command = [command for command in commands() if command.startswith("CUDA_VISIBLE_DEVICES")]
    assert train_command == (
        "CUDA_VISIBLE_DEVICES=0 python train.py --dataset_code=beauty --lru_dropout=0.6 --lru_attn_dropout=0.6 "
        '--lru_r_min=0.0 --lru_r_max=0.1 --mrl_hidden_sizes="8,16,32,64,128,256,512,1024"'
    )
    assert eval_command == (
        "CUDA_VISIBLE_DEVICES=0 python eval.py --dataset_code=beauty --lru_dropout=0.6 --lru_attn_dropout=0.6 "
        "--lru_r_min=0.0 --lru_r_max=0.1"
    )
    for name in ("train.py", "eval.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    write_prepared(tmp_path / "data", "beauty", users=4, items=8, pictures=True)
    catalog = load_catalog(tmp_path / "data", "beauty")

    class Cached(Encoder):
        dim, fingerprint = 1024, {}

        def prepare(self, batch):
            return normalised(np.random.default_rng(0).normal(size=(len(list(batch)), 1024)))

    monkeypatch.setattr(text, "load_encoder", lambda name, device, precision: Cached())
    monkeypatch.setattr(image, "load_encoder", lambda name, device, precision: Cached())
    defaults = Config()
    feature_parts(
        catalog,
        language=defaults.language_encoder,
        image=defaults.img_encoder,
        attributes=defaults.item_attributes,
        cache_root=tmp_path / "data" / "features",
    )
    for command in (train_command, eval_command):
        shell(command, tmp_path)
    (run,) = (tmp_path / "experiments/runs/beauty").iterdir()
    metrics = json.loads((run / "test_mrl_metrics.json").read_text())
    assert list(metrics) == ["8", "16", "32", "64", "128", "256", "512", "1024"]


def test_the_results_shown_are_rows_of_the_report_which_is_made_from_the_kept_files(tmp_path):
    assert REPORT in commands()
    shell(f"{REPORT} --out RESULTS.md --media media", tmp_path)
    for picture in (tmp_path / "media").iterdir():
        assert (REPOSITORY / "media" / picture.name).exists(), picture.name
    made = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert made == (REPOSITORY / "experiments/RESULTS.md").read_text(encoding="utf-8")
    for heading in ("## Results", "## Deploy a size", "## Beyond the paper"):
        section = README.partition(heading)[2].partition("\n## ")[0].partition("\n| flag |")[0]
        rows = [line for line in section.splitlines() if line.startswith("|")]
        assert len(rows) > 4
        assert all(row in made.splitlines() for row in rows)


def test_every_link_of_the_readme_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (REPOSITORY / target).exists(), target
