"""Train by several processes and on several machines: the same training as by one process."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as eval_script
import train
from common import cli, processes
from common.devices import cpu_name, resolve_device
from common.errors import InputError
from tests.prepared import contents, cut_off_after, write_prepared
from trainer.checkpoint import load_state
from trainer.runs import read_log

REPOSITORY = Path(__file__).parent.parent
TINY = (
    "--dataset_code tiny --language_encoder lexical --no-use_img_encoder --mrl_hidden_sizes 2,4,8 --num_epochs 2 "
    "--lr 0.01 --warmup_steps 1 --lru_num_blocks 1 --device cpu --train_batch_size 6"
)
EVERYWHERE = InputError("on every rank")
EVERYWHERE.on_every_rank = True
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# A LayerNorm of 2 dimensions has no gradient, and many draws of few items gradients that rounding decides.
PLUS = f"{TINY} --preset plus --dropout_from 4 --mrl_hidden_sizes 4,12"
CASES = {
    "faithful": TINY,
    "plus": f"{PLUS} --num_negatives 0",
    "sampled": f"{PLUS} --num_negatives 5 --item_embedding_updates rows --save_every_minutes 1e-9",
    "lonely": f"{TINY} --train_batch_size 1 --num_epochs 1",  # a batch is one user, so one of two processes has none
    "sasrec": "--model_code sasrec --dataset_code tiny --device cpu --mrl_hidden_sizes 8 --num_epochs 2 --lr 0.01 "
    "--warmup_steps 1 --lru_num_blocks 1 --train_batch_size 6",
    "itemknn": "--model_code itemknn --dataset_code tiny --device cpu",
}
# Run every case in the same two processes, and write the outcome of each to rank0.json and rank1.json.
TWO = """
import contextlib, hashlib, io, json, shlex, sys
from pathlib import Path
import torch
import eval as eval_script
import train
from common import cli
from common.errors import InputError
from common import processes
from model.loss import LOSSES
from trainer import testing, trainer as trainer_module
from trainer.step import GraphedStep
from trainer.runs import run_lock
from trainer.trainer import Trainer

cases = json.loads(sys.argv[1])
tiny = cases["faithful"]
testing.plot_metric_by_size = lambda *given: given[3].touch()  # a curve takes longer than the training
seen, fit, keep = {}, Trainer.fit, Trainer._keep
true_loss, true_save = LOSSES["fast"], trainer_module.save_state

def watched(self):
    try:
        return fit(self)
    finally:
        tensors = [*self.model.state_dict().values(), torch.get_rng_state()]
        seen["state"] = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
        seen["progress"] = [self.progress.step, self.progress.best, self.progress.best_epoch]

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

results, calls, recorded = {}, [], []
trainer_module.CHECK_EVERY = 1
Trainer.fit = watched
for name, flags in cases.items():
    run(f"{name} two", f"{flags} --run_name {name}-two")
run("tested", "--run_name faithful-two", eval_script.main)
run("tested alone", "--run_name faithful-two --alone", eval_script.main)
run("resumed by two", "--resume latest --run_name cut-by-one")
Trainer._keep = interrupted
run("cut by two", f"{cases['sampled']} --run_name cut-by-two")
Trainer._keep = keep
plain = trainer_module.build_step
trainer_module.build_step = lambda *given: GraphedStep(plain(*given), lambda work: recorded.append(work) or work)
run("recorded", f"{cases['faithful']} --run_name recorded")
assert 0 < len(recorded) < 6  # of 8 steps
trainer_module.build_step = plain
LOSSES["fast"] = broken
run("not finite", f"{tiny} --run_name not-finite")
LOSSES["fast"] = true_loss
trainer_module.save_state = full
run("full", f"{tiny} --run_name full")
(two,) = Path().glob("experiments/runs/tiny/*-faithful-two")
with run_lock(two) if processes.rank() == 0 else contextlib.nullcontext():
    run("held", f"--resume {two}")
processes.end()
results["threads"] = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
Path(f"rank{processes.rank()}.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder in which one process and two trained the same cases, and either resumed a run of the other."""
    folder = tmp_path_factory.mktemp("processes")
    write_prepared(folder / "data", "tiny", users=20, items=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, flags in CASES.items():
            train.main(shlex.split(f"{flags} --run_name {name}-one"))
        with cut_off_after(1):
            train.main(shlex.split(f"{CASES['sampled']} --run_name cut-by-one"))
        assert not torch.distributed.is_initialized()
        (folder / "two.py").write_text(TWO)
        done = subprocess.run(
            [sys.executable, *TORCHRUN, folder / "two.py", json.dumps(CASES)],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        train.main(["--resume", str(named("cut-by-two", folder))])
    return folder


def named(name: str, folder: Path) -> Path:
    """Return the one run of this name."""
    (run,) = folder.glob(f"experiments/runs/tiny/*-{name}")
    return run


def outcome(folder: Path, case: str) -> list[dict]:
    """Return the outcome of a case on rank 0 and on rank 1."""
    return [json.loads((folder / f"rank{rank}.json").read_text())[case] for rank in (0, 1)]


def assert_same_training(run: Path, other: Path) -> None:
    """Compare weights, optimizer, random state, log and test metrics, to rounding."""
    states = [load_state(path / "last.pt") for path in (run, other)]
    for part in ("model", "average", "rows", "optimizer", "rng"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=1e-5, atol=1e-5)
    logs = [[{k: v for k, v in line.items() if "seconds" not in k} for line in read_log(path)] for path in (run, other)]
    torch.testing.assert_close(logs[0], logs[1], rtol=1e-5, atol=1e-5)
    tests = [json.loads((path / "test_mrl_metrics.json").read_text()) for path in (run, other)]
    torch.testing.assert_close(tests[0], tests[1], rtol=1e-5, atol=1e-5)
    assert {p.name for p in run.iterdir()} == {p.name for p in other.iterdir()}


@pytest.mark.parametrize("name", [name for name in CASES if name != "itemknn"])
def test_two_processes_train_as_one_does(folder, name):
    assert_same_training(named(f"{name}-two", folder), named(f"{name}-one", folder))


@pytest.mark.parametrize(
    ("began", "case"), [("cut-by-one", "sampled"), ("cut-by-two", "sampled"), ("recorded", "faithful")]
)
def test_runs_resumed_by_other_processes_or_of_recorded_steps_are_the_same(folder, began, case):
    assert_same_training(named(began, folder), named(f"{case}-one", folder))


def test_two_processes_count_and_share_the_ranking(folder):
    one, two = named("itemknn-one", folder), named("itemknn-two", folder)
    for name in ("best.safetensors", "test_mrl_metrics.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    first, second = outcome(folder, "itemknn two")
    assert first["printed"].count("counted in") == 1 and second["printed"] == ""


@pytest.mark.parametrize("case", ["tested", "tested alone"])
def test_two_processes_test_a_run_as_one_does(folder, monkeypatch, case):
    monkeypatch.chdir(folder)
    first, second = outcome(folder, case)
    assert first["said"] == second["said"] == str(eval_script.main(["--run_name", "faithful-two"]))
    assert first["printed"].count("written:") == 1 and second["printed"] == ""


@pytest.mark.parametrize(
    ("case", "printed", "said"),
    [
        ("faithful two", f"2 processes, each on {cpu_name()}, ", "experiments/runs/tiny/"),
        ("lonely two", "written:", "experiments/runs/tiny/"),
        ("resumed by two", "continuing after epoch 1", "experiments/runs/tiny/"),
        ("cut by two", "mrl_hidden_sizes         4,12   (flag)", "KeyboardInterrupt"),
        ("not finite", "", "InputError the loss is nan at step 3 (epoch 1); no epoch was finished"),
        ("full", "", "InputError rank 0: no space"),
    ],
)
def test_both_ranks_end_alike_and_the_first_alone_prints(folder, case, printed, said):
    first, second = outcome(folder, case)
    assert printed in first["printed"] and first["said"].startswith(said)
    assert first.pop("printed").count("trainable parameters") == 1
    assert second.pop("printed") == ""
    assert first == second


def test_a_run_that_another_process_trains_is_refused_on_both_and_no_thread_outlives_the_process_group(folder):
    """A thread that drops a tensor as the interpreter ends would abort the process."""
    for rank in outcome(folder, "held"):
        assert re.match(r"InputError another process is training \S+-faithful-two; wait for it", rank["said"])
    for threads in outcome(folder, "threads"):
        assert threads and not [name for name in threads if "gloo" in name]


@pytest.mark.parametrize(
    ("error", "waited", "said"),
    [(InputError("bad"), [10], "error: bad\n"), (EVERYWHERE, [3], ""), (KeyboardInterrupt, [], "")],
)
def test_other_ranks_leave_the_message_to_the_first(monkeypatch, capsys, error, waited, said):
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


def test_every_process_of_a_machine_has_its_own_gpu(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    current, bound = [], []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **given: bound.append(given.get("device_id")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    processes.start()
    assert bound == [torch.device("cuda:1")]
    assert resolve_device("cpu") == torch.device("cpu")
    assert str(resolve_device("auto")) == "cuda:1" == current[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="give it --nproc_per_node=1, or --device cpu"):
        resolve_device("auto")


# ----------------------------------------------------------------------------------------------------- several machines
# Train on two machines, which are network namespaces with addresses and folders of their own.

FLAGS = "--language_encoder lexical --img_encoder pixel --device cpu"
DEMO = f"{FLAGS} --num_epochs 2 --mrl_hidden_sizes 8,16 --lru_num_blocks 1 --train_batch_size 500"
ONE_SIZE = f"{FLAGS} --dataset_code tiny --num_epochs 1 --mrl_hidden_sizes 8"
# Both machines run every case and write the outcomes to their own folders; then the second one fails alone.
BOTH = f"""
import contextlib, io, json, shlex, shutil, time
from pathlib import Path
import numpy as np
import eval as eval_script
import train
from common import processes
from common.cli import run_cli
from common.errors import InputError
from common.files import sha256
from datasets.prepare.__main__ import main as prepare
from tests.prepared import cut_off_after, write_prepared

second, outcomes = processes.machine() == 1, {{}}

def run(name, arguments, main=train.main):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            said = str(main(shlex.split(arguments)))
        except InputError as error:
            said = str(error)
    outcomes[name] = {{"said": said, "printed": printed.getvalue()}}

def fail():
    if second:
        raise InputError("only here")
    processes.on_main_process(int)  # waits for the other rank

run("train", "{DEMO} --run_name two")
run("eval", "--run_name two", eval_script.main)
with cut_off_after(1):
    run("cut", "{DEMO} --run_name begun-by-2")
run("resume", "--resume latest --run_name begun-by-1")
run("prepare", "{FLAGS} --dataset_code tiny --only features", prepare)
run("flags", f"{ONE_SIZE} --lr {{2e-3 if second else 1e-3}}")
if second:
    [texts] = Path("data/features/tiny").glob("language-*.npy")
    np.save(texts, np.load(texts)[::-1])
    header = json.loads(texts.with_suffix(".json").read_text())
    texts.with_suffix(".json").write_text(json.dumps(header | {{"sha256": sha256(texts)}}))
run("other features", "{ONE_SIZE}")
if second:
    write_prepared(Path("data"), seed=1)
run("other data", "{ONE_SIZE}")
if second:
    shutil.rmtree("data/tiny")
run("no data", "{ONE_SIZE}")
Path("outcomes.json").write_text(json.dumps(outcomes))
time.sleep = lambda seconds: None  # before printing an error that rank 0 may print too
run_cli(fail)
"""


@pytest.fixture(scope="module")
def namespaces():
    """Return a command prefix and the network interface of each machine."""
    names, links = ([f"{word}{os.getpid()}.{n}" for n in (0, 1)] for word in ("machine", "veth"))
    inside = [["ip", "netns", "exec", name] for name in names]
    pair = ["ip", "link", "add", links[0], "netns", names[0], "type", "veth", "peer", links[1], "netns", names[1]]
    commands = [*(["ip", "netns", "add", name] for name in names), pair]
    for n, link in enumerate(links):
        commands += [[*inside[n], "ip", "address", "add", f"10.213.7.{n + 1}/24", "dev", link]]
        commands += [[*inside[n], "ip", "link", "set", name, "up"] for name in (link, "lo")]
    try:
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
        yield list(zip(inside, links, strict=True))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this test makes network namespaces, which needs root and iproute2: {error}")
    finally:
        for name in names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def machines(namespaces, tmp_path_factory):
    """Return both machines' folders, outcomes and standard errors. The first machine alone trained the run `one`."""
    folders, started = [tmp_path_factory.mktemp(f"machine{n}") for n in (0, 1)], []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folders[0])
        train.main(shlex.split(f"{DEMO} --run_name one"))
        with cut_off_after(1):
            train.main(shlex.split(f"{DEMO} --run_name begun-by-1"))
        for n, (folder, (inside, link)) in enumerate(zip(folders, namespaces, strict=True)):
            write_prepared(folder / "data", pictures=n == 0)
            (folder / "both.py").write_text(BOTH)
            command = f"timeout 300 {sys.executable} -m torch.distributed.run --nnodes=2 --node_rank={n} "
            command += "--nproc_per_node=1 --master_addr=10.213.7.1 --master_port=29513 both.py"
            env = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": link}
            stderr = (folder / "stderr").open("w")
            started.append(subprocess.Popen([*inside, *command.split()], cwd=folder, env=env, stderr=stderr))
        assert all(process.wait() for process in started)  # as the second machine failed at last
        errors = [(folder / "stderr").read_text() for folder in folders]
        assert (folders[0] / "outcomes.json").exists(), errors
        train.main(["--resume", str(next(Path("experiments/runs/demo").glob("*-begun-by-2")))])
    return folders, [json.loads((folder / "outcomes.json").read_text()) for folder in folders], errors


@pytest.mark.parametrize("name", ["two", "begun-by-1", "begun-by-2"])
def test_two_machines_train_as_one_does_and_resume_runs_of_each_other(machines, name):
    (first, second), outcomes, _ = machines
    [run], [one] = (list(first.glob(f"experiments/runs/demo/*-{n}")) for n in (name, "one"))
    assert_same_training(run, one)  # and the same test, which eval.py wrote for `two`
    assert not (second / "experiments").exists() and {case["printed"] for case in outcomes[1].values()} == {""}
    assert "2 processes on 2 machines" in outcomes[0]["train"]["printed"]
    assert outcomes[0]["eval"]["said"] == outcomes[1]["eval"]["said"] and "written:" in outcomes[0]["eval"]["printed"]


def test_the_second_machine_gets_the_features_of_the_first(machines):
    folders, outcomes, _ = machines
    assert "sending data/features/tiny/image-" in outcomes[0]["prepare"]["printed"]
    own, sent = (contents(folder / "data/features/demo") for folder in folders)
    assert len(sent) == 4 and all(own[name] == content for name, content in sent.items())


DIFFERENCES = {
    "flags": "settings",
    "other features": "feature file language-",
    "other data": "dataset",
    "no data": "dataset",
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_a_machine_that_differs_is_named_on_both(machines, case):
    first, second = (outcomes[case]["said"] for outcomes in machines[1])
    assert first == second and DIFFERENCES[case] in first and f"machine 1 ({socket.gethostname()})" in first


def test_a_process_that_fails_alone_ends_all_without_tracebacks_of_the_others(machines):
    first, second = machines[2]
    assert first.count("error: a process of this training ended early") == 1 and "RuntimeError" not in first
    assert second.count("error: only here") == 1
