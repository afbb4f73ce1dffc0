"""Training by several processes that share every batch out: the same training as by one."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as eval_script
import train
from common import cli
from common.devices import cpu_name, resolve_device
from common.errors import InputError
from tests.cut_off import cut_off_after
from tests.prepared import write_prepared
from trainer.checkpoint import load_state
from trainer.runs import read_log

REPOSITORY = Path(__file__).parent.parent
TINY = (
    "--dataset_code tiny --language_encoder lexical --no-use_img_encoder --mrl_hidden_sizes 2,4,8 --num_epochs 2 "
    "--lr 0.01 --warmup_steps 1 --lru_num_blocks 1 --device cpu --train_batch_size 6"
)
BASELINE = "--dataset_code tiny --device cpu"
TRAINED = (
    f"{BASELINE} --mrl_hidden_sizes 8 --num_epochs 2 --lr 0.01 --warmup_steps 1 --lru_num_blocks 1 --train_batch_size 6"
)
BASELINES = {"sasrec": TRAINED, "lrurec": TRAINED, "itemknn": BASELINE}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
LONELY = "--train_batch_size 1 --num_epochs 1"  # a batch is one user, so one of two processes has none
# A LayerNorm of 2 dimensions has no gradient, and many draws of few items gradients that rounding decides.
PLUS = "--preset plus --dropout_from 4 --num_negatives 0 --mrl_hidden_sizes 4,12"
SAMPLED_PLUS = PLUS.replace("--num_negatives 0", "--num_negatives 5")
# Every case, one after another in the same two processes; what happened in each is left in rank0.json and rank1.json.
TWO = """
import contextlib, hashlib, io, json, shlex, sys
from pathlib import Path
import torch
import eval as eval_script
import train
from common.errors import InputError
from common import processes
from model.loss import LOSSES
from trainer import trainer as trainer_module
from trainer.runs import run_lock
from trainer.trainer import Trainer

tiny, lonely, plus, sampled_plus, baselines = sys.argv[1:]
seen, fit, keep = {}, Trainer.fit, Trainer._keep
true_loss, true_save = LOSSES["fast"], trainer_module.save_state

def watched(self):
    try:
        return fit(self)
    finally:
        state = self.state()
        weights = b"".join(t.numpy().tobytes() for t in state["model"].values())
        seen.update(
            weights=hashlib.sha256(weights).hexdigest(),
            random=hashlib.sha256(state["rng"].numpy().tobytes()).hexdigest(),
            progress=[self.progress.epoch, self.progress.step, self.progress.best, self.progress.best_epoch],
        )

def interrupted(self, *arguments):
    keep(self, *arguments)
    raise KeyboardInterrupt

def full(path, state):
    raise InputError(f"rank {processes.rank()}: no space")

def broken(*arguments, **how):
    calls.append(1)
    return true_loss(*arguments, **how) * (float("nan") if len(calls) == 3 and processes.rank() == 1 else 1)

def run(name, arguments, main=train.main):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            said = str(main(shlex.split(arguments)))
        except (InputError, KeyboardInterrupt) as error:
            said = f"{type(error).__name__} {error}"
    results[name] = {"said": said, "printed": printed.getvalue(), **seen}

results, calls = {}, []
Trainer.fit = watched
run("two", f"{tiny} --run_name two")
run("tested", "--run_name two", eval_script.main)
run("tested alone", "--run_name two --alone", eval_script.main)
run("sampled two", f"{tiny} --num_negatives 5 --run_name sampled-two")
run("plus two", f"{tiny} {plus} --run_name plus-two")
run("sampled plus two", f"{tiny} {sampled_plus} --run_name sampled-plus-two")
run("lonely two", f"{tiny} {lonely} --run_name lonely-two")
for model, flags in json.loads(baselines).items():
    run(f"{model} two", f"--model_code {model} {flags} --run_name {model}-two")
run("resumed by two", "--resume latest --run_name cut-by-one")
Trainer._keep = interrupted
run("cut by two", f"{tiny} --run_name cut-by-two")
Trainer._keep = keep
LOSSES["fast"] = broken
run("not finite", f"{tiny} --run_name not-finite")
LOSSES["fast"] = true_loss
trainer_module.save_state = full
run("full", f"{tiny} --run_name full")
(two,) = Path().glob("experiments/runs/tiny/*[0-9]-two")
with run_lock(two) if processes.rank() == 0 else contextlib.nullcontext():
    run("held", f"--resume {two}")
processes.end()
results["threads"] = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
Path(f"rank{processes.rank()}.json").write_text(json.dumps(results))
"""


def torchrun(script: Path, arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """Two processes on the CPU."""
    return subprocess.run(
        [sys.executable, *TORCHRUN, script, *shlex.split(arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where one process and two trained the same things, and one went on with what two began."""
    folder = tmp_path_factory.mktemp("processes")
    write_prepared(folder / "data", "tiny", users=20, items=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(shlex.split(f"{TINY} --run_name one"))
        train.main(shlex.split(f"{TINY} --num_negatives 5 --run_name sampled-one"))
        train.main(shlex.split(f"{TINY} {PLUS} --run_name plus-one"))
        train.main(shlex.split(f"{TINY} {SAMPLED_PLUS} --run_name sampled-plus-one"))
        train.main(shlex.split(f"{TINY} {LONELY} --run_name lonely-one"))
        for model, flags in BASELINES.items():
            train.main(shlex.split(f"--model_code {model} {flags} --run_name {model}-one"))
        with cut_off_after(1):
            train.main(shlex.split(f"{TINY} --run_name cut-by-one"))
        assert not torch.distributed.is_initialized()
        (folder / "two.py").write_text(TWO)
        done = torchrun(
            folder / "two.py", shlex.join([TINY, LONELY, PLUS, SAMPLED_PLUS, json.dumps(BASELINES)]), folder
        )
        assert done.returncode == 0, done.stderr[-5000:]
        train.main(["--resume", str(named("cut-by-two", folder))])
    return folder


def named(name: str, folder: Path) -> Path:
    """The run of this name; there is one."""
    (run,) = folder.glob(f"experiments/runs/tiny/*[0-9]-{name}")
    return run


def outcome(folder: Path, case: str) -> list[dict]:
    """What a case was on rank 0 and on rank 1."""
    return [json.loads((folder / f"rank{rank}.json").read_text())[case] for rank in (0, 1)]


def assert_same_training(run: Path, other: Path) -> None:
    """The same weights, optimizer, random state, log and test metrics, to rounding."""
    states = [load_state(path / "last.pt") for path in (run, other)]
    for part in ("model", "optimizer", "rng"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=1e-5, atol=1e-5)
    logs = [[{k: v for k, v in line.items() if "seconds" not in k} for line in read_log(path)] for path in (run, other)]
    torch.testing.assert_close(logs[0], logs[1], rtol=1e-5, atol=1e-5)
    tests = [json.loads((path / "test_mrl_metrics.json").read_text()) for path in (run, other)]
    torch.testing.assert_close(tests[0], tests[1], rtol=1e-5, atol=1e-5)
    assert {p.name for p in run.iterdir()} == {p.name for p in other.iterdir()}


def test_two_processes_train_as_one_does(folder):
    assert_same_training(named("two", folder), named("one", folder))


def test_two_processes_draw_the_same_items(folder):
    assert_same_training(named("sampled-two", folder), named("sampled-one", folder))


def test_two_processes_train_with_all_options_as_one_does(folder):
    for name in ("plus", "sampled-plus"):
        assert_same_training(named(f"{name}-two", folder), named(f"{name}-one", folder))


def test_a_batch_of_one_user_trains_as_in_one_process(folder):
    assert_same_training(named("lonely-two", folder), named("lonely-one", folder))


@pytest.mark.parametrize("model", ["sasrec", "lrurec"])
def test_two_processes_train_a_baseline_as_one_does(folder, model):
    assert_same_training(named(f"{model}-two", folder), named(f"{model}-one", folder))


def test_two_processes_count_and_share_the_ranking_out(folder):
    one, two = named("itemknn-one", folder), named("itemknn-two", folder)
    for name in ("best.safetensors", "test_mrl_metrics.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    first, second = outcome(folder, "itemknn two")
    assert first["printed"].count("counted in") == 1 and second["printed"] == ""


def test_two_go_on_with_what_one_began(folder):
    assert_same_training(named("cut-by-one", folder), named("one", folder))


def test_one_goes_on_with_what_two_began(folder):
    assert_same_training(named("cut-by-two", folder), named("one", folder))


@pytest.mark.parametrize("case", ["tested", "tested alone"])
def test_two_processes_test_a_run_as_one_does(folder, monkeypatch, case):
    monkeypatch.chdir(folder)
    first, second = outcome(folder, case)
    assert first["said"] == second["said"] == str(eval_script.main(["--run_name", "two"]))
    assert first["printed"].count("written:") == 1 and second["printed"] == ""


@pytest.mark.parametrize(
    "case", ["two", "sampled two", "plus two", "lonely two", "resumed by two", "cut by two", "not finite", "full"]
)
def test_both_have_the_same_weights_random_state_and_ending_and_the_first_alone_prints(folder, case):
    first, second = outcome(folder, case)
    assert first.pop("printed").count("trainable parameters") == 1
    assert second.pop("printed") == ""
    assert first == second


def test_what_is_printed_is_what_one_process_prints(folder):
    first, _ = outcome(folder, "two")
    for text in (
        "mrl_hidden_sizes         2,4,8   (flag)",
        f"2 processes, each on {cpu_name()}, ",
        "epoch   2/2",
        "written:",
    ):
        assert first["printed"].count(text) == 1
    assert "continuing after epoch 1" in outcome(folder, "resumed by two")[0]["printed"]


def test_a_loss_that_is_not_finite_on_one_ends_both_alike(folder):
    for rank in outcome(folder, "not finite"):
        assert rank["said"].startswith("InputError the loss is nan at step 3 (epoch 1); no epoch was finished")


def test_no_thread_of_the_group_outlives_it(folder):
    """One that still dropped a tensor as the interpreter ends would abort the process."""
    for threads in outcome(folder, "threads"):
        assert "python" in threads and not [name for name in threads if "gloo" in name]


def test_what_the_first_cannot_write_ends_both_alike(folder):
    assert [rank["said"] for rank in outcome(folder, "full")] == ["InputError rank 0: no space"] * 2


def test_a_run_that_another_process_trains_is_refused_on_both(folder):
    for rank in outcome(folder, "held"):
        assert re.match(r"InputError another process is training \S+-two; wait for it, or stop it", rank["said"])


def test_what_is_wrong_is_said_once_and_ends_all(folder):
    (folder / "file").touch()
    done = torchrun(REPOSITORY / "train.py", f"{TINY} --runs_root file", folder)
    assert done.returncode != 0
    assert done.stderr.count("error: cannot create the run folder file/tiny") == 1
    assert "(exitcode: 2) local_rank: 0" in done.stderr and "rank1" not in done.stderr


@pytest.mark.parametrize(
    ("error", "waited", "said"), [(InputError("bad"), [10], "error: bad\n"), (KeyboardInterrupt, [], "")]
)
def test_one_that_is_not_the_first_lets_the_first_speak(monkeypatch, capsys, error, waited, said):
    def main():
        raise error

    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    sleeps = []
    monkeypatch.setattr(cli.time, "sleep", sleeps.append)
    with pytest.raises(SystemExit):
        cli.run_cli(main)
    assert sleeps == waited
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("gpus", "expected"), [(2, "cuda:1"), (1, "give it --nproc_per_node=1, or --device cpu")])
def test_every_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch, gpus, expected):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    assert resolve_device("cpu") == torch.device("cpu")
    if gpus == 2:
        assert str(resolve_device("auto")) == expected == current[0]
    else:
        with pytest.raises(InputError, match=expected):
            resolve_device("auto")
