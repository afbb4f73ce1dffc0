"""Train on two machines, which are network namespaces with addresses and folders of their own."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tests.prepared import contents, cut_off_after, write_prepared
from tests.test_several_processes import REPOSITORY, assert_same_training

FLAGS = "--language_encoder lexical --img_encoder pixel --device cpu"
DEMO = f"{FLAGS} --num_epochs 2 --mrl_hidden_sizes 8,16 --lru_num_blocks 1 --train_batch_size 500"
TINY = f"{FLAGS} --dataset_code tiny --num_epochs 1 --mrl_hidden_sizes 8"
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
run("flags", f"{TINY} --lr {{2e-3 if second else 1e-3}}")
if second:
    [texts] = Path("data/features/tiny").glob("language-*.npy")
    np.save(texts, np.load(texts)[::-1])
    header = json.loads(texts.with_suffix(".json").read_text())
    texts.with_suffix(".json").write_text(json.dumps(header | {{"sha256": sha256(texts)}}))
run("other features", "{TINY}")
if second:
    write_prepared(Path("data"), seed=1)
run("other data", "{TINY}")
if second:
    shutil.rmtree("data/tiny")
run("no data", "{TINY}")
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


CASES = {"flags": "settings", "other features": "feature file language-", "other data": "dataset", "no data": "dataset"}


@pytest.mark.parametrize("case", CASES)
def test_a_machine_that_differs_is_named_on_both(machines, case):
    first, second = (outcomes[case]["said"] for outcomes in machines[1])
    assert first == second and CASES[case] in first and f"machine 1 ({socket.gethostname()})" in first


def test_a_process_that_fails_alone_ends_all_without_tracebacks_of_the_others(machines):
    first, second = machines[2]
    assert first.count("error: a process of this training ended early") == 1 and "RuntimeError" not in first
    assert second.count("error: only here") == 1
