"""Define experiments, run what is missing of them, test cold items, and run the benchmarks."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluate
import train
from benchmarks import features, pictures, prepare, scaling, speed
from benchmarks.baseline import Baseline, padded
from common.errors import InputError
from config import NAMED_PRESETS, Config, ModelSettings, resolve
from dataloader import TrainLoader, eval_batches, eval_rows, train_rows
from datasets.catalog import load_catalog
from experiments import cold_items, cut, definition, look, nightly, report, run, tune
from experiments.definition import Definition, Row, definitions, identity, read_definitions
from experiments.store import keep, kept_runs
from model import FMRLRec, matryoshka_cross_entropy
from serving import export
from serving.widths import read_plane, user_weighted_pca
from tests.prepared import write_prepared, write_tiny_bert
from trainer.evaluation import target_ranks


def test_every_definition_of_this_repository_can_be_read():
    found = definitions()
    assert {"table2", "table3", "sizes", "independent", "depth", "loss", "first_label", "released"} <= set(found)
    rows = [resolve(row.settings | {"dataset_code": "beauty"})[0] for row in found["table3"].rows]
    assert [config.branch for config in rows] == ["both", "language", "image", "id"]
    assert rows[0] == resolve({"dataset_code": "beauty"})[0]


def defined(tmp_path, text):
    """Return the experiment [mine] of a file with this text."""
    path = tmp_path / "mine.toml"
    path.write_text(f'[mine]\ntitle = "T"\ntext = "t"\ndatasets = ["beauty"]\n{text}', encoding="utf-8")
    return read_definitions(path)["mine"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rows.a = { lru_blocks = 2 }", r"unknown settings \['lru_blocks'\]"),
        ('rows.a = { lru_num_blocks = "2" }', "lru_num_blocks '2', which must be of type int"),
        ('compare = [["a", "c"]]\nrows.a = { }', r"compares unknown rows \['c'\]; its rows are \['a'\]"),
        ("colour = 1\nrows.a = { }", "colour"),
        ("rows.a = { size = 7 }", "size 7; its sizes are 8,16"),
        ('rows.a = { published = "sasrek" }', "published 'sasrek'; known are .*sasrec"),
        ("", "experiment 'mine' lacks 'rows'"),
        ("title = ", "is not valid TOML"),
        ("rows = " + "9" * 5000, "is not valid TOML"),
    ],
)
def test_an_invalid_definition_is_named_with_its_file(tmp_path, text, problem):
    with pytest.raises(InputError, match=rf"mine\.toml.*{problem}"):
        defined(tmp_path, text)


def test_the_settings_in_which_rows_differ_are_varied(tmp_path):
    rows = "settings.lr = 1e-3\nrows.a = { seed = 1, lru_num_blocks = 1 }\nrows.b = { seed = 1, lru_num_blocks = 2 }\n"
    definition = defined(tmp_path, rows + "rows.c = { seed = 1, num_epochs = 3 }")
    assert definition.varied() == {"lru_num_blocks", "num_epochs"}
    assert [row.settings["lr"] for row in definition.rows] == [1e-3] * 3
    rows = "settings.enable_lr_schedule = true\nrows.a = { }\nrows.b = { enable_lr_schedule = false }\n"
    assert defined(tmp_path, rows).varied() == {"enable_lr_schedule", "warmup_steps"}
    assert definitions()["baselines"].varied() == set(Config.__dataclass_fields__)  # other models differ in all


def test_a_preset_in_a_definition_sets_its_settings_and_extensions_must_be_named(tmp_path):
    text = 'rows.a = { preset = "plus", distill = 0.25 }\nrows.b = { preset = "paper" }\nrows.c = { preset = "plus" }'
    definition = defined(tmp_path, text)
    a, b, c = definition.rows
    assert a.settings == NAMED_PRESETS["plus"] | {"distill": 0.25}
    assert (b.settings, c.settings) == ({}, NAMED_PRESETS["plus"])
    for flags, expected in (({"preset": "plus"}, [c]), (c.settings, [c]), ({}, [b]), ({"item_embedding": 64}, [])):
        assert [
            row for row in definition.rows if definition.fits(row, resolve(flags | {"dataset_code": "beauty"})[0])
        ] == expected


@pytest.mark.parametrize(
    ("flags", "change", "same"),
    [
        ({"use_img_encoder": False}, {"img_encoder": "other"}, True),
        ({}, {"img_encoder": "other"}, False),
        ({}, {"device": "cpu", "val_batch_size": 3, "run_name": "x"}, True),
        ({}, {"seed": 1}, False),
        ({"model_code": "sasrec"}, {"num_heads": 2}, False),
        ({"model_code": "sasrec"}, {"lru_r_max": 0.995, "lru_use_bias": False}, True),
        ({"model_code": "popularity"}, {"lr": 0.5}, True),
        ({"model_code": "popularity"}, {"best_metric": "MRR@5"}, False),
    ],
    ids=str,
)
def test_runs_are_the_same_if_they_differ_in_ineffective_settings_alone(flags, change, same):
    config = resolve(flags)[0]
    assert (identity(dataclasses.replace(config, **change)) == identity(config)) == same


FLAGS = (
    "--dataset_code tiny --no-use_img_encoder --language_encoder lexical --mrl_hidden_sizes 2,4 --num_epochs 1 "
    "--device cpu --results kept"
)
ONE = "depth --rows '1 block'"


@pytest.fixture
def calls(monkeypatch):
    """Run scripts in this process and return their command lines."""
    noted = []

    def call(script, arguments, environment):
        noted.append([script, *arguments])
        try:
            {"train.py": train.main, "eval.py": evaluate.main}[script](arguments)
        except InputError:
            return 2
        except KeyboardInterrupt:
            return 130
        return 0

    monkeypatch.setattr(run, "call_script", call)
    return noted


def run_experiments(arguments):
    return run.main(shlex.split(f"{arguments} {FLAGS}"))


def planned(experiments, datasets=None, seeds=(42,)):
    found = definitions()
    return definition.planned(
        [(found[name], list(found[name].rows)) for name in experiments], {}, list(seeds), datasets
    )


def names(folder):
    """Return the names of the kept runs."""
    return [run.name for run in kept_runs(folder)]


def test_every_seed_dataset_and_row_has_a_job_and_rows_of_the_same_training_share_it():
    jobs = planned(["table3"], seeds=[1, 2])
    assert len({str(identity(job.config)) for job in jobs}) == len(jobs) == 2 * 4 * 4
    assert [len(job.names) for job in planned(["independent"], ["beauty"])] == [8, *[1] * 8]  # nested, then alone
    jobs = planned(["table2"], ["sports", "mine"])
    assert [(job.config.dataset_code, job.config.lru_r_max) for job in jobs] == [("sports", 0.2), ("mine", 0.1)]
    assert [job.names for job in planned(["depth", "loss", "table2"], ["beauty"])] == [
        ["depth/1 block"],
        ["depth/2 blocks", "loss/sum", "table2/fMRLRec"],
        ["loss/mean"],
    ]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("depht", "unknown experiment 'depht'; known are .*depth.*, and all"),
        ("depth --rows=3", "unknown row '3' of depth; known are 1 block; 2 blocks"),
        ("depth --seeds 4,x", "--seeds '4,x' must be integers"),
        ("depth --lru_num_blocks 4", "--lru_num_blocks 4 contradicts depth, whose row '1 block' has 1"),
        ("depth --distill .9", "--distill 0.9 contradicts depth, whose row '1 block' has no other extensions"),
    ],
)
def test_an_invalid_choice_of_runs_is_refused(workplace, arguments, problem):
    with pytest.raises(InputError, match=problem):
        run_experiments(arguments)


def test_a_row_with_teachers_is_run_with_those_that_are_named_or_left_out(workplace, calls, capsys):
    taught = "plus, taught by three"
    assert run.main(shlex.split(f'plus --rows "{taught};plus" --dry_run --dataset_code tiny'))[0].names == ["plus/plus"]
    assert f"left out: plus/{taught} learns from 3 trained runs; name them by --teachers" in capsys.readouterr().err
    [job] = run.main(shlex.split(f'plus --rows "{taught}" --teachers a,b,c --dry_run --dataset_code tiny'))
    assert job.names == [f"plus/{taught}"] and job.config.teachers == ("a", "b", "c")
    with pytest.raises(InputError, match=r"--teachers a,b contradicts plus, whose row 'plus, taught by three'"):
        run.main(shlex.split(f'plus --rows "{taught}" --teachers a,b --dry_run --dataset_code tiny'))


def test_a_dry_run_lists_the_runs_and_what_is_wrong_with_their_data(workplace, calls, capsys):
    jobs = run_experiments("depth --seeds 1,2,1 --dry_run")
    assert [job.state for job in jobs] == ["to start"] * 4
    listed = capsys.readouterr().out
    assert "to start     tiny, seed 2: depth/1 block\n" in listed and listed.endswith("4 runs: 4 to start\n")
    (workplace / "data/tiny/sequential_data.txt").write_text("1 2 abc 3\n")
    for flags, problem in (
        ("--data_root elsewhere", "dataset 'tiny' is not at elsewhere/tiny (nothing is prepared there)"),
        ("", "data/tiny/sequential_data.txt:1: '1 2 abc 3' is not 'user item item"),
    ):
        run_experiments(f"depth --dry_run {flags}")
        assert f"2 runs: 2 to start\n{problem}" in capsys.readouterr().out
    assert not calls and not Path("experiments").exists() and not Path("kept").exists()


def test_missing_runs_are_trained_tested_twice_and_kept(workplace, calls, capsys):
    planned_before = run_experiments("depth --dry_run")
    jobs = run_experiments("depth")
    assert [call[0] for call in calls] == ["train.py", "eval.py"] * 2
    assert all("--mask_history" in call for call in calls[1::2])
    found = kept_runs(Path("kept"))
    assert [run.config.lru_num_blocks for run in found] == [job.config.lru_num_blocks for job in jobs] == [1, 2]
    assert all(run.complete() and run.ranks(masked=True) for run in found)
    calls.clear()
    capsys.readouterr()
    again = run_experiments("depth,loss --rows '1 block; sum'")
    assert "2 runs: 2 finished\n" in capsys.readouterr().out
    run.work(planned_before, Path("kept"))  # as a second runner that planned before the first was done
    (workplace / "experiments").rename(workplace / "elsewhere")
    assert {job.state for job in [*again, *planned_before, *run_experiments("depth")]} == {"finished"}
    assert not calls


def test_an_interrupted_run_is_continued(workplace, calls, monkeypatch):
    true = train.main

    def cut_off(argv):
        monkeypatch.setattr(train, "main", true)
        (true(argv) / "test_mrl_metrics.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "main", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run_experiments("depth")
    (cut,) = Path("experiments/runs/tiny").iterdir()
    calls.clear()
    jobs = run_experiments("depth")
    assert calls[0][:3] == ["train.py", "--resume", str(cut)]
    assert [call[0] for call in calls] == ["train.py", "eval.py"] * 2
    assert [job.state for job in jobs] == ["finished"] * 2


@pytest.mark.parametrize(
    ("broken", "message"),
    [("train", "train.py failed with 2: tiny, seed 42: depth/1 block"), ("keep", "failed: no: tiny, seed 42: depth/1")],
)
def test_a_failed_run_is_named_and_the_others_go_on(workplace, calls, monkeypatch, capsys, broken, message):
    module, name = (train, "main") if broken == "train" else (run, "keep")
    true = getattr(module, name)

    def fail_once(*arguments):
        monkeypatch.setattr(module, name, true)
        raise InputError("no")

    monkeypatch.setattr(module, name, fail_once)
    with pytest.raises(SystemExit) as stopped:
        run_experiments("depth")
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err
    assert len(names(Path("kept"))) == 1


def test_runs_on_other_data_or_of_another_version_do_not_count(workplace, calls, capsys):
    (job,) = run_experiments(ONE)
    write_prepared(workplace / "data", "tiny", users=20, items=12, pictures=True, seed=1)
    (again,) = run_experiments(ONE)
    assert again.state == "finished" and again.run != job.run
    assert len(names(Path("kept"))) == 2
    shutil.rmtree("kept")
    for path in Path("experiments/runs").glob("*/*/config.json"):
        path.write_text(path.read_text().replace('"lr"', '"learning_rate"'))
    assert [job.state for job in run_experiments(f"{ONE} --dry_run")] == ["to start"]
    assert "unknown settings ['learning_rate']" in capsys.readouterr().err


def test_results_that_cannot_be_written_are_named_before_a_run_starts(workplace, calls):
    Path("kept").write_text("a file")
    with pytest.raises(InputError, match="cannot write kept"):
        run_experiments("depth")
    assert not calls


def test_sigterm_ends_the_running_script_and_starts_no_other(workplace, monkeypatch, capsys):
    began = workplace / "began"
    script = f"import pathlib, time\npathlib.Path({str(began)!r}).open('a').write('one ')\ntime.sleep(60)\n"
    (workplace / "train.py").write_text(script)
    monkeypatch.setattr(run, "REPOSITORY", workplace)

    def end():
        while not (began.exists() and began.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        run_experiments("depth")
    assert began.read_text() == "one "
    assert f"train.py failed with {-signal.SIGTERM}: tiny" in capsys.readouterr().err
    assert not run.CHILDREN and signal.getsignal(signal.SIGTERM) == before


def test_every_visible_device_has_one_run_at_a_time(workplace, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    busy, most, lock = [], [], threading.Lock()

    def call(script, arguments, environment):
        with lock:
            busy.append(environment["CUDA_VISIBLE_DEVICES"])
            most.append(sorted(busy))
        time.sleep(0.05)
        with lock:
            busy.remove(environment["CUDA_VISIBLE_DEVICES"])
        return 1

    monkeypatch.setattr(run, "call_script", call)
    with pytest.raises(SystemExit):
        run.main(f"depth --seeds 1,2,3 {FLAGS}".replace("--device cpu", "").split())
    assert len(most) == 6 and max(most, key=len) == ["2", "5"]
    assert all(len(set(some)) == len(some) for some in most)


def test_a_missing_test_is_made_while_the_run_folder_exists(workplace, calls):
    (job,) = run_experiments(ONE)

    def keep_without(missing):
        shutil.rmtree("kept")
        for path in job.run.glob(missing):
            path.unlink()
        keep(job.run, Path("kept"))
        calls.clear()

    before = (job.run / "test_mrl_metrics.json").read_bytes()
    for missing, masked in (("test_*_history_masked.*", True), ("test_ranks.npz", False)):
        keep_without(missing)
        (again,) = run_experiments(ONE)
        assert again.state == "finished"
        assert [[call[0], "--mask_history" in call] for call in calls] == [["eval.py", masked]]
    assert (job.run / "test_mrl_metrics.json").read_bytes() == before
    keep_without("test_*_history_masked.*")
    shutil.rmtree("experiments")
    (again,) = run_experiments(ONE)
    assert again.state == "kept in part"


@pytest.fixture
def screening(monkeypatch):
    """Add an experiment named screening that uses validation only."""
    rows = (Row("off", {"whiten_features": False}), Row("on", {"whiten_features": True}))
    mine = Definition("screening", "S", "s", ("beauty",), rows, validation=True)
    monkeypatch.setattr(definition, "definitions", lambda: definitions() | {"screening": mine})


def test_an_experiment_on_validation_never_tests_until_another_asks_for_it(workplace, calls, screening):
    jobs = run_experiments("screening,depth --rows 'off;on;2 blocks' --dry_run")
    assert [(job.names, job.tests) for job in jobs] == [
        (["screening/off", "depth/2 blocks"], True),
        (["screening/on"], False),
    ]
    assert [job.state for job in run_experiments("screening")] == ["finished"] * 2
    assert [call[0] for call in calls] == ["train.py"] * 2
    assert not list(workplace.glob("**/test_*"))
    for run_ in kept_runs(Path("kept")):
        assert not run_.tested and (run_.validation["NDCG@10"] >= 0).all()
    calls.clear()
    Path("experiments").rename("elsewhere")
    assert [job.state for job in run_experiments("screening")] == ["finished"] * 2
    (job,) = run_experiments("depth --rows '2 blocks' --dry_run")  # asks for a test, which needs the folder
    assert (calls, job.run, job.state) == ([], None, "to start")
    Path("elsewhere").rename("experiments")
    run_experiments("depth --rows '2 blocks'")
    assert [[call[0], "--mask_history" in call] for call in calls] == [["eval.py", False], ["eval.py", True]]
    assert [run_.complete() for run_ in kept_runs(Path("kept"))] == [True, False]


def test_a_cut_gives_the_best_scores_of_its_width():
    random = np.random.default_rng(0)
    users, items = random.normal(size=(50, 6)) @ random.normal(size=(6, 6)), random.normal(size=(30, 6))
    for_users, for_items = user_weighted_pca(users, items)
    scores = users @ items.T
    left, values, right = np.linalg.svd(scores)
    for width in range(1, 7):
        best = (left[:, :width] * values[:width]) @ right[:width]
        cut = (users @ for_users[:, :width]) @ (items @ for_items[:, :width]).T
        assert np.abs(cut - best).max() < 1e-6 * np.abs(scores).max()


def test_a_run_is_cut_and_tested_with_every_encoder_size_and_table_width(workplace):
    flags = (
        "--dataset_code tiny --no-use_img_encoder --language_encoder lexical --mrl_hidden_sizes 16,32 --num_epochs 1 "
        "--history_bias --lr 0.01 --device cpu"
    )
    run = train.main(flags.split())
    evaluate.main(["--run", str(run), "--mask_history"])
    found = cut.main([str(run)])
    assert found == json.loads((run / "cut.json").read_text()) and (run / "cut.png").exists()
    for protocol, suffix in (("kept", ""), ("masked", "_history_masked")):
        tested = json.loads((run / f"test_mrl_metrics{suffix}.json").read_text())
        assert list(found[protocol]["cut"]) == ["8", "16", "32"] and list(found[protocol]["nested"]) == ["16", "32"]
        cells = {(cell["size"], cell["width"]): cell[protocol] for cell in found["plane"]}
        assert list(cells) == [(16, 8), (16, 16), (32, 8), (32, 16), (32, 32)]
        for metric in ("NDCG@10", "Recall@10"):
            assert [cells[m, m][metric] for m in (16, 32)] == [tested[str(m)][metric] for m in (16, 32)]
            assert [cells[32, w][metric] for w in (8, 16)] == [found[protocol]["cut"][str(w)][metric] for w in (8, 16)]
            assert cells[16, 8][metric] == pytest.approx(cells[16, 16][metric], rel=0.2)
    rows = load_catalog("data", "tiny").num_items + 1
    assert all(cell["table_bytes"] == 4 * rows * cell["width"] and cell["encoder_ms"] > 0 for cell in found["plane"])
    assert read_plane(run) == found["plane"]
    (run / "best.safetensors").write_bytes(b"other weights")
    assert read_plane(run) == []
    shop = train.main(["--dataset_code=tiny", "--model_code=popularity", "--device=cpu"])
    with pytest.raises(InputError, match="a run of popularity, which has no item table"):
        cut.main([str(shop)])


COLD_FLAGS = shlex.split(
    "--language_encoder lexical --no-use_img_encoder --lru_num_blocks 1 --mrl_hidden_sizes 4,8 --num_epochs 1 "
    "--val_batch_size 8"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return data_root, the whole catalogue, the one without a fifth of its items, and held_out.json."""
    root = tmp_path_factory.mktemp("data")
    write_prepared(root, "whole", users=40, items=150)
    cold_items.main(["make", "--dataset_code", "whole", "--from_root", str(root), "--data_root", str(root),
                     "--share", "0.2"])  # fmt: skip
    held = json.loads((root / "whole-cold/held_out.json").read_text())
    return root, load_catalog(root, "whole"), load_catalog(root, "whole-cold"), held


def test_held_out_items_leave_the_others_and_the_users_who_end_in_them_are_the_test(made):
    _, whole, cold, held = made
    out = {record["asin"] for record in held["items"]}
    assert len(out) == 30
    left = [
        (asin, record["title"]) for asin, record in zip(whole.asins, whole.metadata, strict=True) if asin not in out
    ]
    assert [(asin, record["title"]) for asin, record in zip(cold.asins, cold.metadata, strict=True)] == left
    before, after = (
        [[c.asins[i - 1] for i in c.sequences.of(u)] for u in range(len(c.sequences))] for c in (whole, cold)
    )
    without = [[asin for asin in history if asin not in out] for history in before]
    assert after == [history for history in without if len(history) >= 3]
    expected = [
        {"history": rest, "target": history[-1]}
        for history, rest in zip(before, without, strict=True)
        if history[-1] in out and rest
    ]
    assert held["users"] == expected and len(expected) >= 3


def test_metadata_that_json_lacks_is_written_as_text(made, tmp_path):
    _, whole, _, _ = made
    odd = dataclasses.replace(whole, metadata=[{"title": {"b", "a"}, "brand": b"x", (1, 2): 3}] * whole.num_items)
    cold_items.hold_out(odd, 0.2, 0, tmp_path)
    nightly.write_night(odd, nightly.event_times(odd), 0.9, 0, tmp_path)
    for written in (load_catalog(tmp_path, "whole-cold"), load_catalog(tmp_path / "data-0", "whole")):
        assert {record["title"] for record in written.metadata} == {"a, b"}


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"users": []}, r"has users \[\]: Expected `?array"),
        ({"users": [{"history": "B1", "target": "B2"}]}, r"has users\[0\].history 'B1'"),
        ({"items": [{"title": "Tent"}]}, r"has no 'asin' in items\[0\]"),
    ],
)
def test_a_damaged_held_out_json_is_refused_by_name(made, tmp_path, monkeypatch, damage, problem):
    root, _, _, held = made
    export = SimpleNamespace(config={"dataset": {"code": "whole-cold"}})
    monkeypatch.setattr("serving.Recommender.from_pretrained", lambda folder: export)
    shutil.copytree(root / "whole-cold", tmp_path / "whole-cold")
    (tmp_path / "whole-cold/held_out.json").write_text(json.dumps(held | damage))
    with pytest.raises(InputError, match=rf"held_out\.json {problem}.*cold_items make writes it"):
        cold_items.main(["test", "export", "--data_root", str(tmp_path)])


def test_held_out_items_are_added_to_an_export_and_ranked_among_all(made, tmp_path, monkeypatch):
    root, _, cold, held = made
    monkeypatch.chdir(tmp_path)
    run = train.main(["--dataset_code", "whole-cold", "--data_root", str(root), *COLD_FLAGS])
    (folder,) = export.main(["--run", str(run), "--out", str(tmp_path / "cold")])
    found = cold_items.main(["test", str(folder), "--data_root", str(root), "--out", str(run / "cold_items.json")])
    assert found == json.loads((run / "cold_items.json").read_text())
    assert (found["items"], found["held_out"], found["size"]) == (150, 30, 8)
    never, trained, chance = (found["users"][name] for name in ("never trained", "trained", "chance"))
    assert never["count"] == chance["count"] == len(held["users"])
    assert trained["count"] <= len(cold.sequences)
    assert chance["Recall@50"] == 50 / 150
    for result in (never, trained):
        assert 0 <= result["Recall@10"] <= result["Recall@50"] <= result["Recall@100"] <= 1
    elsewhere = ["--results", str(tmp_path / "kept"), "--out", str(tmp_path / "R.md"), "--media", str(tmp_path)]
    report.main(["--keep", str(run), *elsewhere])
    assert f"| never trained | {never['count']} | {never['Recall@10']:.4f} |" in (tmp_path / "R.md").read_text()


def test_recall_counts_a_target_by_its_place_in_the_answer():
    class Answers(list):
        def recommend(self, histories, top_k, exclude_history):
            assert top_k == 100 and not exclude_history
            answers = [[*range(1000, 1000 + place), 7, *range(2000, 2099 - place)] for (place,) in histories]
            return [SimpleNamespace(numbers=np.array(a), ids=[str(number) for number in a]) for a in answers]

    found = cold_items.recalls(Answers(range(5000)), [([9], 7), ([10], "7"), ([49], 7), ([99], 8)])
    assert found == {"count": 4, "Recall@10": 0.25, "Recall@50": 0.75, "Recall@100": 0.75}


@pytest.mark.parametrize("share", ["1", "nan", "0.001"])
def test_a_share_without_any_item_is_refused(made, share):
    with pytest.raises(InputError, match="--share"):
        cold_items.main(["make", "--dataset_code", "whole", "--from_root", str(made[0]), "--share", share])


# ------------------------------------------------------------------------------------------------------ look and tune

TINY = "--dataset_code tiny --language_encoder lexical --img_encoder pixel --device cpu --lru_num_blocks 1"


def test_look_lists_neighbours_by_title_and_draws_a_map(workplace, capsys):
    trained = train.main([*TINY.split(), "--mrl_hidden_sizes", "4,8", "--num_epochs", "1", "--no-test"])
    catalog = load_catalog("data", "tiny")
    capsys.readouterr()
    look.main([str(trained), "--item", catalog.metadata[2]["title"].lower(), "--neighbours", "3", "--size", "4"])
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"most like {catalog.asins[2]}"))
    cosines = [float(line.split()[0]) for line in lines[start + 1 : start + 4]]
    assert cosines == sorted(cosines, reverse=True) and catalog.asins[2] not in "".join(lines[start + 1 :])
    assert (trained / "embeddings.png").read_bytes().startswith(b"\x89PNG")
    for flags, problem in (("--item e", r"fits \d+ titles; give an id"), ("--size 5", r"its sizes are \(4, 8\)")):
        with pytest.raises(InputError, match=problem):
            look.main([str(trained), *flags.split()])


def test_tune_searches_by_validation_and_continues(workplace, capsys):
    pytest.importorskip("optuna", reason="the search needs optuna")
    flags = f"table3 {TINY} --mrl_hidden_sizes 4,8 --num_epochs 1 --range lr=1e-4..1e-2:log --choice lru_dropout=0,0.5"
    tune.main([*flags.split(), "--trials", "1"])
    best = tune.main([*flags.split(), "--trials", "2"])
    runs = sorted(Path("experiments/runs/tiny").iterdir())
    assert [path.name.partition("-tune-")[2] for path in runs] == ["0", "1"]
    assert not any((path / "test_metrics.json").exists() for path in runs)
    values = [json.loads((path / "log.jsonl").read_text())["val"]["8"]["NDCG@10"] for path in runs]
    settings = json.loads((runs[values.index(max(values))] / "config.json").read_text())["settings"]
    assert settings["lr"] == pytest.approx(float(best["lr"])) and settings["lru_dropout"] == float(best["lru_dropout"])
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.startswith("python train.py --dataset_code=tiny") and f"--lr={best['lr']}" in command
    assert len(list(Path("experiments/runs").glob("tune-table3-*.png"))) == 1
    for wrong in ("--range lr=1..1e-4", "--range colour=1..2", "--choice lr=", "--range lr=1e-4..1e-2:ln"):
        with pytest.raises(InputError, match="must be a setting with"):
            tune.main(["table3", *TINY.split(), *wrong.split()])


def test_tune_stops_a_trial_that_is_behind(monkeypatch):
    optuna = pytest.importorskip("optuna", reason="the search needs optuna")
    config, _ = resolve({})
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    epochs = {"0": (0.5, 0.6, 0.4), "1": (0.1, 0.9)}

    def trained(flags, on_epoch):
        for epoch, value in enumerate(epochs[flags[-1].rpartition("-")[2]], start=1):
            on_epoch({"epoch": epoch, "val": {"8": {"NDCG@10": 0.0}, "16": {"NDCG@10": value}}})

    monkeypatch.setattr(train, "main", trained)
    study.optimize(lambda trial: tune.train_trial(trial, {"lr": ("range", 1e-4, 1e-2, True)}, {}, config), 2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert study.best_value == 0.6
    assert study.trials[1].intermediate_values == {1: 0.1}


# ----------------------------------------------------------------------------------------------------------- benchmarks
# Run the benchmarks on small inputs, and compare the speed baseline with the model.

CPU = torch.device("cpu")


def in_one_process(benchmark: ModuleType, monkeypatch) -> None:
    """Call a benchmark's main in this process instead of starting processes that import torch anew."""

    def run(command, capture_output=False, **_):
        assert command[:3] == [sys.executable, "-m", benchmark.__name__]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            benchmark.main(command[3:])
        if not capture_output:
            print(printed.getvalue())
        return SimpleNamespace(stdout=printed.getvalue())

    monkeypatch.setattr(benchmark, "subprocess", SimpleNamespace(run=run))


def test_the_baseline_has_the_loss_gradients_and_ranks_of_the_model(tmp_path):
    write_prepared(tmp_path, "tiny", users=20, items=12)
    sequences = load_catalog(tmp_path, "tiny").sequences
    torch.manual_seed(0)
    model = FMRLRec(
        12,
        torch.randn(12, 5),
        ModelSettings(mrl_hidden_sizes=(2, 4, 8), lru_dropout=0.0, lru_attn_dropout=0.0, lru_r_max=0.9),
    ).double()
    baseline = Baseline(model)

    batch = next(TrainLoader(train_rows(sequences, 50), 20, 0, CPU).epoch(1))
    table = model.item_table()
    z = model.encode(table[batch.tokens], batch.position, batch.longest)
    loss = matryoshka_cross_entropy(z, table, batch.labels, model.sizes, reduction="mean")
    rows = [sequences.of(u)[:-2].tolist() for u in range(20)]
    plain = baseline.loss(padded([row[:-1] for row in rows]), padded(rows))
    assert abs(loss.item() - plain.item()) < 1e-10
    parameters = list(model.parameters())
    for fast, slow in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(plain, parameters), strict=True):
        assert (fast - slow).abs().max() <= 1e-9 * slow.abs().max()

    test = eval_rows(sequences, 50, "test")
    batch = next(eval_batches(test, 20, CPU))
    with torch.inference_mode():
        table = model.item_table()
        z = model.encode(table[batch.tokens], batch.position, batch.longest)[batch.last]
        ranks = baseline.ranks(padded([sequences.of(u)[:-1].tolist() for u in range(20)]), batch.targets)
        for size, found in zip(model.sizes, ranks, strict=True):
            scores = z[:, :size] @ table[:, :size].T
            scores[:, 0] = -torch.inf
            assert torch.equal(target_ranks(scores, batch.targets), found.double())


def test_the_speed_benchmark_prints_every_case_with_its_ratio(monkeypatch, capsys):
    in_one_process(speed, monkeypatch)
    small = "--users 300 --items 50 --features 8 --sizes 2,4 --blocks 1 --batch 8 --runs 1"
    speed.main(small.split())
    printed = capsys.readouterr().out
    for case in ("baseline", "every slice alone"):
        assert re.search(rf"^  {case} +[\d.]+ +[\d.]+x$", printed, re.MULTILINE)
    for case in ("fp32", "bf16", "bf16-plus", "plus-256", "one pass"):
        assert re.search(rf"^  {case} +[\d.]+ +[\d.]+x +[\d.]+ +[\d.]+$", printed, re.MULTILINE)
    assert printed.count("GB peak resident memory") == 5


def test_the_scaling_benchmark_prints_a_row_for_every_case(monkeypatch, capsys):
    in_one_process(scaling, monkeypatch)
    monkeypatch.setattr(scaling, "SIZES", (4, 8))
    small = "--items 30,60 --lengths 3,5 --batches 1,2 --features 4 --negatives 7 --runs 1"
    scaling.main(small.split())
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in printed.splitlines() if line.startswith("|")]
    rows = [row for row in cells if row[0].isdigit()]
    by_items = [["30", "7 drawn"], ["60", "7 drawn"], ["30", "all"], ["60", "all"]]
    plus = [[items, how] for how in ("compact", "rows", "all") for items in ("30", "60")]
    assert rows == [*by_items, ["3", "32"], ["5", "32"], ["1", "all"], ["2", "all"], *plus]
    assert "ranks of 1,000 users at all sizes among 60 items" in printed
    scaling.main(["--plan", "100000000"])
    assert capsys.readouterr().out.splitlines()[3].startswith("| 8 | 32.3 | 410 | 1.7 | 0.0186 |")


def test_the_pictures_benchmark_downloads_despite_failures(capsys):
    small = "--pictures 14 --side 32 --latency 0 --failures 0.5 --read 0.3 --tries 2 --runs 1"
    pictures.main(small.split())
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.endswith("| 14 | 0 | 0 | yes |")
    assert second.endswith("| 8 | 2 | 4 | yes |")


def test_the_prepare_benchmark_makes_raw_files_once_and_prepares_them(tmp_path, capsys):
    small = ["--reviews", "3000", "--products", "100", "--folder", str(tmp_path), "--formats=json,parquet"]
    prepare.main(small)
    raw = tmp_path / "raw-3000-100"
    made = (raw / "reviews.json.gz").stat().st_mtime_ns
    prepare.make_files(raw, ["json"], 3000, 100)
    assert (raw / "reviews.json.gz").stat().st_mtime_ns == made
    out = capsys.readouterr().out
    assert out.count("| yes |") == 2
    assert out.splitlines()[-1].startswith("| 3,000 | 100 | parquet | memory | 0.00 |")
    assert (tmp_path / "made" / "sequential_data.txt").exists()


def test_the_features_benchmark_prints_rates_and_cosines(tmp_path, capsys):
    metadata = write_prepared(tmp_path, "tiny", items=20) / "meta.json.gz"
    bert = write_tiny_bert(tmp_path / "bert", positions=64)
    features.main(["--texts", str(metadata), "--language_encoder", str(bert), "--img_model", "none", "--runs", "1"])
    printed = capsys.readouterr().out
    rates = r"^  {}  bare forward +[\d.]+/s   whole path +[\d.]+/s   [\d.]+%$"
    assert all(re.search(rates.format(precision), printed, flags=re.MULTILINE) for precision in ("fp32", "bf16"))
    assert "cosine of fp32 and bf16: least 0.9" in printed
