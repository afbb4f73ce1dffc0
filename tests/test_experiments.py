"""Define and run experiments, keep results, make the report of them; test cold items and run the benchmarks."""

import contextlib
import dataclasses
import io
import json
import os
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluate
import train
from benchmarks import features, pictures, prepare, scaling, speed
from common.errors import InputError
from config import NAMED_PRESETS, Config, ModelSettings, resolve
from datasets.catalog import load_catalog
from experiments import cold_items, cut, definition, figures, look, report, run, tables, tune
from experiments.definition import Definition, Row, definitions, identity, read_definitions
from experiments.figures import draw_figures
from experiments.paper import MASKED
from experiments.store import keep, kept_runs
from experiments.tables import paired_bootstrap, student_p, user_metrics, welch_test, write_reproduction
from model import FMRLRec, count_parameters
from serving import export
from serving.weights import user_weighted_pca
from tests.made_up import write_prepared, write_tiny_bert
from trainer.evaluation import ranking_metrics
from trainer.load_run import load_run
from trainer.runs import read_log, read_plane, save_ranks


def defined(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(f'[mine]\ntitle = "T"\ntext = "t"\ndatasets = ["beauty"]\n{text}', encoding="utf-8")
    return read_definitions(path)["mine"]


def test_an_invalid_definition_is_named_with_its_file(tmp_path):
    for text, problem in (
        ("rows.a = { lru_blocks = 2 }", r"unknown settings \['lru_blocks'\]"),
        ('rows.a = { lru_num_blocks = "2" }', "lru_num_blocks '2', which must be of type int"),
        ('compare = [["a", "c"]]\nrows.a = { }', r"compares unknown rows \['c'\]; its rows are \['a'\]"),
        ("colour = 1\nrows.a = { }", "colour"),
        ("rows.a = { size = 7 }", "size 7; its sizes are 8,16"),
        ('rows.a = { published = "sasrek" }', "published 'sasrek'; known are .*sasrec"),
        ("", "experiment 'mine' lacks 'rows'"),
        ("rows = " + "9" * 5000, "is not valid TOML"),
    ):
        with pytest.raises(InputError, match=rf"mine\.toml.*{problem}"):
            defined(tmp_path, text)


def test_the_settings_in_which_rows_differ_are_varied(tmp_path):
    rows = "settings.lr = 1e-3\nrows.a = { seed = 1, lru_num_blocks = 1 }\nrows.b = { seed = 1, lru_num_blocks = 2 }\n"
    definition = defined(tmp_path, rows + "rows.c = { seed = 1, num_epochs = 3 }")
    assert definition.varied() == {"lru_num_blocks", "num_epochs"}
    assert [row.settings["lr"] for row in definition.rows] == [1e-3] * 3
    rows = "rows.a = { }\nrows.b = { enable_lr_schedule = false }\n"
    assert defined(tmp_path, rows).varied() == {"enable_lr_schedule", "warmup_steps"}
    assert definitions()["baselines"].varied() == set(Config.__dataclass_fields__)  # other models differ in all


def test_a_preset_in_a_definition_sets_its_settings_and_extensions_must_be_named(tmp_path):
    text = 'rows.a = { preset = "plus", distill = 0.25 }\nrows.b = { preset = "paper" }\nrows.c = { preset = "plus" }'
    definition = defined(tmp_path, text)
    a, b, c = definition.rows
    assert a.settings == NAMED_PRESETS["plus"] | {"distill": 0.25}
    assert (b.settings, c.settings) == ({}, NAMED_PRESETS["plus"])
    for flags, expected in (({"preset": "plus"}, [c]), (c.settings, [c]), ({}, [b]), ({"item_embedding": 64}, [])):
        config = resolve(flags | {"dataset_code": "beauty"})[0]
        assert [row for row in definition.rows if definition.fits(row, config)] == expected


def test_runs_are_the_same_if_they_differ_in_ineffective_settings_alone():
    for flags, change, same in (
        ({"use_img_encoder": False}, {"img_encoder": "other"}, True),
        ({}, {"img_encoder": "other"}, False),
        ({}, {"device": "cpu", "val_batch_size": 3, "run_name": "x"}, True),
        ({"model_code": "sasrec"}, {"num_heads": 2}, False),
    ):
        config = resolve(flags)[0]
        assert (identity(dataclasses.replace(config, **change)) == identity(config)) == same


FLAGS = (
    "--dataset_code tiny --no-use_img_encoder --language_encoder lexical --mrl_hidden_sizes 2,4 --num_epochs 1 "
    "--device cpu --results kept"
)
ONE = "depth --rows '1 block'"


@pytest.fixture
def calls(monkeypatch):
    noted, status = [], {InputError: 2, KeyboardInterrupt: 130}

    def call(script, arguments, environment):
        noted.append([script, *arguments])
        try:
            {"train.py": train.main, "eval.py": evaluate.main}[script](arguments)
        except tuple(status) as error:
            return status[type(error)]
        return 0

    monkeypatch.setattr(run, "call_script", call)
    return noted


def run_experiments(arguments):
    return run.main(shlex.split(f"{arguments} {FLAGS}"))


def test_every_seed_dataset_and_row_has_a_job_and_rows_of_the_same_training_share_it():
    def planned(*experiments, datasets=None, seeds=(42,)):
        picked = [(definitions()[name], list(definitions()[name].rows)) for name in experiments]
        return definition.planned(picked, {}, list(seeds), datasets)

    jobs = planned("table3", seeds=[1, 2])
    assert len({str(identity(job.config)) for job in jobs}) == len(jobs) == 2 * 4 * 4
    names = [job.names for job in planned("independent", datasets=["beauty"])]
    assert [len(each) for each in names] == [8, *[1] * 8]  # nested, then alone
    jobs = planned("table2", datasets=["sports", "mine"])
    assert [(job.config.dataset_code, job.config.lru_r_max) for job in jobs] == [("sports", 0.2), ("mine", 0.1)]
    shared = [["depth/1 block"], ["depth/2 blocks", "loss/sum", "table2/fMRLRec"], ["loss/mean"]]
    assert [job.names for job in planned("depth", "loss", "table2", datasets=["beauty"])] == shared


def test_an_invalid_choice_of_runs_is_refused(workplace):
    for arguments, problem in (
        ("depht", "unknown experiment 'depht'; known are .*depth.*, and all"),
        ("depth --rows=3", "unknown row '3' of depth; known are 1 block; 2 blocks"),
        ("depth --seeds 4,x", "--seeds '4,x' must be integers"),
        ("depth --lru_num_blocks 4", "--lru_num_blocks 4 contradicts depth, whose row '1 block' has 1"),
        ("depth --distill .9", "--distill 0.9 contradicts depth, whose row '1 block' has no other extensions"),
    ):
        with pytest.raises(InputError, match=problem):
            run_experiments(arguments)


def test_a_row_with_teachers_is_run_with_those_that_are_named_or_left_out(workplace, calls, capsys):
    taught = "plus, taught by three"
    assert run.main(shlex.split(f'plus --rows "{taught};plus" --dry_run --dataset_code tiny'))[0].names == ["plus/plus"]
    assert f"left out: plus/{taught} learns from 3 trained runs; name them by --teachers" in capsys.readouterr().err
    [job] = run.main(shlex.split(f'plus --rows "{taught}" --teachers a,b,c --dry_run --dataset_code tiny'))
    assert job.names == [f"plus/{taught}"] and job.config.teachers == ("a", "b", "c")
    for teachers, problem in (("--teachers a,b", "a,b contradicts plus, whose row"), ("", "nothing to run: all")):
        with pytest.raises(InputError, match=problem):
            run.main(shlex.split(f'plus --rows "{taught}" {teachers} --dry_run --dataset_code tiny'))


def test_a_dry_run_lists_the_runs_and_what_is_wrong_with_their_data(workplace, calls, capsys):
    jobs = run_experiments("depth --seeds 1,2,1 --dry_run")
    assert [job.state for job in jobs] == ["to start"] * 4
    listed = capsys.readouterr().out
    assert "to start     tiny, seed 2: depth/1 block\n" in listed and listed.endswith("4 runs: 4 to start\n")
    run_experiments("depth --dry_run --data_root elsewhere")
    problem = "dataset 'tiny' is not at elsewhere/tiny (nothing is prepared there)"
    assert f"2 runs: 2 to start\n{problem}" in capsys.readouterr().out
    assert not calls and not Path("experiments").exists() and not Path("kept").exists()
    Path("kept").write_text("a file")
    with pytest.raises(InputError, match="cannot write kept"):
        run_experiments("depth")
    assert not calls


def test_missing_runs_are_trained_tested_twice_and_kept(workplace, calls):
    planned_before = run_experiments("depth --dry_run")
    jobs = run_experiments("depth")
    assert [call[0] for call in calls] == ["train.py", "eval.py"] * 2
    assert all("--mask_history" in call for call in calls[1::2])
    found = kept_runs(Path("kept"))
    assert [run.config.lru_num_blocks for run in found] == [job.config.lru_num_blocks for job in jobs] == [1, 2]
    assert all(run.complete() and run.ranks(masked=True) for run in found)
    calls.clear()
    again = run_experiments("depth,loss --rows '1 block; sum'")
    run.work(planned_before, Path("kept"))  # as a second runner that planned before the first was done
    (workplace / "experiments").rename(workplace / "elsewhere")
    assert {job.state for job in [*again, *planned_before, *run_experiments("depth")]} == {"finished"} and not calls


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
    jobs = run_experiments("depth")
    assert calls[1][:3] == ["train.py", "--resume", str(cut)]
    assert [call[0] for call in calls[1:]] == ["train.py", "eval.py"] * 2
    assert [job.state for job in jobs] == ["finished"] * 2


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [(train, "main", "train.py failed with 2: tiny, seed 42: depth/1 block"), (run, "keep", "failed: no: tiny")],
)
def test_a_failed_run_is_named_and_the_others_go_on(workplace, calls, monkeypatch, capsys, module, name, message):
    true = getattr(module, name)

    def fail_once(*arguments):
        monkeypatch.setattr(module, name, true)
        raise InputError("no")

    monkeypatch.setattr(module, name, fail_once)
    with pytest.raises(SystemExit, match="1"):
        run_experiments("depth")
    assert message in capsys.readouterr().err and len(kept_runs(Path("kept"))) == 1


def test_runs_on_other_data_or_of_another_version_do_not_count(workplace, calls, capsys):
    (job,) = run_experiments(ONE)
    write_prepared(workplace / "data", "tiny", users=20, items=12, pictures=True, seed=1)
    (again,) = run_experiments(ONE)
    assert again.state == "finished" and again.run != job.run and len(kept_runs(Path("kept"))) == 2
    shutil.rmtree("kept")
    for path in Path("experiments/runs").glob("*/*/config.json"):
        path.write_text(path.read_text().replace('"lr"', '"learning_rate"'))
    assert [job.state for job in run_experiments(f"{ONE} --dry_run")] == ["to start"]
    assert "unknown settings ['learning_rate']" in capsys.readouterr().err


def test_sigterm_ends_the_running_script_and_starts_no_other(workplace, monkeypatch, capsys):
    script = "import pathlib, time\npathlib.Path('began').open('a').write('one ')\ntime.sleep(60)\n"
    (workplace / "train.py").write_text(script)
    monkeypatch.setattr(run, "REPOSITORY", workplace)

    def end():
        while not (Path("began").exists() and Path("began").read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        run_experiments("depth")
    assert Path("began").read_text() == "one "
    assert f"train.py failed with {-signal.SIGTERM}: tiny" in capsys.readouterr().err
    assert not run.CHILDREN and signal.getsignal(signal.SIGTERM) == before


def test_every_visible_device_has_one_run_at_a_time(workplace, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    busy, most = [], []

    def call(script, arguments, environment):
        device = environment["CUDA_VISIBLE_DEVICES"]
        busy.append(device)
        most.append(sorted(busy))
        time.sleep(0.05)
        busy.remove(device)
        return 1

    monkeypatch.setattr(run, "call_script", call)
    with pytest.raises(SystemExit):
        run.main(f"depth --seeds 1,2,3 {FLAGS}".replace("--device cpu", "").split())
    assert len(most) == 6 and max(most, key=len) == ["2", "5"] and all(len(set(some)) == len(some) for some in most)


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
        assert [again.state for again in run_experiments(ONE)] == ["finished"]
        assert [[call[0], "--mask_history" in call] for call in calls] == [["eval.py", masked]]
    assert (job.run / "test_mrl_metrics.json").read_bytes() == before
    keep_without("test_*_history_masked.*")
    shutil.rmtree("experiments")
    assert [again.state for again in run_experiments(ONE)] == ["kept in part"]


def test_an_experiment_on_validation_never_tests_until_another_asks_for_it(workplace, calls, monkeypatch):
    rows = (Row("off", {"whiten_features": False}), Row("on", {"whiten_features": True}))
    mine = Definition("screening", "S", "s", ("beauty",), rows, validation=True)
    monkeypatch.setattr(definition, "definitions", lambda: definitions() | {"screening": mine})
    jobs = run_experiments("screening,depth --rows 'off;on;2 blocks' --dry_run")
    names_and_tests = [(["screening/off", "depth/2 blocks"], True), (["screening/on"], False)]
    assert [(job.names, job.tests) for job in jobs] == names_and_tests
    assert [job.state for job in run_experiments("screening")] == ["finished"] * 2
    assert [call[0] for call in calls] == ["train.py"] * 2 and not list(workplace.glob("**/test_*"))
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
    run = train.main(f"{FLAGS} --mrl_hidden_sizes 16,32 --history_bias --lr 0.01".replace("--results kept", "").split())
    evaluate.main(["--run", str(run), "--mask_history"])
    found = cut.main([str(run)])
    assert found == json.loads((run / "cut.json").read_text()) and (run / "cut.png").exists()
    for protocol, suffix in (("kept", ""), ("masked", "_history_masked")):
        tested = json.loads((run / f"test_mrl_metrics{suffix}.json").read_text())
        assert list(found[protocol]["cut"]) == ["8", "16", "32"] and list(found[protocol]["nested"]) == ["16", "32"]
        cells = {(cell["size"], cell["width"]): cell[protocol]["NDCG@10"] for cell in found["plane"]}
        assert list(cells) == [(16, 8), (16, 16), (32, 8), (32, 16), (32, 32)]
        assert [cells[m, m] for m in (16, 32)] == [tested[str(m)]["NDCG@10"] for m in (16, 32)]
        assert [cells[32, w] for w in (8, 16)] == [found[protocol]["cut"][str(w)]["NDCG@10"] for w in (8, 16)]
        assert cells[16, 8] == pytest.approx(cells[16, 16], rel=0.2)
    rows = load_catalog("data", "tiny").num_items + 1
    assert all(cell["table_bytes"] == 4 * rows * cell["width"] and cell["encoder_ms"] > 0 for cell in found["plane"])
    assert read_plane(run) == found["plane"]
    (run / "best.safetensors").write_bytes(b"other weights")
    assert read_plane(run) == []
    shop = train.main(["--dataset_code=tiny", "--model_code=popularity", "--device=cpu"])
    with pytest.raises(InputError, match="a run of popularity, which has no item table"):
        cut.main([str(shop)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return data_root, the whole catalogue, the one without a fifth of its items, and held_out.json."""
    root = tmp_path_factory.mktemp("data")
    write_prepared(root, "whole", users=40, items=150)
    cold_items.main(["make", f"--from_root={root}", f"--data_root={root}", "--dataset_code=whole", "--share=0.2"])
    held = json.loads((root / "whole-cold/held_out.json").read_text())
    return root, load_catalog(root, "whole"), load_catalog(root, "whole-cold"), held


def test_held_out_items_leave_the_others_and_the_users_who_end_in_them_are_the_test(made):
    _, whole, cold, held = made
    out = {record["asin"] for record in held["items"]}
    assert len(out) == 30
    titles, left = (
        {asin: record["title"] for asin, record in zip(c.asins, c.metadata, strict=True)} for c in (whole, cold)
    )
    assert left == {asin: title for asin, title in titles.items() if asin not in out}
    before, after = (
        [[c.asins[i - 1] for i in c.sequences.of(u)] for u in range(len(c.sequences))] for c in (whole, cold)
    )
    without = [[asin for asin in history if asin not in out] for history in before]
    assert after == [history for history in without if len(history) >= 3]
    pairs = [(rest, history[-1]) for history, rest in zip(before, without, strict=True)]
    expected = [{"history": rest, "target": target} for rest, target in pairs if target in out and rest]
    assert held["users"] == expected and len(expected) >= 3


def test_a_share_without_any_item_and_a_damaged_held_out_json_are_refused(made, tmp_path, monkeypatch):
    for share in ("1", "nan", "0.001"):
        with pytest.raises(InputError, match="--share"):
            cold_items.main(["make", "--dataset_code", "whole", "--from_root", str(made[0]), "--share", share])
    export = SimpleNamespace(config={"dataset": {"code": "whole-cold"}})
    monkeypatch.setattr("serving.Recommender.from_pretrained", lambda folder: export)
    folder = shutil.copytree(made[0] / "whole-cold", tmp_path / "whole-cold")
    (folder / "held_out.json").write_text(json.dumps(made[3] | {"items": [{"title": "Tent"}]}))
    with pytest.raises(InputError, match=r"held_out\.json has no 'asin' in items\[0\].*cold_items make writes it"):
        cold_items.main(["test", "export", "--data_root", str(tmp_path)])


def test_held_out_items_are_added_to_an_export_and_ranked_among_all(made, tmp_path, monkeypatch):
    root, _, cold, held = made
    monkeypatch.chdir(tmp_path)
    flags = "--language_encoder lexical --no-use_img_encoder --lru_num_blocks 1 --mrl_hidden_sizes 4,8 --num_epochs 1"
    run = train.main(["--dataset_code", "whole-cold", "--data_root", str(root), *flags.split()])
    (folder,) = export.main(["--run", str(run), "--out", str(tmp_path / "cold")])
    found = cold_items.main(["test", str(folder), "--data_root", str(root), "--out", str(run / "cold_items.json")])
    assert found == json.loads((run / "cold_items.json").read_text())
    assert (found["items"], found["held_out"], found["size"]) == (150, 30, 8)
    never, trained, chance = (found["users"][name] for name in ("never trained", "trained", "chance"))
    assert never["count"] == chance["count"] == len(held["users"]) and trained["count"] <= len(cold.sequences)
    assert chance["Recall@50"] == 50 / 150
    report.main([f"--keep={run}", f"--results={tmp_path}/kept", f"--out={tmp_path}/R.md", f"--media={tmp_path}"])
    assert f"| never trained | {never['count']} | {never['Recall@10']:.4f} |" in (tmp_path / "R.md").read_text()


def test_recall_counts_a_target_by_its_place_in_the_answer():
    class Answers(list):
        def recommend(self, histories, top_k, exclude_history):
            assert top_k == 100 and not exclude_history
            answers = [[*range(1000, 1000 + place), 7, *range(2000, 2099 - place)] for (place,) in histories]
            return [SimpleNamespace(numbers=np.array(a), ids=[str(number) for number in a]) for a in answers]

    found = cold_items.recalls(Answers(range(5000)), [([9], 7), ([10], "7"), ([49], 7), ([99], 8)])
    assert found == {"count": 4, "Recall@10": 0.25, "Recall@50": 0.75, "Recall@100": 0.75}


TINY = "--dataset_code tiny --language_encoder lexical --img_encoder pixel --device cpu --lru_num_blocks 1"


def test_look_lists_neighbours_draws_a_map_and_ranks_by_id_order(workplace, capsys):
    trained = str(train.main([*TINY.split(), "--mrl_hidden_sizes", "4,8", "--num_epochs", "1", "--no-test"]))
    _, catalog, model = load_run(trained)
    look.main([trained, "--item", catalog.metadata[2]["title"].lower(), "--neighbours", "3", "--size", "4"])
    listed = capsys.readouterr().out.partition(f"most like {catalog.asins[2]}")[2].splitlines()[1:]
    cosines = [float(line.split()[0]) for line in listed[:3]]
    assert cosines == sorted(cosines, reverse=True) and catalog.asins[2] not in "".join(listed)
    assert Path(trained, "embeddings.png").read_bytes().startswith(b"\x89PNG")
    for flags, problem in (("--item e", r"fits \d+ titles; give an id"), ("--size 5", r"its sizes are \(4, 8\)")):
        with pytest.raises(InputError, match=problem):
            look.main([trained, *flags.split()])
    look.main([trained, "--id_order", "--size", "4"])
    ids, rows = ["", *catalog.asins], [catalog.sequences.of(u).tolist() for u in range(len(catalog.sequences))]
    pairs = [ids[row[k]] < ids[row[k + 1]] for row in rows for k in range(len(row) - 3)]
    table, expected = model.item_table().detach(), [f"{np.mean(pairs):.1%} of the next items in training"]
    for start in look.HEAD_STARTS:
        ranks = []
        for *history, target, _ in rows:
            z = model.encode(table[history], torch.arange(len(history)), len(history))[-1, :4].detach()
            score = table[:, :4] @ z + start * torch.tensor([i > ids[history[-1]] for i in ids])
            score[[0, *{*history} - {target}]] = -torch.inf
            ranks.append(1 + (score > score[target]).sum() + ((score == score[target]).sum() - 1) / 2)
        found = ranking_metrics(torch.tensor(ranks), (10,))
        expected.append(f"{start:10.1f} {found['NDCG@10']:8.4f} {found['Recall@10']:10.4f}\n")
    printed = capsys.readouterr().out
    assert all(line in printed for line in expected) and expected[1][10:] != expected[-1][10:]


def test_tune_searches_by_validation_and_continues(workplace, capsys):
    pytest.importorskip("optuna", reason="the search needs optuna")
    flags = f"table3 {TINY} --mrl_hidden_sizes 4,8 --num_epochs 3 --range lr=1e-4..1:log --choice lru_dropout=0,0.5"
    tune.main([*flags.split(), "--trials", "1"])
    best = tune.main([*flags.split(), "--trials", "3"])
    runs = sorted(Path("experiments/runs/tiny").iterdir())
    assert [path.name.partition("-tune-")[2] for path in runs] == ["0", "1", "2"]
    assert not any((path / "test_metrics.json").exists() for path in runs)
    values = [max(line["val"]["8"]["NDCG@10"] for line in read_log(path)) for path in runs]
    settings = json.loads((runs[values.index(max(values))] / "config.json").read_text())["settings"]
    assert settings["lr"] == pytest.approx(float(best["lr"])) and settings["lru_dropout"] == float(best["lru_dropout"])
    assert f"--lr={best['lr']}" in capsys.readouterr().out.splitlines()[-1]  # the command of the best run
    for wrong in ("--range lr=1..1e-4", "--range colour=1..2", "--choice lr=", "--range lr=1e-4..1e-2:ln"):
        with pytest.raises(InputError, match="must be a setting with"):
            tune.main(["table3", *TINY.split(), *wrong.split()])
    for asked, problem in (
        (f"{flags} --seed 7", "holds a search with other settings"),
        (f"plus,table3 --row 'plus, taught by three' {TINY} --range lr=1e-4..1", "has 3 teachers; give as many runs"),
    ):
        with pytest.raises(InputError, match=problem):
            tune.main(shlex.split(asked))


BENCHMARKS = {  # benchmark -> flags that shorten it
    speed: "--users 300 --items 50 --features 8 --sizes 2,4 --blocks 1 --batch 8 --runs 1",
    scaling: "--items 30,60 --lengths 3,5 --batches 1,2 --features 4 --negatives 7 --runs 1",
    pictures: "--pictures 14 --side 32 --latency 0 --failures 0.5 --read 0.3 --tries 2 --runs 1",
    prepare: "--reviews 3000 --products 100 --folder made --formats=json,parquet",
    features: "--texts data/tiny/meta.json.gz --language_encoder bert --img_model none --runs 1",
}


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_benchmark_runs_and_its_ways_make_the_same(workplace, monkeypatch, capsys, benchmark):
    def run(command, capture_output=False, **_):  # in this process, which has imported torch
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            benchmark.main(command[3:])
        if not capture_output:
            print(printed.getvalue())
        return SimpleNamespace(stdout=printed.getvalue())

    monkeypatch.setenv("PYTHONPATH", str(Path(speed.__file__).parents[1]))
    if benchmark in (speed, scaling):
        monkeypatch.setattr(benchmark, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(scaling, "SIZES", (4, 8))
    if benchmark is features:
        write_tiny_bert(Path("bert"), positions=64)
    benchmark.main(BENCHMARKS[benchmark].split())
    assert "| no |" not in capsys.readouterr().out
    if benchmark is scaling:
        scaling.main([*BENCHMARKS[scaling].split(), "--tables", "epoch"])
        assert "process 0 of 1, 60 items, peak training " in capsys.readouterr().out


def test_a_dry_run_names_the_encoders_that_are_not_on_this_disk(workplace, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(workplace))
    encoders = "--language_encoder nobody/reads --img_encoder ViT-B-32/openai"
    run.main(shlex.split(f"depth --rows '1 block' --dry_run --dataset_code tiny {encoders}"))
    missing = [line.split(" is not on this disk")[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert missing == ["--language_encoder nobody/reads", "--img_encoder ViT-B-32/openai"]


# ------------------------------------------------------------------------------------------ kept results and the report

USERS = 400


def write_run(folder, flags, *, seed=42, data="d", tested=True, masked=True, val=None):
    """Write the files of a finished run, with metrics of made-up ranks; masked, a rank is one better."""
    config, sources = resolve({"dataset_code": "beauty", "seed": seed, **flags})
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    ranks = {m: random.integers(1, 40, size=USERS).astype(float) for m in config.mrl_hidden_sizes}
    (folder / "config.json").write_text(json.dumps({"settings": vars(config), "sources": sources}))
    environment = {"device": "a CPU", "commit": "0123456789abc", "uncommitted_changes": False, "data": data,
                   "versions": {"torch": "2.11"}, "command": ["train.py", "--x"], "started": folder.name}  # fmt: skip
    (folder / "env.json").write_text(json.dumps(environment))
    val = val or {str(m): {"NDCG@10": 0.25} for m in config.mrl_hidden_sizes}
    epochs = [{"epoch": e, "best_epoch": 1, "seconds": 60.0 * e, "train_seconds": 50.0, "val": val if e == 1 else {}}
              for e in sorted({1, config.num_epochs})]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in epochs))
    for suffix, better in (("", 0), ("_history_masked", 1))[: tested + (tested and masked)]:
        of_sizes = {m: np.maximum(1, found - better) for m, found in ranks.items()}
        metrics = {str(m): ranking_metrics(torch.tensor(found), (5, 10, 20, 50)) for m, found in of_sizes.items()}
        (folder / f"test_mrl_metrics{suffix}.json").write_text(json.dumps(metrics))
        save_ranks(folder / f"test_ranks{suffix}.npz", of_sizes, 50, np.zeros(USERS, dtype=int))
    return folder


def keep_run(results, name, flags, **how):
    run = write_run(results.parent / "runs" / name, flags, **how)
    keep(run, results, tests=False)
    return run


def section(name, results):
    return tables.section(definitions()[name], kept_runs(results))


def rows_of(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


LANGUAGE = {"use_img_encoder": False}


def test_a_run_is_rows_of_one_csv_and_a_line_of_one_jsonl(results):
    run = keep_run(results, "a", LANGUAGE)
    (record,) = map(json.loads, (results / "runs.jsonl").read_text().splitlines())
    assert record["settings"] == json.loads((run / "config.json").read_text())["settings"]
    assert record["environment"] == json.loads((run / "env.json").read_text())
    assert (record["run"], record["best_epoch"], record["seconds"]) == ("beauty-a", 1, 60.0 * record["epochs"])
    new = write_run(results.parent / "b", {"mrl_hidden_sizes": (4, 8)}, seed=1)
    path = new / "test_mrl_metrics.json"  # with a metric that the other lacks
    path.write_text(json.dumps({size: m | {"Coverage@10": 0.5} for size, m in json.loads(path.read_text()).items()}))
    keep(new, results)
    old, new = kept_runs(results)
    for suffix, masked in (("", ""), ("_history_masked", MASKED)):
        for size, metrics in json.loads((run / f"test_mrl_metrics{suffix}.json").read_text()).items():
            found = old.test.loc[int(size), [name + masked for name in metrics]]
            assert found.to_numpy() == pytest.approx(list(metrics.values()), abs=1e-8)
    assert new.validation.at[8, "NDCG@10"] == 0.25
    assert "Coverage@10" not in old.test and (new.test["Coverage@10"] == 0.5).all()


def test_a_run_is_kept_again_only_if_it_has_something_new(results):
    run = keep_run(results, "a", {}, masked=False)
    with pytest.raises(InputError, match=r"beauty-a is kept already in .* nothing new"):
        keep(run, results)
    assert not kept_runs(results)[0].complete()
    keep(write_run(results.parent / "elsewhere" / "a", {}), results)
    keep_run(results, "compared by no experiment", {"distill": 0.7})
    kept, other = kept_runs(results)
    assert kept.complete() and other.complete() and other.ranks() is None
    ranks = np.random.default_rng(42).integers(1, 40, size=USERS)
    assert (kept.ranks()[8] == ranks).all() and (kept.ranks(masked=True)[8] == np.maximum(1, ranks - 1)).all()


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("env.json", '"started": "a"', '"started": "later"', "another run is kept as beauty-a"),
        ("env.json", '"commit"', '"commiu"', "the record of .* has no 'commit' in environment; train it again"),
        ("log.jsonl", '"epoch": 40', '"epoch": 1', r"is not finished \(epoch 1 of 40\); train.py --resume"),
        ("log.jsonl", '"best_epoch": 1', '"best_epoch": 77', "log.jsonl has no line of the run's best epoch"),
    ],
)
def test_a_run_that_cannot_be_kept_is_refused(results, name, old, new, problem):
    keep_run(results, "a", {"num_epochs": 40}, masked=False)
    other = write_run(results.parent / "elsewhere" / "a", {"num_epochs": 40})
    text = (other / name).read_text()
    assert old in text
    (other / name).write_text(text.replace(old, new))
    with pytest.raises(InputError, match=problem):
        keep(other, results)


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("runs.jsonl", '{"run": "beauty-b"', '{"run "beauty-b"', r"runs.jsonl:2 is not JSON"),
        ("runs.jsonl", "beauty-b", "beauty-c", r"runs.jsonl:2: .*metrics.csv has no line of run beauty-c"),
        ("runs.jsonl", '"epochs"', '"epoch"', r"runs.jsonl:1 has no 'epochs'"),
        ("runs.jsonl", '"lr":', '"rate":', r"runs.jsonl:1 \(run beauty-a\): .*unknown settings \['rate'\]"),
        ("metrics.csv", "beauty-a,beauty,test,kept,8,0.", "beauty-a,beauty,test,kept,8,o.", r"metrics.csv:2 .*metric"),
        ("metrics.csv", "kept,16,", "kept,8,", r"metrics.csv:3 repeats another line"),
        ("ranks.npz", "", "damage", r"ranks.npz cannot be read"),
        ("metrics.csv", "masked,8,", "masked,8,,", r"metrics.csv cannot be read .* line 4"),
    ],
)
def test_a_damaged_line_is_named(results, name, old, new, problem):
    keep_run(results, "a", {"mrl_hidden_sizes": (8, 16)})
    keep_run(results, "b", {"mrl_hidden_sizes": (8, 16), "lru_num_blocks": 1})
    text = (results / name).read_text(errors="replace")
    assert old in text
    (results / name).write_text(text.replace(old, new))
    with pytest.raises(InputError, match=problem):
        [run.ranks() for run in kept_runs(results)]


def test_the_metrics_of_users_average_to_those_of_the_test():
    ranks = np.append(np.random.default_rng(0).integers(2, 120, size=1000) / 2, np.inf)
    expected = ranking_metrics(torch.tensor(ranks), (5, 10, 50))
    for name in ("Recall@10", "NDCG@50", "MRR@5"):
        assert user_metrics(ranks, name).mean() == pytest.approx(expected[name], rel=1e-12)


def test_welchs_test_compares_seeds():
    assert student_p(2.776445, 4) == pytest.approx(0.05, abs=1e-6)  # tabulated
    assert student_p(-12.7062, 1) == pytest.approx(0.05, abs=1e-6) and student_p(0, 2.5) == pytest.approx(1)
    found = welch_test([1.0, 2.0, 3.0], [2.0, 4.0])
    assert (found.t, found.freedom) == pytest.approx((-0.866025, 1.684211), rel=1e-5)
    assert welch_test([1.0], [2.0, 4.0]) is welch_test([1.0, 1.0], [2.0, 2.0]) is None


def test_the_bootstrap_resamples_users(monkeypatch):
    random = np.random.default_rng(1)
    a, b = random.integers(0, 3, size=(2, 300)) / 2
    drawn = np.array([(a - b)[random.integers(0, 300, size=300)].mean() for _ in range(20_000)])
    found = paired_bootstrap(a, b)
    assert found.mean == pytest.approx((a - b).mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)
    assert found.p == pytest.approx(2 * min(np.mean(drawn <= 0), np.mean(drawn >= 0)), abs=0.03)
    certain = paired_bootstrap(a + 0.1, a)
    assert certain.p < 0.001 and certain.low > 0.09 and paired_bootstrap(a, a) == (0, 0, 0, 1)
    monkeypatch.setattr("experiments.tables.AT_ONCE", 777)
    assert paired_bootstrap(a, b) == found


def test_figure_4_comes_out_to_the_digit_and_counts_parameters_as_the_models_hold_them():
    found = {largest: f"{100 * saved:.2f}" for largest, saved, *_ in tables.figure4()}
    assert found == {128: "0.00", 256: "25.16", 512: "31.39", 1024: "32.90", 2048: "33.25"}
    model = FMRLRec(3, torch.zeros(3, tables.PAPER_FEATURES), ModelSettings(mrl_hidden_sizes=(4, 12, 20)))
    numbers, projection = (sum(p.numel() for p in of.parameters()) for of in (model, model.items))
    for with_projection, left_out in ((True, 0), (False, projection)):
        assert tables.stored_parameters(20, projection=with_projection) == numbers - left_out
        assert tables.unmasked_parameters(model.sizes, projection=with_projection) == count_parameters(model) - left_out


def test_a_table_compares_runs_that_differ_only_in_the_varied_settings(results):
    for name, flags in {
        "one": {"lru_num_blocks": 1},
        "two": {},
        "one-slow": {"lru_num_blocks": 1, "lr": 1e-3},
        "two-slow": {"lr": 1e-3},
        "two-long": {"num_epochs": 7},  # has no partner
        "sports": {"dataset_code": "sports"},
    }.items():
        keep_run(results, name, flags, masked=False)
    for blocks in (1, 2):
        keep_run(results, f"other-{blocks}", {"lru_num_blocks": blocks}, data="other", masked=False)
    lines = section("depth", results)
    headings = [line.partition(", data ")[2] for line in lines if line.startswith("### depth on beauty, ")]
    assert headings == ["d, lr default", "d, lr 0.001", "other, lr default"]
    assert [row[0] for row in rows_of(lines)].count("2 blocks") == 3  # and none with the history masked


@pytest.mark.parametrize(("wrong", "problem"), [("dept; a", "dept"), ("depth; 3 blocks", "3 blocks")])
def test_an_unknown_field_of_the_reproductions_template_is_named(tmp_path, wrong, problem):
    (tmp_path / "template.md").write_text(f"{{{{beauty; {wrong}; 8; NDCG@10}}}}")
    with pytest.raises(InputError, match=f"unknown .* '{problem}'"):
        write_reproduction([], tmp_path / "template.md")


def test_rows_without_partners_data_or_ranks_in_common_are_shown_only_beside_published_values(results):
    keep_run(results, "one", {"lru_num_blocks": 1}, data="other")
    keep_run(results, "two", {})
    assert all(section(name, results) == [] for name in ("depth", "independent", "loss"))
    run = write_run(results.parent / "same", {"lru_num_blocks": 1})
    for path in run.glob("*.npz"):
        path.unlink()
    keep(run, results)
    assert section("depth", results) and "paired bootstrap" not in "\n".join(section("depth", results))
    rows = rows_of(section("sizes", results))
    assert [(row[1], row[-3]) for row in rows[2:4]] == [("8", "0.0150"), ("16", "0.0180")]


def test_plus_is_drawn_beside_the_faithful_model_and_one_size_models(results, tmp_path, monkeypatch):
    small = LANGUAGE | {"mrl_hidden_sizes": (8, 16, 32, 64, 128, 256), "precision": "bf16"}
    short = {"train_batch_size": 128, "lr": 2e-3, "num_epochs": 12, "early_stopping_patience": 3}
    sampled = {"num_negatives": 1024, "lru_dropout": 0.6, "lru_attn_dropout": 0.6}
    older = small | {"preset": "plus", "history_bias": False, "item_embedding_gate": False}
    keep_run(results, "faithful", small | short | sampled)
    keep_run(results, "plus", older)
    keep_run(results, "plus2", older, seed=5)
    keep_run(results, "alone", older | {"mrl_hidden_sizes": (64,)})
    drawn, true_draw = [], figures.draw_curves
    monkeypatch.setattr(figures, "draw_curves", lambda *given: (drawn.append(given), true_draw(*given)))
    made = draw_figures(kept_runs(results), tmp_path / "media")
    assert [path.name for path in made] == ["plus.png"]
    panel, _, name, _, separate, levels = drawn[0]
    assert (name, [row.size for row in separate]) == ("Recall@10", [64]) and levels == {"best published": 0.1249}
    labels = sorted(text.get_text() for text in panel.texts)
    assert labels == ["best published", "faithful", "paper", "plus without bias"]
    assert [container.has_yerr for container in panel.containers] == [False, True, False]  # two seeds of plus


def test_the_report_of_other_results_does_not_replace_the_repositorys(results, tmp_path):
    run, before = write_run(tmp_path / "a", LANGUAGE), report.OUT.read_bytes()
    with pytest.raises(InputError, match=r"would replace the report of .*; give --out and --media"):
        report.main(["--keep", str(run), "--results", str(results)])
    assert report.OUT.read_bytes() == before
    elsewhere = [f"--results={results}", f"--out={tmp_path}/RESULTS.md", f"--media={tmp_path}/media"]
    with pytest.raises(InputError, match="has no kept runs; --keep RUN adds one"):
        report.main(elsewhere)
    report.main(["--keep", str(run), *elsewhere])
    assert (tmp_path / "RESULTS.md").read_text().startswith("# Results")


def test_the_figure_of_the_method_is_drawn(tmp_path):
    figures.main(["--out", str(tmp_path)])
    with Image.open(tmp_path / "architecture.png") as picture:
        assert picture.width > 800
