"""The runner of experiments, which does what is missing."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

import eval as evaluate
import train
from common.errors import InputError
from config import resolve
from datasets.catalog import load_catalog
from experiments import estimate, kept, plan, run
from experiments.definition import Definition, Row, definitions, identity
from tests.prepared import write_prepared
from trainer import trainer as trainer_of_runs
from trainer.runs import run_lock

FLAGS = (
    "--dataset_code tiny --no-use_img_encoder --language_encoder lexical --mrl_hidden_sizes 2,4 --num_epochs 2 "
    "--device cpu --results kept"
)


@pytest.fixture
def calls(monkeypatch):
    """Scripts are called in this process; their command lines are noted."""
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


def resolve_flags():
    """The settings among FLAGS."""
    return {
        "use_img_encoder": False,
        "language_encoder": "lexical",
        "mrl_hidden_sizes": (2, 4),
        "num_epochs": 2,
        "device": "cpu",
    }


def run_experiments(arguments):
    return run.main(shlex.split(f"{arguments} {FLAGS}"))


def planned(experiments, flags=None, seeds=(42,)):
    found = definitions()
    return run.planned([(found[name], list(found[name].rows)) for name in experiments], flags or {}, list(seeds))


def test_there_is_a_job_for_every_seed_dataset_and_row():
    jobs = planned(["table3"], seeds=[1, 2])
    assert len({str(identity(job.config)) for job in jobs}) == len(jobs) == 2 * 4 * 4


def test_rows_that_ask_for_the_same_training_share_a_job():
    jobs = planned(["depth", "loss", "table2"], {"dataset_code": "beauty"})
    assert [job.names for job in jobs] == [
        ["depth/1 block"],
        ["depth/2 blocks", "loss/mean", "table2/fMRLRec"],
        ["loss/sum"],
    ]


def test_nested_sizes_are_one_training_and_those_alone_one_each():
    jobs = planned(["independent"], {"dataset_code": "beauty"})
    assert [len(job.names) for job in jobs] == [8, *[1] * 8]


def test_a_dataset_may_be_several_or_one_that_the_definition_does_not_name():
    jobs = planned(["table2"], {"dataset_code": "sports,mine"})
    assert [job.config.dataset_code for job in jobs] == ["sports", "mine"]
    assert jobs[0].config.lru_r_max == 0.2  # the preset of sports


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("depht", "there is no experiment 'depht'; there are .*depth.*, and all"),
        ("depth --rows=3", "there is no row '3' in depth; there are .*1 block"),
        ("depth --seeds 4,x", "--seeds '4,x' must be whole numbers"),
        ("depth --lru_num_blocks 4", "--lru_num_blocks 4 is not free in depth: its row '1 block' has 1"),
        (
            "depth --distill .9",
            "--distill 0.9 is not free in depth: its row '1 block' has nothing beyond the paper",
        ),
        ("depth --preset plus", "--preset plus is not free in depth"),
    ],
)
def test_what_cannot_be_run_is_named(workplace, arguments, problem):
    with pytest.raises(InputError, match=problem):
        run_experiments(arguments)


def test_a_seed_is_given_by_seeds(workplace, capsys):
    with pytest.raises(SystemExit):
        run_experiments("depth --seed 3")
    assert "did you mean --seeds?" in capsys.readouterr().err


def test_a_dry_run_says_what_there_is_to_do_and_does_nothing(workplace, calls, capsys):
    jobs = run_experiments("depth --seeds 1,2,1 --dry_run")
    said = capsys.readouterr()
    assert "4 runs: 4 to start; 0 min at most for 4 of them, one at a time" in said.out
    assert said.err.count("measuring a few steps: tiny") == 2  # what two seeds do is the same work
    assert all(job.seconds > 0 for job in jobs)
    assert not calls and not Path("experiments").exists() and not Path("kept").exists()


def test_a_dry_run_knows_no_time_where_the_data_is_not_prepared(workplace, calls, capsys):
    run_experiments("depth --dry_run --data_root elsewhere")
    said = capsys.readouterr().out
    why = "dataset 'tiny' is not at elsewhere/tiny (nothing is prepared there). To prepare it: python -m"
    assert f"2 runs: 2 to start; not known how long for 2\n{why}" in said


def test_a_dry_run_says_what_is_wrong_with_the_data(workplace, calls, capsys):
    (workplace / "data/tiny/sequential_data.txt").write_text("1 2 abc 3\n")
    run_experiments("depth --dry_run")
    said = capsys.readouterr().out
    assert "not known how long for 2\ndata/tiny/sequential_data.txt:1: '1 2 abc 3' is not 'user item item" in said


def test_the_measured_time_is_that_of_all_steps_and_of_all_validation(workplace, monkeypatch):
    write_prepared(workplace / "data", "more", users=200, items=10)
    flags = resolve_flags() | {"dataset_code": "more", "train_batch_size": 10, "val_batch_size": 5}
    true = trainer_of_runs.Trainer.validate

    metrics = []  # of the first epoch, which is not measured: a busy machine would be

    def slow(trainer):
        time.sleep(0.1 * len(trainer.val_rows) / 200)
        metrics.append(metrics[0] if metrics else true(trainer))
        return metrics[0]

    def step(trainer, batch):
        time.sleep(0.02)
        return torch.zeros(())

    monkeypatch.setattr(trainer_of_runs.Trainer, "_update", step)
    monkeypatch.setattr(trainer_of_runs.Trainer, "validate", slow)
    seconds = estimate.measured(resolve(flags)[0], load_catalog(workplace / "data", "more"))
    assert 20 * 0.02 + 0.1 <= seconds < 3 * (20 * 0.02 + 0.1)


def test_a_model_that_only_counts_takes_no_time():
    assert estimate.measured(resolve({"model_code": "itemknn"})[0], None) == 0


def test_what_is_missing_is_run_tested_both_ways_and_kept_and_the_rest_is_skipped(workplace, calls, capsys):
    jobs = run_experiments("depth")
    assert [call[0] for call in calls] == ["train.py", "eval.py"] * 2
    assert all("--mask_history" in call for call in calls[1::2])
    for job in jobs:
        of_run = workplace / "kept" / f"tiny-{job.run.name}"
        assert {path.name for path in of_run.iterdir()} >= {
            "config.json", "env.json", "log.jsonl", "test_metrics.json", "test_mrl_metrics.json", "test_ranks.npz",
            "test_mrl_metrics_history_masked.json", "test_ranks_history_masked.npz",
        }  # fmt: skip
        assert not list(of_run.glob("*.pt")) and not list(of_run.glob("*.safetensors"))
    assert [job.config.lru_num_blocks for job in jobs] == [1, 2]
    assert {json.loads((job.run / "config.json").read_text())["settings"]["lru_num_blocks"] for job in jobs} == {1, 2}
    calls.clear()
    capsys.readouterr()
    again = run_experiments("depth,loss --rows '1 block; mean'")
    assert not calls
    assert [job.state for job in again] == ["finished"] * 2
    assert "2 runs: 2 finished\n" in capsys.readouterr().out


def test_kept_results_alone_are_enough_to_be_finished(workplace, calls):
    run_experiments("depth")
    (workplace / "experiments").rename(workplace / "elsewhere")
    calls.clear()
    assert [job.state for job in run_experiments("depth")] == ["finished"] * 2
    assert not calls


def test_a_run_that_was_cut_off_goes_on_where_it_was(workplace, calls, monkeypatch):
    true = train.main

    def cut_off(argv):
        monkeypatch.setattr(train, "main", true)
        true(argv)
        (cut,) = Path("experiments/runs/tiny").iterdir()
        (cut / "test_mrl_metrics.json").unlink()
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


def test_a_run_that_fails_is_named_and_the_rest_go_on(workplace, calls, monkeypatch, capsys):
    true = train.main

    def broken(argv):
        if "--lru_num_blocks=1" in argv:
            raise InputError("no")
        return true(argv)

    monkeypatch.setattr(train, "main", broken)
    with pytest.raises(SystemExit) as stopped:
        run_experiments("depth")
    assert stopped.value.code == 1
    assert "train.py failed with 2: tiny, seed 42: depth/1 block" in capsys.readouterr().err
    assert len(list(Path("kept").iterdir())) == 1


def test_a_run_without_the_ranks_of_its_users_is_tested_again(workplace, calls):
    (job,) = run_experiments("depth --rows '1 block'")
    before = (job.run / "test_mrl_metrics.json").read_bytes()
    for name in ("test_ranks.npz", "test_ranks_history_masked.npz"):
        (job.run / name).unlink()
    shutil.rmtree("kept")
    calls.clear()
    jobs = run_experiments("depth --rows '1 block'")
    assert [[call[0], "--mask_history" in call] for call in calls] == [["eval.py", False], ["eval.py", True]]
    assert [job.state for job in jobs] == ["finished"]
    assert (job.run / "test_mrl_metrics.json").read_bytes() == before


def test_the_time_is_estimated_by_a_run_that_does_the_same_work(workplace, calls, capsys):
    run_experiments("depth --seeds 1")
    log = run_experiments("depth --seeds 1 --rows '1 block'")[0].run / "log.jsonl"
    shutil.rmtree("experiments")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[-1]["seconds"] = 2 * 3600.0  # for 2 epochs
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    jobs = run_experiments("depth --seeds 1,2 --dry_run")
    assert [job.seconds for job in jobs][:2] == [None, None]
    assert jobs[2].seconds == 2 * 3600
    assert 0 < jobs[3].seconds < 60
    said = capsys.readouterr()
    assert "2.0 h at most for 2 of them" in said.out
    assert "measuring" not in said.err


def test_a_run_on_other_data_is_not_taken_for_this_one(workplace, calls):
    (job,) = run_experiments("depth --rows '1 block'")
    write_prepared(workplace / "data", "tiny", users=20, items=12, pictures=True, seed=1)
    (again,) = run_experiments("depth --rows '1 block' --dry_run")
    assert again.state == "to start"
    (again,) = run_experiments("depth --rows '1 block'")
    assert again.state == "finished" and again.run != job.run
    assert len(list(Path("kept").iterdir())) == 2


def test_sigterm_ends_the_script_that_runs_and_begins_no_other(workplace, monkeypatch, capsys):
    began = workplace / "began"
    (workplace / "train.py").write_text(
        f"import pathlib, time\npathlib.Path({str(began)!r}).open('a').write('one ')\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(run, "REPOSITORY", workplace)

    def end():
        while not began.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        run_experiments("depth")
    assert began.read_text() == "one "
    assert f"train.py failed with {-signal.SIGTERM}: tiny" in capsys.readouterr().err
    assert not run.CHILDREN and signal.getsignal(signal.SIGTERM) == before


def test_every_device_has_one_run_at_a_time(workplace, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    busy, most, lock = set(), [], threading.Lock()

    def call(script, arguments, environment):
        device = environment["CUDA_VISIBLE_DEVICES"]
        with lock:
            assert device not in busy
            busy.add(device)
            most.append(len(busy))
        time.sleep(0.05)
        with lock:
            busy.remove(device)
        return 1

    monkeypatch.setattr(run, "call_script", call)
    with pytest.raises(SystemExit):
        run.main(f"depth --seeds 1,2,3 {FLAGS}".replace("--device cpu", "").split())
    assert len(most) == 6
    assert max(most) == 2


@pytest.mark.parametrize(("visible", "expected"), [("2,5", ["2", "5"]), (None, ["0", "1"])])
def test_only_the_gpus_that_the_user_shows_are_used(monkeypatch, visible, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices = run.free_devices([])
    assert [devices.get() for _ in expected] == expected
    assert devices.empty()


def test_kept_files_that_lack_some_of_a_run_are_never_trained_on(workplace, calls, capsys):
    (job,) = run_experiments("depth --rows '1 block'")
    (of_run,) = Path("kept").iterdir()
    (of_run / "log.jsonl").unlink()
    (again,) = run_experiments("depth --rows '1 block' --dry_run")
    assert (again.run, again.state) == (job.run, "to keep")
    shutil.rmtree("experiments")
    (again,) = run_experiments("depth --rows '1 block' --dry_run")
    assert (again.run, again.state) == (None, "to start")
    assert f"left out: {of_run} lacks files of its run (epoch 0 of 2)" in capsys.readouterr().err


def test_a_test_that_was_not_kept_is_made_where_the_run_still_is(workplace, calls):
    (job,) = run_experiments("depth --rows '1 block'")
    (of_run,) = Path("kept").iterdir()
    for folder in (job.run, of_run):
        (folder / "test_ranks_history_masked.npz").unlink()
    calls.clear()
    run_experiments("depth --rows '1 block'")
    assert [call[0] for call in calls] == ["eval.py"]
    (of_run / "test_ranks_history_masked.npz").unlink()
    shutil.rmtree("experiments")
    calls.clear()
    assert [job.state for job in run_experiments("depth --rows '1 block'")] == ["kept in part"]
    assert not calls


def test_results_that_cannot_be_written_are_named_before_anything_is_trained(workplace, calls):
    Path("kept").write_text("a file")
    with pytest.raises(InputError, match="cannot write kept"):
        run_experiments("depth")
    assert not calls


def test_results_of_one_run_that_cannot_be_kept_do_not_stop_the_rest(workplace, calls, monkeypatch, capsys):
    true, tried = run.keep, []

    def keep(of_run, results, tests):
        tried.append(of_run)
        if len(tried) == 1:
            raise InputError("cannot write kept")
        true(of_run, results, tests)

    monkeypatch.setattr(run, "keep", keep)
    with pytest.raises(SystemExit):
        run_experiments("depth")
    assert "failed: cannot write kept: tiny, seed 42: depth/1 block" in capsys.readouterr().err
    assert len(list(Path("kept").iterdir())) == 1


def test_what_another_runner_has_finished_meanwhile_is_not_run_again(workplace, calls):
    jobs = run.planned([(definitions()["depth"], list(definitions()["depth"].rows))], {"dataset_code": "tiny"}, [42])
    for job in jobs:
        job.config = dataclasses.replace(job.config, **resolve_flags())
        run.look_up(job, Path("kept"))
    assert {job.state for job in jobs} == {"to start"}
    run_experiments("depth")
    calls.clear()
    run.work(jobs, Path("kept"))
    assert not calls
    assert {job.state for job in jobs} == {"finished"}


def test_a_run_is_not_trained_by_two_at_once(workplace, calls):
    (job,) = run_experiments("depth --rows '1 block'")
    state = (job.run / "last.pt").read_bytes()
    (job.run / "last.pt").write_bytes(b"being written")
    with run_lock(job.run), pytest.raises(InputError, match="another process trains"):
        train.main(["--resume", str(job.run)])
    (job.run / "last.pt").write_bytes(state)
    train.main(["--resume", str(job.run)])


def test_the_scripts_are_called_as_a_user_would(workplace):
    """The one test whose runs are processes of their own."""
    (job,) = run_experiments("depth --rows '1 block'")
    assert job.state == "finished"
    assert kept.kept_runs(Path("kept"))[0].metrics(masked=True)


# ------------------------------------------------------------------------------------------------ chosen on validation


@pytest.fixture
def screening(monkeypatch):
    """An experiment of that name which leaves the test set unread, beside those that there are."""
    rows = (Row("off", {"whiten_features": False}), Row("on", {"whiten_features": True}))
    mine = Definition("screening", "S", "s", ("beauty",), rows, validation=True)
    monkeypatch.setattr(plan, "definitions", lambda: definitions() | {"screening": mine})
    return mine


def test_settings_are_chosen_without_a_look_at_the_test_set(workplace, calls, screening):
    jobs = run_experiments("screening")
    assert [call[0] for call in calls] == ["train.py"] * 2
    assert [job.state for job in jobs] == ["finished"] * 2
    assert not list(workplace.glob("**/test_*"))
    for job, of_run in zip(jobs, kept.kept_runs(Path("kept")), strict=True):
        best = json.loads((job.run / "log.jsonl").read_text().splitlines()[-1])
        assert not of_run.tested
        assert of_run.validation()[4] == best["val"]["4"] or best["best_epoch"] == 1
    calls.clear()
    assert [job.state for job in run_experiments("screening")] == ["finished"] * 2
    assert not calls


def test_a_run_that_was_not_tested_is_tested_once_a_test_is_asked_for(workplace, calls, screening):
    run_experiments("screening --rows off")
    calls.clear()
    (job,) = run_experiments("depth --rows '2 blocks'")  # the same training
    assert [[call[0], "--mask_history" in call] for call in calls] == [["eval.py", False], ["eval.py", True]]
    assert kept.kept_runs(Path("kept"))[0].tested
    for path in Path("kept").glob("*/test_*"):
        path.unlink()
    shutil.rmtree("experiments")
    (job,) = run_experiments("depth --rows '2 blocks' --dry_run")
    assert (job.run, job.state) == (None, "to start")
    (job,) = run_experiments("screening --rows off --dry_run")
    assert job.state == "finished"


def test_a_run_begun_with_a_test_in_mind_is_taken_without_it(workplace, calls, screening):
    (tested,) = run_experiments("depth --rows '2 blocks'")
    shutil.rmtree("kept")
    for path in tested.run.glob("test_*"):
        path.unlink()
    calls.clear()
    (job,) = run_experiments("screening --rows off")
    assert (job.run, job.state) == (tested.run, "finished")
    assert not calls
    assert not kept.kept_runs(Path("kept"))[0].tested


def test_what_both_kinds_of_experiment_ask_for_is_tested(workplace, calls, screening):
    jobs = run_experiments("screening,depth --rows 'off;on;2 blocks'")
    assert [(job.names, job.tests) for job in jobs] == [
        (["screening/off", "depth/2 blocks"], True),
        (["screening/on"], False),
    ]
    assert [call[0] for call in calls] == ["train.py", "eval.py", "train.py"]
