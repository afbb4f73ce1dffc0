"""The runner of experiments: it does what is missing."""

import os
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

import eval as evaluate
import train
from common.errors import InputError
from experiments import plan, run
from experiments.definition import Definition, Row, definitions, identity
from experiments.store import keep, kept_runs
from tests.prepared import write_prepared

FLAGS = (
    "--dataset_code tiny --no-use_img_encoder --language_encoder lexical --mrl_hidden_sizes 2,4 --num_epochs 2 "
    "--device cpu --results kept"
)


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
    return plan.planned([(found[name], list(found[name].rows)) for name in experiments], {}, list(seeds), datasets)


def names(folder):
    """Return the names of the kept runs."""
    return [run.name for run in kept_runs(folder)]


def test_there_is_a_job_for_every_seed_dataset_and_row():
    jobs = planned(["table3"], seeds=[1, 2])
    assert len({str(identity(job.config)) for job in jobs}) == len(jobs) == 2 * 4 * 4


def test_rows_that_ask_for_the_same_training_share_a_job():
    jobs = planned(["depth", "loss", "table2"], ["beauty"])
    assert [job.names for job in jobs] == [
        ["depth/1 block"],
        ["depth/2 blocks", "loss/mean", "table2/fMRLRec"],
        ["loss/sum"],
    ]


def test_nested_sizes_are_one_training_and_those_alone_one_each():
    jobs = planned(["independent"], ["beauty"])
    assert [len(job.names) for job in jobs] == [8, *[1] * 8]


def test_datasets_can_be_given_that_the_definition_does_not_name():
    jobs = planned(["table2"], ["sports", "mine"])
    assert [job.config.dataset_code for job in jobs] == ["sports", "mine"]
    assert jobs[0].config.lru_r_max == 0.2  # the preset of sports


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("depht", "unknown experiment 'depht'; known are .*depth.*, and all"),
        ("depth --rows=3", "unknown row '3' of depth; known are 1 block; 2 blocks"),
        ("depth --seeds 4,x", "--seeds '4,x' must be integers"),
        ("depth --lru_num_blocks 4", "--lru_num_blocks 4 contradicts depth, whose row '1 block' has 1"),
        ("depth --distill .9", "--distill 0.9 contradicts depth, whose row '1 block' has no other extensions"),
        ("depth --preset plus", "--preset plus contradicts depth"),
    ],
)
def test_what_cannot_be_run_is_named(workplace, arguments, problem):
    with pytest.raises(InputError, match=problem):
        run_experiments(arguments)


def test_seed_is_not_a_flag_but_seeds_is(workplace, capsys):
    with pytest.raises(SystemExit):
        run_experiments("depth --seed 3")
    assert "did you mean --seeds?" in capsys.readouterr().err


def test_a_dry_run_lists_the_runs_and_does_nothing(workplace, calls, capsys):
    jobs = run_experiments("depth --seeds 1,2,1 --dry_run")
    assert [job.state for job in jobs] == ["to start"] * 4
    listed = capsys.readouterr().out
    assert "to start     tiny, seed 2: depth/1 block\n" in listed and listed.endswith("4 runs: 4 to start\n")
    assert not calls and not Path("experiments").exists() and not Path("kept").exists()


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--data_root elsewhere", "dataset 'tiny' is not at elsewhere/tiny (nothing is prepared there)"),
        ("", "data/tiny/sequential_data.txt:1: '1 2 abc 3' is not 'user item item"),
    ],
)
def test_a_dry_run_says_what_is_wrong_with_the_data(workplace, calls, capsys, flags, problem):
    (workplace / "data/tiny/sequential_data.txt").write_text("1 2 abc 3\n")
    run_experiments(f"depth --dry_run {flags}")
    assert f"2 runs: 2 to start\n{problem}" in capsys.readouterr().out


def test_missing_runs_are_trained_tested_twice_and_kept_and_others_skipped(workplace, calls, capsys):
    jobs = run_experiments("depth")
    assert [call[0] for call in calls] == ["train.py", "eval.py"] * 2
    assert all("--mask_history" in call for call in calls[1::2])
    found = kept_runs(Path("kept"))
    assert [run.config.lru_num_blocks for run in found] == [job.config.lru_num_blocks for job in jobs] == [1, 2]
    assert all(run.complete() and run.ranks(masked=True) for run in found)
    calls.clear()
    capsys.readouterr()
    again = run_experiments("depth,loss --rows '1 block; mean'")
    assert not calls
    assert [job.state for job in again] == ["finished"] * 2
    assert "2 runs: 2 finished\n" in capsys.readouterr().out


def test_kept_results_alone_make_a_run_finished(workplace, calls):
    run_experiments("depth")
    (workplace / "experiments").rename(workplace / "elsewhere")
    calls.clear()
    assert [job.state for job in run_experiments("depth")] == ["finished"] * 2
    assert not calls


def test_an_interrupted_run_is_continued(workplace, calls, monkeypatch):
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


def test_a_failed_run_is_named_and_the_others_go_on(workplace, calls, monkeypatch, capsys):
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
    assert len(names(Path("kept"))) == 1


def test_a_run_without_user_ranks_is_tested_again(workplace, calls):
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


def test_a_run_on_other_data_does_not_count(workplace, calls):
    (job,) = run_experiments("depth --rows '1 block'")
    write_prepared(workplace / "data", "tiny", users=20, items=12, pictures=True, seed=1)
    (again,) = run_experiments("depth --rows '1 block' --dry_run")
    assert again.state == "to start"
    (again,) = run_experiments("depth --rows '1 block'")
    assert again.state == "finished" and again.run != job.run
    assert len(names(Path("kept"))) == 2


def test_sigterm_ends_the_running_script_and_starts_no_other(workplace, monkeypatch, capsys):
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
def test_only_visible_gpus_are_used(monkeypatch, visible, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices = run.free_devices([])
    assert [devices.get() for _ in expected] == expected
    assert devices.empty()


def test_a_run_folder_of_another_version_is_ignored_and_named(workplace, calls, capsys):
    (job,) = run_experiments("depth --rows '1 block'")
    path = Path("experiments/runs").glob("*/*/config.json").__next__()
    path.write_text(path.read_text().replace('"lr"', '"learning_rate"'))
    shutil.rmtree("kept")
    (again,) = run_experiments("depth --rows '1 block' --dry_run")
    assert (job.state, again.state) == ("finished", "to start")
    assert "unknown settings ['learning_rate']" in capsys.readouterr().err


def test_a_missing_test_is_made_only_while_the_run_folder_exists(workplace, calls):
    (job,) = run_experiments("depth --rows '1 block'")
    shutil.rmtree("kept")
    for path in job.run.glob("test_*_history_masked.*"):
        path.unlink()
    keep(job.run, Path("kept"))
    calls.clear()
    assert [job.state for job in run_experiments("depth --rows '1 block'")] == ["finished"]
    assert [call[0] for call in calls] == ["eval.py"]
    shutil.rmtree("kept")
    for path in job.run.glob("test_*_history_masked.*"):
        path.unlink()
    keep(job.run, Path("kept"))
    shutil.rmtree("experiments")
    calls.clear()
    assert [job.state for job in run_experiments("depth --rows '1 block'")] == ["kept in part"]
    assert not calls


def test_a_results_folder_that_cannot_be_written_is_named_before_training(workplace, calls):
    Path("kept").write_text("a file")
    with pytest.raises(InputError, match="cannot write kept"):
        run_experiments("depth")
    assert not calls


def test_a_run_that_cannot_be_kept_does_not_stop_the_others(workplace, calls, monkeypatch, capsys):
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
    assert len(names(Path("kept"))) == 1


def test_a_run_that_another_runner_has_finished_meanwhile_is_skipped(workplace, calls):
    jobs = run_experiments("depth --dry_run")
    run_experiments("depth")
    calls.clear()
    run.work(jobs, Path("kept"))
    assert not calls
    assert {job.state for job in jobs} == {"finished"}


def test_the_scripts_run_as_processes(workplace):
    (job,) = run_experiments("depth --rows '1 block'")
    assert job.state == "finished"
    assert "NDCG@10 masked" in kept_runs(Path("kept"))[0].test


# ------------------------------------------------------------------------------------------------ chosen on validation


@pytest.fixture
def screening(monkeypatch):
    """Add an experiment named screening that uses validation only."""
    rows = (Row("off", {"whiten_features": False}), Row("on", {"whiten_features": True}))
    mine = Definition("screening", "S", "s", ("beauty",), rows, validation=True)
    monkeypatch.setattr(plan, "definitions", lambda: definitions() | {"screening": mine})
    return mine


def test_an_experiment_on_validation_never_tests(workplace, calls, screening):
    jobs = run_experiments("screening")
    assert [call[0] for call in calls] == ["train.py"] * 2
    assert [job.state for job in jobs] == ["finished"] * 2
    assert not list(workplace.glob("**/test_*"))
    for run_ in kept_runs(Path("kept")):
        assert not run_.tested and (run_.validation["NDCG@10"] >= 0).all()
    calls.clear()
    assert [job.state for job in run_experiments("screening")] == ["finished"] * 2
    assert not calls


def test_an_untested_run_is_tested_once_an_experiment_asks_for_it(workplace, calls, screening):
    run_experiments("screening --rows off")
    calls.clear()
    run_experiments("depth --rows '2 blocks'")  # the same training
    assert [[call[0], "--mask_history" in call] for call in calls] == [["eval.py", False], ["eval.py", True]]
    (kept,) = kept_runs(Path("kept"))
    assert kept.complete()


def test_an_untested_kept_run_without_its_folder_is_trained_again_for_a_test(workplace, calls, screening):
    run_experiments("screening --rows off")
    shutil.rmtree("experiments")
    (job,) = run_experiments("depth --rows '2 blocks' --dry_run")
    assert (job.run, job.state) == (None, "to start")
    (job,) = run_experiments("screening --rows off --dry_run")
    assert job.state == "finished"


def test_a_run_that_any_experiment_wants_tested_is_tested(workplace, calls, screening):
    jobs = run_experiments("screening,depth --rows 'off;on;2 blocks'")
    assert [(job.names, job.tests) for job in jobs] == [
        (["screening/off", "depth/2 blocks"], True),
        (["screening/on"], False),
    ]
    assert [call[0] for call in calls] == ["train.py", "eval.py", "train.py"]
