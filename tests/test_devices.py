"""Train by several processes, on several machines and on a GPU: the same training as by one process on the CPU."""

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
from common import processes
from common.devices import cpu_name, resolve_device
from common.errors import InputError
from config import ModelSettings, TrainingSettings
from dataloader import eval_rows
from datasets.catalog import load_catalog
from datasets.features import cache
from model import FMRLRec
from model.extensions.objective import Objective
from model.extensions.sampled_loss import NegativeSampler, Sample, sampled_matryoshka_cross_entropy
from model.loss import Factors, matryoshka_cross_entropy
from tests.made_up import as_sequences, contents, cut_off_after, feature_parts, write_prepared
from trainer.checkpoint import load_state
from trainer.evaluation import evaluate, set_new_item_scale
from trainer.runs import REPOSITORY, read_log
from trainer.sparse_rows import sparse_rows

TINY = (
    "--dataset_code tiny --language_encoder lexical --no-use_img_encoder --mrl_hidden_sizes 2,4,8 --num_epochs 2 "
    "--seed 1 --lr 0.01 --warmup_steps 1 --lru_num_blocks 1 --device cpu --train_batch_size 6"
)
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
# A LayerNorm of 2 dimensions has no gradient, and many draws of few items gradients that rounding decides.
PLUS = f"{TINY} --preset plus --dropout_from 4 --mrl_hidden_sizes 4,12"
CASES = {
    "faithful": TINY,
    "plus": f"{PLUS} --num_negatives 0",
    "sampled": f"{PLUS} --num_negatives 5 --item_embedding_updates rows --save_every_minutes 1e-9",
    "graphed": f"{PLUS} --num_negatives 5 --item_embedding_updates all",  # on a GPU
    "lonely": f"{TINY} --train_batch_size 1 --num_epochs 1",  # a batch is one user, so one of two processes has none
    "sasrec": f"{TINY} --model_code sasrec --mrl_hidden_sizes 8".replace("--language_encoder lexical", ""),
    "itemknn": "--model_code itemknn --dataset_code tiny --device cpu",
}
BATCHES, BEGUN = 12, 4  # batches of texts and pictures, and those that one process made before two went on
# Run every case in the same two processes, and write the outcome of each to rank0.json and rank1.json.
TWO = """
import contextlib, hashlib, io, json, shlex, sys
from pathlib import Path
import torch
import eval as eval_script
import train
from common import processes
from common.errors import InputError
from datasets.features import cache
from model.loss import LOSSES
from tests.test_devices import make_features, validate_spread_embedding
from trainer import evaluation, testing, trainer as trainer_module
from trainer.step import GraphedStep
from trainer.runs import run_lock
from trainer.trainer import Trainer

cases = json.loads(sys.argv[1])
tiny = cases["faithful"]
testing.plot_metric_by_size = lambda *given: given[3].touch()  # a curve takes longer than the training
seen, fit, keep = {}, Trainer.fit, Trainer._keep
true_loss = LOSSES["fast"]

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
evaluation.GROUP = 4
written, write = [], cache.Writer.write
cache.Writer.write = lambda *given: written.append(1) or write(*given)
make_features("begun")
results["written"] = len(written)
run("no file", f"{tiny} --features absent=absent.npy")
Trainer.fit = watched
for name, flags in cases.items():
    run(f"{name} two", f"{flags} --run_name {name}-two")
run("tested", "--run_name faithful-two", eval_script.main)
run("tested alone", "--run_name faithful-two --alone", eval_script.main)
run("counts tested", "--run_name itemknn-two", eval_script.main)
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
save, trainer_module.save_state = trainer_module.save_state, full
run("full", f"{tiny} --run_name full")
trainer_module.save_state = save
(two,) = Path().glob("experiments/runs/tiny/*-faithful-two")
with run_lock(two) if processes.rank() == 0 else contextlib.nullcontext():
    run("held", f"--resume {two}")
results["spread"] = validate_spread_embedding()
processes.end()
results["threads"] = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
Path(f"rank{processes.rank()}.json").write_text(json.dumps(results))
"""


def make_features(root):
    feature_parts(load_catalog("data", "tiny"), language="lexical", image="pixel", batch_size=2, cache_root=Path(root))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder in which one process and two trained the same cases, and either resumed a run of the other."""
    folder = tmp_path_factory.mktemp("processes")
    write_prepared(folder / "data", "tiny", users=20, items=12, pictures=True)
    write, left = cache.Writer.write, iter(range(BEGUN))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("trainer.evaluation.GROUP", 4)  # several groups of users for each process
        for name, flags in CASES.items():
            train.main(shlex.split(f"{flags} --run_name {name}-one"))
        with cut_off_after(1):
            train.main(shlex.split(f"{CASES['sampled']} --run_name cut-by-one"))
        make_features("whole")
        with pytest.MonkeyPatch.context() as cut, pytest.raises(StopIteration):
            cut.setattr(cache.Writer, "write", lambda *given: (next(left), write(*given)))
            make_features("begun")
        assert not torch.distributed.is_initialized()
        Path("two.py").write_text(TWO)
        command = [sys.executable, *TORCHRUN.split(), "two.py", json.dumps(CASES)]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-5000:]
        train.main(["--resume", str(named("cut-by-two", folder))])
    return folder


def named(name: str, folder: Path) -> Path:
    (run,) = folder.glob(f"experiments/runs/tiny/*-{name}")
    return run


def outcome(folder: Path, case: str) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text())[case] for rank in (0, 1)]


def assert_same_training(run: Path, other: Path) -> None:
    found = []
    for path in (run, other):
        state = load_state(path / "last.pt")
        log = [{k: v for k, v in line.items() if "seconds" not in k} for line in read_log(path)]
        tested = json.loads((path / "test_mrl_metrics.json").read_text())
        found.append([*(state[part] for part in ("model", "average", "rows", "optimizer", "rng")), log, tested])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert {p.name for p in run.iterdir()} == {p.name for p in other.iterdir()}


RESUMED = [("cut-by-one", "sampled"), ("cut-by-two", "sampled"), ("recorded", "faithful")]


@pytest.mark.parametrize(
    ("run", "case"), [*((f"{name}-two", name) for name in CASES if name != "itemknn"), *RESUMED], ids=str
)
def test_two_processes_train_as_one_does_resume_its_runs_and_record_steps(folder, run, case):
    assert_same_training(named(run, folder), named(f"{case}-one", folder))


def validate_spread_embedding():
    """Validate a model whose embedding is spread over the processes: 3 chunks of items, 3 groups of users."""
    torch.manual_seed(0)
    settings = ModelSettings(mrl_hidden_sizes=(4, 8), item_embedding=8, item_embedding_gate=True, history_bias=True)
    model = FMRLRec(9000, torch.randn(9000, 16), settings)
    torch.nn.init.normal_(model.items.V)
    torch.nn.init.normal_(model.history_bias)
    model.items.gate.trained.copy_(torch.rand(9001) < 0.9)
    users = eval_rows(as_sequences(torch.randint(1, 9001, (600, 6)).tolist()), 50, "val")
    rows = sparse_rows(model, TrainingSettings(item_embedding_updates="rows"), sampled=True)
    with rows.reading(model.items):
        set_new_item_scale(model)
        found = [evaluate(model, users, sizes=(4, 8), batch_size=99, ks=(9000,), mask_history=m) for m in (True, False)]
        held = [len(rows.rows), model.items.V.untyped_storage().nbytes()]
    return {"metrics": str(found), "scale": model.items.gate.scale.item(), "held": held}


def test_two_processes_that_hold_half_of_the_embedding_each_validate_bit_for_bit_as_one_does(folder):
    one, two = validate_spread_embedding(), outcome(folder, "spread")
    assert one.pop("held") == [9001, 4 * 9001 * 8] and [rank.pop("held") for rank in two] == [[4501, 4], [4501, 4]]
    assert two == [one, one]


def test_two_processes_count_and_test_a_run_as_one_does(folder, monkeypatch):
    one, two = named("itemknn-one", folder), named("itemknn-two", folder)
    for name in ("best.safetensors", "test_mrl_metrics.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("trainer.evaluation.GROUP", 4)
    tested = str(eval_script.main(["--run_name", "faithful-two"]))
    for case, printed in (("itemknn two", "counted in"), ("tested", "written:"), ("tested alone", "written:")):
        first, second = outcome(folder, case)
        assert first["printed"].count(printed) == 1 and second["printed"] == ""
        assert first["said"] == second["said"] and (tested == first["said"] or case == "itemknn two")


@pytest.mark.parametrize(
    ("case", "printed", "said"),
    [
        ("faithful two", f"2 processes, each on {cpu_name()}, ", "experiments/runs/tiny/"),
        ("resumed by two", "continuing after epoch 1", "experiments/runs/tiny/"),
        ("cut by two", "mrl_hidden_sizes         4,12   (flag)", "KeyboardInterrupt"),
        ("not finite", "", "InputError the loss is nan at step 3 (epoch 1); no epoch was finished"),
        ("full", "", "InputError rank 0: no space"),
    ],
)
def test_both_ranks_end_alike_and_the_first_alone_prints(folder, case, printed, said):
    first, second = outcome(folder, case)
    assert printed in first["printed"] and first["said"].startswith(said)
    assert first.pop("printed").count("trainable parameters") == 1 and second.pop("printed") == "" and first == second


def test_a_run_that_another_process_trains_is_refused_on_both_and_no_thread_outlives_the_process_group(folder):
    """A thread that drops a tensor as the interpreter ends would abort the process."""
    for rank in outcome(folder, "held"):
        assert re.match(r"InputError another process is training \S+-faithful-two; wait for it", rank["said"])
    for threads in outcome(folder, "threads"):
        assert threads and not [name for name in threads if "gloo" in name]


def test_two_processes_make_the_features_that_one_has_not_finished_to_the_same_bytes(folder):
    begun, whole = (contents(folder / root / "tiny") for root in ("begun", "whole"))
    arrays = {name: content for name, content in whole.items() if name.endswith(".npy")}
    assert len(arrays) == 2 and begun.keys() == whole.keys() and begun.items() >= arrays.items()
    written = outcome(folder, "written")
    assert sum(written) == BATCHES - BEGUN and min(written) > 0
    assert all("absent.npy does not exist" in rank["said"] for rank in outcome(folder, "no file"))


@pytest.mark.parametrize(("count", "ranks"), [(7, 3), (2, 4), (8, 4), (0, 2)])
def test_shares_of_all_ranks_are_everything_once_and_about_equal(monkeypatch, count, ranks):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    shares = []
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(range(*processes.share(count)))
    assert [thing for share in shares for thing in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_every_process_of_a_machine_has_its_own_gpu(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    current, bound, cuda = [], [], torch.cuda
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **given: bound.append(given.get("device_id")))
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "set_device", current.append)
    processes.start()
    assert resolve_device("cpu") == torch.device("cpu")
    assert [resolve_device("auto")] == current == bound == [torch.device("cuda:1")]
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
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
from tests.made_up import cut_off_after, write_prepared

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
    commands = [["ip", "netns", "add", name] for name in names]
    commands.append(["ip", "link", "add", links[0], "netns", names[0], "type", "veth"])
    commands[-1] += ["peer", links[1], "netns", names[1]]
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
            env = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": link}
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


@pytest.mark.parametrize(
    ("case", "differs"),
    [("flags", "settings"), ("other features", "feature file"), ("other data", "dataset"), ("no data", "dataset")],
)
def test_a_machine_that_differs_is_named_on_both(machines, case, differs):
    first, second = (outcomes[case]["said"] for outcomes in machines[1])
    assert first == second and differs in first and f"machine 1 ({socket.gethostname()})" in first


def test_a_process_that_fails_alone_ends_all_without_tracebacks_of_the_others(machines):
    first, second = machines[2]
    assert first.count("error: a process of this training ended early") == 1 and "RuntimeError" not in first
    assert second.count("error: only here") == 1


# ------------------------------------------------------------------------------------------------------------------ GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def trained(case, device, flags=""):
    return train.main(shlex.split(f"{CASES[case]} --device {device} --run_name {case}-{device} {flags}"))


@on_gpu
def test_a_gpu_computes_the_losses_and_gradients_of_the_cpu():
    def drawn(*shape):
        return torch.randn(shape, generator=draw).to(device).requires_grad_()

    found = []
    for device in ("cuda", "cpu"):
        draw = torch.Generator().manual_seed(0)
        z, weight, own, V, features = drawn(40, 16), drawn(16, 6), drawn(40, 16), drawn(31, 8), drawn(31, 6).detach()
        labels, log_scale = torch.randint(31, (40,), generator=draw).to(device), drawn(3)
        items, objective = torch.randint(1, 31, (9,), generator=draw).to(device), Objective(log_scale, 0.5)
        log_kq = NegativeSampler(torch.ones(31, device=device), 9).draw()[1]
        exact = matryoshka_cross_entropy(z, Factors(features, weight, V), labels, (4, 8, 16), objective=objective)
        sample = Sample(own, (features @ weight.T)[items], items, log_kq)
        sampled = sampled_matryoshka_cross_entropy(z, sample, labels, (4, 8, 16), objective=objective)
        gradients = torch.autograd.grad(exact + sampled, (z, weight, own, V, log_scale))
        found.append([part.cpu() for part in (exact, sampled, *gradients)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("case", ["faithful", "plus", "graphed", "sasrec", "itemknn"])
def test_a_gpu_trains_as_the_cpu_which_evaluates_its_run_alike(workplace, case):
    """Batches of a repeated shape are replayed from a CUDA graph."""
    dropout = "" if case == "itemknn" else "--lru_dropout 0 --lru_attn_dropout 0"  # which every device draws otherwise
    runs = [trained(case, device, dropout) for device in ("cuda", "cpu")]
    logs = [[(line.get("loss", 0), line["val"]) for line in read_log(run)] for run in runs]
    torch.testing.assert_close(*logs, rtol=1e-3, atol=1e-3)
    found = json.loads((runs[0] / "test_mrl_metrics.json").read_text())
    on_cpu = eval_script.main(["--run", str(runs[0]), "--device", "cpu"])
    torch.testing.assert_close({str(m): on_cpu[m] for m in on_cpu}, found, rtol=0, atol=1e-6)


@on_gpu
@pytest.mark.parametrize("case", ["faithful", "plus"])
def test_a_training_on_a_gpu_that_was_cut_off_is_resumed_to_the_same_weights(workplace, case):
    whole = trained(case, "cuda")
    with cut_off_after(1):
        trained(case, "cuda", "--run_name cut")
    cut = train.main(["--resume", "latest", "--run_name", "cut"])
    states = [load_state(run / "last.pt")["model"] for run in (whole, cut)]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)  # a GPU adds gradients up in any order
