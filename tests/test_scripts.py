"""Settings (which value wins, what is refused and saved), files, and train.py and eval.py on a tiny dataset."""

import copy
import dataclasses
import errno
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import MagicMock, call

import pytest
import torch
from safetensors.torch import load_file

import config
import eval as eval_script
import train
from common.cli import add_switch, parse_args, run_cli
from common.errors import InputError
from common.files import read_json, read_text, remove_leftovers, replacing, sha256, write_json, write_text
from common.settings import format_value, is_runtime
from config import ALL_PRESETS, EXTENSIONS, METRICS, MODEL_PRESETS, PRESETS, SECTIONS, Config, resolve
from dataloader import eval_rows
from datasets.catalog import load_catalog
from experiments import nightly, report, tables
from model.extensions.objective import Teachers
from tests.made_up import contents, cut_off_after, write_maps, write_prepared, write_tiny_bert
from trainer import evaluation, runs, testing
from trainer import trainer as trainer_module
from trainer.checkpoint import load_state
from trainer.runs import REPOSITORY, read_settings
from trainer.trainer import Trainer

# ------------------------------------------------------------------------------------------------------------- settings

FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def parsed(*argv: str) -> tuple[Config, dict[str, str]]:
    flags, _ = parse_args(argv, "a test", SECTIONS)
    return resolve(flags)


def refusal(capsys, *argv: str) -> str:
    """Return the last line on stderr of a command line that is refused with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: parsed(*argv))
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_flag_wins_over_presets_and_a_preset_over_the_default():
    for argv, name, value, source in (
        ("--dataset_code=beauty", "lr", 1e-4, "default"),
        ("--dataset_code=beauty", "lru_dropout", 0.6, "preset"),
        ("--lru_dropout=0.5 --dataset_code=beauty", "lru_dropout", 0.5, "flag"),  # repeats the default
        ("", "language_encoder", "lexical", "preset"),  # the demo needs no download
        ("--model_code=lrurec --dataset_code=clothing", "lru_r_max", 0.99, "preset"),  # the model's, not clothing's
        ("--model_code=lrurec --dataset_code=clothing --lru_r_max=0.9", "lru_r_max", 0.9, "flag"),
        ("--preset=plus --dataset_code=beauty", "preset", "plus", "flag"),
        ("--preset=plus --dataset_code=beauty --distill=0.1", "distill", 0.1, "flag"),
        ("--preset=plus", "num_epochs", ALL_PRESETS["plus on demo"]["num_epochs"], "preset"),
    ):
        config, sources = parsed(*argv.split())
        assert (getattr(config, name), sources[name]) == (value, source)
        assert sources.keys() == FIELDS.keys()
        given = {flag.partition("=")[0].removeprefix("--") for flag in argv.split()}
        assert {name for name, source in sources.items() if source == "flag"} == given


@pytest.mark.parametrize(("name", "r_min"), [("beauty", 0.0), ("clothing", 0.1), ("sports", 0.1), ("toys", 0.0)])
def test_the_ring_of_a_dataset_is_the_papers(name, r_min):
    config, _ = parsed(f"--dataset_code={name}")
    assert (config.lru_r_min, config.lru_r_max) == (r_min, pytest.approx(r_min + 0.1))
    assert all(getattr(config, extension) == getattr(Config, extension) for extension in EXTENSIONS)
    assert parsed("--preset=paper", f"--dataset_code={name}")[0] == config


def test_a_value_is_read_as_it_is_written():
    for argv, name, value in (
        *[([flag], "use_wandb", True) for flag in ("--use_wandb", "--use_wandb=True", "--use_wandb=1")],
        *[([flag], "use_img_encoder", False) for flag in ("--no-use_img_encoder", "--no_use_img_encoder")],
        *[(["--use_img_encoder", value], "use_img_encoder", False) for value in ("false", "False", "0")],
        (["--use_wandb", "--seed=3"], "seed", 3),  # a boolean does not take the next flag
        (["--mrl_hidden_sizes", " 8, 16 , 32,"], "mrl_hidden_sizes", (8, 16, 32)),
        (["--item_attributes=brand,title"], "item_attributes", ("brand", "title")),
        (["--item_attributes=", "--no-use_language_encoder"], "item_attributes", ()),
        (["--lr=3e-4"], "lr", 3e-4),
        *[([f"--best_metric={metric}@7", "--metric_ks=3,9"], "best_metric", f"{metric}@7") for metric in METRICS],
    ):
        assert getattr(parsed(*argv)[0], name) == value


BAD_VALUES = {
    "dataset_code": ["", "..", "../beauty", "photos\\beauty"],
    "run_name": ["../elsewhere"],
    "mrl_hidden_sizes": ["16,8", "8,8", "0,8", "", "8,sixteen", "8,16.5"],
    "lru_dropout": ["1.0", "-0.1", "nan", "half"],
    "lru_r_min": ["-0.1", "0.1", "nan"],  # .1 is as large as r_max
    "num_epochs": ["0", "1.5"],
    "lr": ["0.0", "nan", "inf", "fast"],
    "seed": ["-1", str(2**64)],
    "best_metric": ["NDCG@0", "NDCG@010", "NDCG@ten", "HR@10", "NDCG", ""],
    "optimizer": ["sgd"],
    "distill": ["1.1"],
    "use_img_encoder": ["maybe", ""],
}


@pytest.mark.parametrize("flag", BAD_VALUES)
def test_a_bad_value_is_refused_by_its_flag_and_value(capsys, flag):
    for value in BAD_VALUES[flag]:
        message = refusal(capsys, f"--{flag}={value}")
        assert "error" in message and f"--{flag}" in message
        assert value in message.replace("\\\\", "\\")


def test_flags_that_contradict_or_are_unknown_are_refused(capsys):
    for argv, message in (
        ("--model_code=sasrec --use_img_encoder", "--use_img_encoder: sasrec uses item ids only"),
        ("--model_code=lrurec --mrl_hidden_sizes=8,16", '--mrl_hidden_sizes "8,16": lrurec takes one size'),
        ("--model_code=popularity --mrl_hidden_sizes=64", "--mrl_hidden_sizes 64: popularity has no size"),
        ("--model_code=lrurec --preset=plus", "--preset plus needs --model_code fmrlrec, not lrurec"),
        ("--model_code=sasrec --num_heads=3", "--num_heads 3 does not divide --mrl_hidden_sizes 64"),
        ("--item_embedding=4 --no-use_language_encoder --no-use_img_encoder", "--item_embedding needs an encoder or"),
        ("--lru_r_min=0.3 --lru_r_max=0.2", "--lru_r_min 0.3 --lru_r_max 0.2"),
        ("--teachers=a,b", "--teachers needs --distill, their share in the targets"),
        ("--lru_droput=0.3", "unknown flag --lru_droput; did you mean --lru_dropout?"),
        ("--no-use_img_encodr", "unknown flag --no-use_img_encodr; did you mean --no-use_img_encoder?"),
        ("--zzz", "unknown flag --zzz; --help lists them all"),
        ("--mrl_hidden_sizes 8, 16", "unexpected argument '16'; a flag begins with --, and its value is one word"),
        ("--lru_dropout 60%", "argument --lru_dropout: '60%' is not a number such as 0.6"),
    ):
        assert message in refusal(capsys, *argv.split())


def test_a_script_ends_with_one_line_on_stderr(monkeypatch, capsys):
    for processes, error, everywhere, status, waited, printed in (
        ("1", InputError("no such thing"), False, 2, [], "error: no such thing\n"),
        ("1", KeyboardInterrupt(), False, 130, [], "interrupted\n"),
        ("2", InputError("bad"), False, 2, [10], "error: bad\n"),  # rank 1 waits for the message of rank 0
        ("2", InputError("on every rank"), True, 2, [3], ""),
        ("2", KeyboardInterrupt(), False, 130, [], ""),
    ):

        def main(error=error):
            raise error

        error.on_every_rank, sleeps = everywhere, []
        monkeypatch.setattr(os, "environ", os.environ | {"WORLD_SIZE": processes, "RANK": "1"})
        monkeypatch.setattr("time.sleep", sleeps.append)
        with pytest.raises(SystemExit) as stopped:
            run_cli(main)
        assert (stopped.value.code, sleeps, *capsys.readouterr()) == (status, waited, "", printed)


def test_a_scripts_own_arguments_are_returned_apart_from_the_settings_and_switches_are_spelled_as_those(capsys):
    def own(parser):
        add_switch(parser, "alone", "help")

    for argv, alone in (("", False), ("--alone --no-alone", False), ("--alone", True), ("--alone=true", True)):
        flags, arguments = parse_args(["--seed=1", *argv.split()], "a test", SECTIONS, own)
        assert (flags, vars(arguments)) == ({"seed": 1}, {"alone": alone})
    with pytest.raises(SystemExit):
        parse_args(["--no-alon"], "a test", SECTIONS, own)
    assert "unknown flag --no-alon; did you mean --" in capsys.readouterr().err


def test_help_lists_every_flag_once_with_its_default_and_choices_and_every_preset(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--help"], "a test", SECTIONS, presets=ALL_PRESETS)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    entries = [" ".join(part.split()) for part in re.split(r"\n(?=  -)", text)]
    for name, f in FIELDS.items():
        [entry] = [entry for entry in entries if re.match(rf"--{name}\b", entry)]
        shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
        assert f.metadata["help"] in entry and f"(default: {shown or 'empty'})" in entry
        if choices := f.metadata["choices"]:
            assert f"--{name} {{{','.join(choices)}}}" in entry
    for name in (*PRESETS, *MODEL_PRESETS, "plus"):
        [line] = re.findall(rf"^  {name}: (.*(?:\n    .*)*)", text, flags=re.MULTILINE)
        assert [pair.split()[0] for pair in " ".join(line.split()).split(", ")] == list(ALL_PRESETS[name])
    beyond = re.search(r"^beyond the paper:\n((?:  .*\n)*)", text, flags=re.MULTILINE)[1]
    assert re.findall(r"^  --(\w+)", beyond, flags=re.MULTILINE) == list(EXTENSIONS)


SCRIPTS = ("serving.hub", "train.py", "eval.py", "datasets.prepare", "experiments.run", "experiments.report",
           "experiments.cold_items", "experiments.cut", "experiments.look", "experiments.tune", "serving.export",
           "serving.recommend", "experiments.figures", "benchmarks.deploy", "benchmarks.pictures")  # fmt: skip


def test_help_does_not_wait_for_heavy_libraries():
    code = f"""
import runpy, sys
for name in {SCRIPTS!r}:
    sys.argv = [name, '--help']
    try:
        (runpy.run_path if '.py' in name else runpy.run_module)(name, run_name='__main__')
    except SystemExit as stopped:
        assert not stopped.code, name
    heavy = {{'torch', 'transformers', 'open_clip', 'matplotlib', 'wandb', 'pandas'}} & sys.modules.keys()
    assert not heavy, f'{{name}} imports {{heavy}}'
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "'serving.hub' found in sys.modules" not in done.stderr, done.stderr
    assert done.stdout.count("--help") >= len(SCRIPTS)


def test_settings_come_back_from_json_and_missing_ones_have_the_value_of_their_time():
    config, _ = parsed("--dataset_code=sports", "--mrl_hidden_sizes=4,8", "--item_attributes=title", "--preset=plus")
    assert read_settings(json.loads(json.dumps(vars(config)))) == config
    later = ("preset", "distill", "embedding_dropout", "warmup_from_zero", "mrl_loss")
    old = {name: value for name, value in vars(Config()).items() if name not in later}
    of_its_time = {"embedding_dropout": False, "warmup_from_zero": False, "mrl_loss": "mean"}
    assert read_settings(old) == dataclasses.replace(Config(), **of_its_time)
    assert read_settings(old | {"post_norm": True}).embedding_dropout


def test_a_bad_saved_setting_is_refused_by_name():
    for saved, problem in (
        ({"momentum": 0.9}, r"momentum.*another version"),
        ({"distill": 10**400}, "--distill 1000.* must be at least 0 and at most 1"),  # beyond any float
        *[({name: "many"}, name) for name in ("lr", "mrl_hidden_sizes", "use_img_encoder")],
    ):
        with pytest.raises(InputError, match=problem):
            read_settings({"seed": 1} | saved)


BASE = {
    "dataset_code": "tiny", "language_encoder": "lexical", "img_encoder": "pixel", "mrl_hidden_sizes": (2, 4),
    "num_epochs": 2, "lru_num_blocks": 1, "lr": 0.01, "warmup_steps": 1, "train_batch_size": 8, "device": "cpu",
    "test": False,
}  # fmt: skip
CHANGED = {
    "dataset_code": "other", "use_language_encoder": False, "item_attributes": ("brand",), "use_img_encoder": False,
    "language_encoder": "./bert", "model_code": "sasrec", "mrl_hidden_sizes": (4, 8), "lru_max_len": 2,
    "lru_num_blocks": 2, "lru_dropout": 0.1, "lru_attn_dropout": 0.1, "lru_use_bias": False, "lru_r_min": 0.05,
    "lru_r_max": 0.9, "seed": 9, "train_batch_size": 12, "num_epochs": 1, "epoch_steps": 1, "precision": "bf16",
    "optimizer": "adam", "lr": 0.02, "weight_decay": 0.3, "adam_epsilon": 1e-3, "max_grad_norm": 1e-4,
    "enable_lr_schedule": False, "warmup_steps": 3, "mrl_loss": "mean", "embedding_dropout": False,
    "warmup_from_zero": False, "history_bias": True,
    "loss": "plain", "first_item_label": False, "num_negatives": 7, "whiten_features": True, "item_embedding": 2,
    "post_norm": True, "dropout_from": 2, "logit_scale": True, "distill": 0.5, "ema_decay": 0.5, "preset": "plus",
    "logit_adjustment": 2.0,
}  # fmt: skip
# Do not change the weights of a short run: chosen, named, or tested elsewhere.
ELSEWHERE = {
    "img_encoder", "encoder_precision", "num_heads", "early_stopping", "early_stopping_patience", "val_mask_history",
    "best_metric", "run_name", "validate_untrained", "features", "init_from", "item_embedding_updates",
    "item_embedding_gate", "teachers",
}  # fmt: skip
RUNTIME = {
    "data_root", "features_root", "runs_root", "device", "use_wandb", "use_tensorboard", "print_val_metrics",
    "encoder_batch_size",
    "encoder_workers", "val_batch_size", "test_batch_size", "metric_ks", "test", "save_every_minutes",
}  # fmt: skip


def test_every_setting_is_read_and_is_runtime_or_changes_the_training():
    rooms = ("config.py", "common", "datasets", "dataloader", "model", "trainer", "train.py", "eval.py")
    paths = [path for room in rooms for path in REPOSITORY.glob(room if ".py" in room else f"{room}/**/*.py")]
    read = {name for path in paths for name in re.findall(r"\.(\w+)", path.read_text(encoding="utf-8"))}
    assert read >= FIELDS.keys() == CHANGED.keys() | ELSEWHERE | RUNTIME
    assert {name for name in FIELDS if is_runtime(Config, name)} == RUNTIME


def weights(**settings) -> str:
    text = {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in (BASE | settings).items()}
    run = train.main([f"--{name}={value}" for name, value in text.items()])
    return hashlib.sha256((run / "best.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def base_weights(tmp_path_factory):
    """Change to a folder with two datasets and a text encoder; return the weights of the base settings there."""
    folder = tmp_path_factory.mktemp("settings")
    for name, seed in (("tiny", 0), ("other", 1)):
        write_prepared(folder / "data", name, users=20, items=20, pictures=True, seed=seed)
    write_tiny_bert(folder / "bert")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        found = weights()
        assert weights() == found
        yield found


@pytest.mark.parametrize("name", CHANGED)
def test_a_setting_changes_what_is_trained(base_weights, name):
    by_ids = {"use_language_encoder": False, "use_img_encoder": False, "mrl_hidden_sizes": (4,)}
    assert weights(**{name: CHANGED[name]} | (by_ids if name == "model_code" else {})) != base_weights


# ---------------------------------------------------------------------------------------------------------------- files

HINT = "make it again with the press"


@pytest.fixture
def old(tmp_path) -> Path:
    path = tmp_path / "folder" / "[numbers].txt"
    write_text(path, "old")
    return path


@pytest.mark.parametrize("value", [{"name": "Größe", "sizes": [8, 16]}, {"\ud800": "ν"}])
def test_a_written_file_reads_back(tmp_path, value):
    path = tmp_path / "new" / "a.json"
    write_json(path, value)
    assert read_json(path, HINT) == value
    assert path.stat().st_mode & 0o777 == 0o644
    path.with_suffix(".gz").write_bytes(gzip.compress("naïve".encode()))
    assert read_text(path.with_suffix(".gz"), HINT) == "naïve"
    path.write_bytes(b'\xef\xbb\xbf{"a": [[1]]}')
    assert read_json(path, HINT) == {"a": [[1]]}


@pytest.mark.parametrize("error", [ValueError("bad numbers"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_alone_and_its_error_unchanged(old, error):
    with pytest.raises(type(error)) as raised, replacing(old) as temporary:
        temporary.write_text("half")
        raise error
    assert raised.value is error and contents(old.parent) == {old.name: b"old"}


def test_concurrent_writers_leave_the_whole_file_of_one_and_each_run_has_a_folder_of_its_own(old, monkeypatch):
    texts = [letter * 200_000 for letter in "abcdef"]
    monkeypatch.setattr(runs.time, "strftime", lambda _: "20260101-000000")  # all runs begin in the same second

    def write(text):
        write_text(old, text)
        return runs.create_run(Config(runs_root=str(old.parent), run_name="one"), {}, "cpu", text[0], "by time", [])

    with ThreadPoolExecutor(6) as pool:
        folders = list(pool.map(write, texts))
    assert old.read_text() in texts and not list(old.parent.glob(".*"))
    assert [runs.read_environment(folder)["data"] for folder in folders] == list("abcdef")


@pytest.mark.parametrize("step", [(Path, "write_text"), (os, "fsync"), (Path, "replace")], ids=lambda step: step[1])
def test_a_full_disk_leaves_the_old_file_alone(old, monkeypatch, step):
    def full(*_, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"cannot write .*numbers\].txt/below\.txt"):
        write_text(old / "below.txt", "text")
    monkeypatch.setattr(*step, full)
    with pytest.raises(InputError, match=r"numbers\].txt: No space .*; free space"):
        write_text(old, "new")
    assert contents(old.parent) == {old.name: b"old"}


def test_a_killed_writer_leaves_the_old_file_and_a_leftover_that_the_next_one_removes(old):
    write_half = (
        "import os, sys; from pathlib import Path; from common.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", write_half, str(old)], cwd=REPOSITORY, check=False)
    assert done.returncode == -signal.SIGKILL
    [left] = set(old.parent.iterdir()) - {old}
    assert (old.read_text(), left.read_text()) == ("old", "half")
    other = left.with_name(left.name.replace(old.name, "other"))
    unknown = old.with_name(f".{old.name}.abc.tmp")  # of an earlier version
    with replacing(old) as at_work:
        for path in (other, unknown):
            path.touch()
        remove_leftovers(old.parent, old.name)
        assert set(old.parent.iterdir()) == {old, at_work, other, unknown}
        os.utime(unknown, (1, 1))
        remove_leftovers(old.parent, old.name)
        assert not unknown.exists()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("missing.txt", None, "does not exist"),
        ("no-bytes.gz", b"", "is empty"),
        ("latin1.gz", gzip.compress("naïve".encode("latin-1"), mtime=0), "is not UTF-8 (byte 2)"),
        ("truncated.gz", gzip.compress(b"text " * 100, mtime=0)[:-10], "cannot be read"),
        ("", None, "cannot be read"),  # a folder
        ("literal.json", b"{'a': 1}", "is not JSON ("),
        ("deep.json", b'{"a":' * 65 + b"1" + b"}" * 65, "is not JSON (nested more than 64 deep)"),
        ("long.json", b'{"a": -%s}' % (b"1" * 5000), "is not JSON (Exceeds the limit (4300 digits)"),
        ("bomb.gz", gzip.compress(bytes(1 << 20), mtime=0), "has more than 100,000 bytes"),
        ("\ud800\udfff.json", None, "cannot be read"),
        ("list.json", b"[1, null]", "is not a JSON object"),
        ("fifo.json", os.mkfifo, "cannot be read"),  # does not wait for a writer
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_a_remedy(tmp_path, name, content, problem):
    path = tmp_path / name
    if content is not None:
        content(path) if callable(content) else path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{re.escape(f'{path} {problem}')}.*; {HINT}$"):
        (read_json if path.suffix == ".json" else read_text)(path, HINT, limit=100_000)


# -------------------------------------------------------------------------------------------------------------- scripts

TINY = (
    "--dataset_code tiny --language_encoder lexical --no-use_img_encoder --mrl_hidden_sizes 2,4,8 --num_epochs 2 "
    "--lr 0.01 --warmup_steps 1 --lru_num_blocks 1 --device cpu"
)


def run_train(flags=""):
    return train.main(shlex.split(f"{TINY} {flags}"))


def run_eval(flags=""):
    return eval_script.main(shlex.split(flags))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    write_prepared(folder / "data", "tiny", users=20, items=12, pictures=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_train()
    return folder


@pytest.fixture
def run(template, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "copy"))
    (run,) = Path("experiments/runs/tiny").iterdir()
    return run


def metrics_in(run):
    return {int(size): metrics for size, metrics in json_of(run / "test_mrl_metrics.json").items()}


def json_of(path):
    return json.loads(path.read_text())


def test_a_run_folder_holds_settings_environment_log_weights_and_metrics(workplace, capsys):
    run = run_train("--num_heads 2 --use_img_encoder --img_encoder pixel --lru_dropout 0.1")
    assert run.parent == Path("experiments/runs/tiny")
    files = "config.json env.json log.jsonl best.safetensors last.pt test_metrics.json test_mrl_metrics.json"
    files += " items.json.gz table.safetensors test_mrl_metrics.png training.png test_ranks.npz"
    assert {p.name for p in run.iterdir()} == set(files.split())
    saved, environment = json_of(run / "config.json"), json_of(run / "env.json")
    assert saved["settings"]["mrl_hidden_sizes"] == [2, 4, 8]
    assert (saved["sources"]["lr"], saved["sources"]["seed"]) == ("flag", "default")
    assert environment["features"] and environment["versions"]["torch"]
    assert all(Path("data/features/tiny", name).is_file() for name in environment["features"])
    metrics = metrics_in(run)
    assert list(metrics) == [2, 4, 8] and json_of(run / "test_metrics.json") == metrics[8]
    assert set(metrics[2]) == {f"{name}@{k}" for name in ("Recall", "NDCG", "MRR") for k in (5, 10, 20, 50)}
    printed = capsys.readouterr().out
    assert "trainable parameters" in printed and "epoch   2/2" in printed and "the pictures or" not in printed
    assert re.findall(r"^ *(\w+) .*\(flag; without effect", printed, re.MULTILINE) == ["num_heads"]
    os.utime(next((workplace / "data/photos/tiny").iterdir()), (0, 0))
    run_eval(f"--run {run}")
    assert "the pictures or their encoder's weights are not those that the run was trained" in capsys.readouterr().out


def test_eval_repeats_the_test_of_train_in_one_pass_or_by_every_slice_alone_and_masks_the_history(run, monkeypatch):
    tested, true, trained = [], evaluation.rank_targets, metrics_in(run)

    def watched(model, rows, *, sizes, **how):
        tested.extend([(model.sizes[-1], sizes)] * (sizes != (1,)))  # of popularity, for the figure
        return true(model, rows, sizes=sizes, **how)

    for module in (evaluation, testing):
        monkeypatch.setattr(module, "rank_targets", watched)
    for protocol in ("", " --mask_history"):
        together, alone = run_eval(f"--run {run}{protocol}"), run_eval(f"--run {run} --alone{protocol}")
        assert alone == {size: pytest.approx(metrics) for size, metrics in together.items()}
        assert (together == trained) == (not protocol)
    assert tested == 2 * [(8, (2, 4, 8)), (2, (2,)), (4, (4,)), (8, (8,))]
    assert json_of(run / "test_mrl_metrics_history_masked.json")["8"] == alone[8]
    assert alone[8]["Recall@10"] > trained[8]["Recall@10"]  # 12 items, several of them in the history
    assert {"NDCG@7", "NDCG@10"} <= run_eval(f"--run {run} --metric_ks 7,100,200")[8].keys()


def test_eval_finds_the_newest_run_that_fits_the_flags(workplace, capsys):
    def assert_found(run, flags=""):
        run_eval(flags)
        assert f"run {run}\n" in capsys.readouterr().out

    with pytest.raises(InputError, match=r"no run below \S+/experiments/runs; train one: python train.py"):
        run_eval("")
    with pytest.raises(InputError, match=r"nowhere/config.json does not exist; give a run's folder"):
        run_eval("--run nowhere")
    flags = (f"--{name}={format_value(value)}" for name, value in config.NAMED_PRESETS["plus"].items())
    first = run_train(f"--run_name first --seed 1 --num_epochs 1 {' '.join(flags)}")
    second = run_train("--run_name second --seed 2 --num_epochs 1")
    assert_found(second)
    assert_found(second, "--preset paper")
    assert_found(first, "--dataset_code tiny --seed 1")
    assert_found(first, "--preset plus")
    with pytest.raises(InputError, match=r"no run .* matches --seed 3(.|\n)*second: seed 2(.|\n)*first: seed 1"):
        run_eval("--seed 3")
    with pytest.raises(InputError, match=r"--preset plus differs from .*, which has whiten_features False"):
        run_eval(f"--preset plus --run {second}")
    os.utime(first / "config.json", (2**32, 2**32))
    first = first.rename(first.with_name("renamed"))  # the age is that of its files
    assert_found(first)
    (first / "best.safetensors").unlink()
    assert_found(second)


def test_bad_input_is_refused_before_a_run_is_made(workplace, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, message in (
        ("--device cuda", "--device cuda: torch finds no GPU here; give --device cpu"),
        ("--dataset_code tny", r"dataset 'tny' is not at data/tny \(prepared there: tiny\); did you mean tiny\?"),
        ("--loss nonsense", r"--loss 'nonsense': without --num_negatives it must be one of fast, plain"),
        ("--language_encoder lexcal", "'lexcal' is neither a folder nor of the form ORGANISATION/MODEL; 'lexical'"),
    ):
        with pytest.raises(InputError, match=message):
            run_train(flags)
        assert not Path("experiments").exists()


def test_the_test_set_is_read_once_after_training_or_by_eval_which_tests_the_best_epoch(workplace, monkeypatch):
    parts, true_rows = [], eval_rows
    for module in (trainer_module, testing):
        monkeypatch.setattr(module, "eval_rows", lambda s, n, part: parts.append(part) or true_rows(s, n, part))
    fit, validate, values = Trainer.fit, Trainer.validate, iter([0.9, 0.1, 0.1, 0.1, 0.1, 0.2])
    monkeypatch.setattr(Trainer, "fit", lambda self: (parts.append("fit"), fit(self))[1])
    monkeypatch.setattr(Trainer, "validate", lambda self: validate(self) | {8: {"NDCG@10": next(values)}})
    tested = run_train("--num_epochs 4")
    assert parts == ["val", "fit", "test"]
    assert load_state(tested / "last.pt")["progress"]["best_epoch"] == 1
    expected = metrics_in(tested)
    assert run_eval(f"--run {tested}") == expected

    parts.clear()
    run = run_train("--no-test")
    assert parts == ["val", "fit"] and not list(run.glob("test_*"))
    with pytest.raises(InputError, match="is finished"):
        train.main(["--resume", "latest"])
    run_eval(f"--run {run}")
    assert parts == ["val", "fit", "test"] and (run / "test_mrl_metrics.json").exists()


def write_newer_data():
    """Give data/tiny two more items, and all items other numbers; return the ids in order."""
    folder = write_prepared(Path("data"), "tiny", users=20, items=14, pictures=True, seed=7)
    ids = list(json_of(folder / "datamaps.json")["item2id"])[::-1]
    write_maps(folder, {item: str(number) for number, item in enumerate(ids, start=1)}, users=20)
    return ids


@pytest.mark.parametrize(
    ("flags", "name", "zero"),
    [
        (f"{TINY} --preset plus --item_embedding 8 --num_negatives 0", "items.V", True),
        ("--dataset_code tiny --model_code sasrec --mrl_hidden_sizes 8 --num_epochs 1 --lr 1", "items.table", False),
    ],
)
def test_a_warm_start_on_newer_data_keeps_what_was_learned_of_items(workplace, monkeypatch, flags, name, zero):
    origin = train.main(shlex.split(flags))
    known, ids = list(json_of(Path("data/tiny/datamaps.json"))["item2id"]), write_newer_data()
    started, fit = {}, Trainer.fit

    def watched(self):
        started.update(copy.deepcopy(self.model.state_dict()))
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", watched)
    run = train.main(["--init_from", str(origin), "--num_epochs", "1"])

    before = load_file(origin / "best.safetensors")
    assert all(torch.equal(before[key], started[key]) for key in before if key not in (name, "items.gate.trained"))
    assert torch.equal(started[name][0], before[name][0])  # of token 0
    for number, item in enumerate(ids, start=1):
        if item in known:
            assert torch.equal(started[name][number], before[name][known.index(item) + 1])
        else:
            assert bool(started[name][number].any()) != zero
    saved = json_of(run / "config.json")
    assert (saved["settings"]["init_from"], saved["sources"]["lr"]) == (str(origin), "init_from")
    recorded = {"run": origin.name, "weights": sha256(origin / "best.safetensors")}
    assert json_of(run / "env.json")["init_from"] == recorded


def test_a_run_learns_from_teachers_and_refuses_those_that_changed_or_know_other_items(workplace, monkeypatch):
    teacher = train.main(shlex.split(f"{TINY} --num_epochs 1 --logit_adjustment 2"))
    add, added = Teachers.add_priors, []
    monkeypatch.setattr(
        Teachers, "add_priors", lambda self, *given: (added.append(self.adjustments), add(self, *given))
    )
    taught = f"{TINY} --preset plus --teachers {teacher},{teacher} --num_epochs 1"
    run, alone = train.main(shlex.split(taught)), train.main(shlex.split(f"{TINY} --preset plus --num_epochs 1"))
    assert [entry["run"] for entry in json_of(run / "env.json")["teachers"]] == 2 * [teacher.name]
    assert added == [[2.0, 2.0]]
    weights, without = (load_file(folder / "best.safetensors") for folder in (run, alone))
    assert not torch.equal(weights["items.V"], without["items.V"])
    train.main(["--resume", str(run)])

    best = (teacher / "best.safetensors").read_bytes()
    (teacher / "best.safetensors").write_bytes((alone / "best.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"changed since .* start another run with --teachers"):
        train.main(["--resume", str(run)])
    (teacher / "best.safetensors").write_bytes(best)
    short = "sasrec --lru_max_len 2 --num_epochs 1 --mrl_hidden_sizes 8"
    for model, problem in ((short, "at most 2 items; give --lru_max_len 2"), ("popularity", "counts; leave it out")):
        other = train.main(shlex.split(f"--dataset_code tiny --model_code {model}"))
        with pytest.raises(InputError, match=problem):
            train.main(shlex.split(f"{TINY} --distill 0.5 --teachers {other}"))
    write_newer_data()
    with pytest.raises(InputError, match="a run of popularity, which only counts; train it anew"):
        run_eval(f"--run {other} --on_newer_data")
    with pytest.raises(InputError, match=r"was trained on another dataset .* give runs of this one"):
        train.main(shlex.split(taught))


def test_a_warm_start_with_another_architecture_is_refused_by_name(run):
    for flags, message in (
        ("--mrl_hidden_sizes 2,4", r"--mrl_hidden_sizes 2,4 does not fit .* which has mrl_hidden_sizes 2,4,8"),
        ("--language_encoder other/encoder", "--language_encoder other/encoder does not fit"),
        ("--item_embedding 4", "--item_embedding 4 does not fit"),
    ):
        with pytest.raises(InputError, match=message):
            train.main(["--init_from", str(run), *shlex.split(flags)])


def test_eval_tests_a_run_on_newer_data_when_asked_to_and_apart_from_its_results(run):
    before = contents(run)
    write_newer_data()
    with pytest.raises(InputError, match=r"is not the one that .*eval.py --run .* --on_newer_data, .* --init_from"):
        run_eval(f"--run {run}")
    found = run_eval(f"--run {run} --on_newer_data")
    assert contents(run).items() >= before.items()
    (folder,) = (run / "newer_data").iterdir()
    assert json_of(folder / "test_mrl_metrics.json")["8"] == found[8]
    assert json_of(folder / "data.json")["data"].startswith(folder.name)


def test_nightly_updates_are_compared_with_no_update_and_with_training_anew(workplace, monkeypatch):
    monkeypatch.setattr(nightly, "NIGHTS", 1)
    flags = TINY.replace("--dataset_code tiny", "")
    first, last = nightly.main(["--dataset_code", "tiny", "--out", "my out", "--full", flags, "--anew", "1"])
    assert first["no_update"] == first["updated"] and {"updated", "seconds", "anew", "anew_seconds"} <= last.keys()
    [update] = Path("my out/tiny").glob("*-update-1")
    assert last["no_update"] == runs.read_log(update)[0]["val"]["8"]["NDCG@10"]
    catalog = load_catalog("data", "tiny")
    for share in (0.5, 1.0):
        nightly.write_night(catalog, nightly.event_times(catalog), share, 0, Path())
        night = load_catalog("data-0", "tiny")
        assert (night.digest() == catalog.digest()) == (share == 1)
        assert len(night.sequences.items) <= 1.2 * share * len(catalog.sequences.items)


def test_a_run_on_other_texts_is_refused(run):
    before, path = contents(run), Path("data/tiny/meta.json.gz")
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"'title': '", b"'title': 'other ")))
    for main, flag in ((eval_script.main, "--run"), (train.main, "--resume")):
        with pytest.raises(InputError, match=r"the items' texts, or .*, are not those that the run was trained on"):
            main([flag, str(run)])
    assert contents(run) == before
    assert len(list(Path("data/features/tiny").glob("*.npy"))) == 1


def test_a_run_is_tested_and_resumed_by_its_own_settings_even_from_the_start_but_not_without_its_weights(run):
    def refused(problem, main, *flags):
        with pytest.raises(InputError, match=problem):
            main([*flags])

    test, resume = (eval_script.main, "--run", str(run)), (train.main, "--resume", str(run))
    refused("mrl_hidden_sizes 2,4 differs from .*, which has mrl_hidden_sizes 2,4,8", *test, "--mrl_hidden_sizes=2,4")
    refused("--lr 0.5 differs from .*, which has lr 0.01; leave the flag out", *resume, "--lr", "0.5")
    before = (run / "best.safetensors").read_bytes()
    (run / "best.safetensors").write_bytes(before[:100])
    refused(r"is damaged .*; remove it, last.pt and log.jsonl, .* train.py --resume", *test)
    for name in ("best.safetensors", "last.pt"):
        (run / name).unlink()
    kept = contents(run)
    refused("has no last.pt to continue from, only results; train another run", *resume)
    refused("best.safetensors does not exist: .* only its results were kept", *test)
    assert contents(run) == kept
    (run / "log.jsonl").unlink()
    train.main(["--resume", str(run), "--test_batch_size", "3"])  # runtime flags may differ
    assert (run / "best.safetensors").read_bytes() == before


def test_an_unfinished_run_is_reported_not_kept_as_a_result_and_resumed_to_the_same_weights(
    run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(runs, "commit", lambda: "fedcba9876543210")
    with cut_off_after(1):
        run_train("--run_name cut")
    (cut,) = Path("experiments/runs/tiny").glob("*-cut")
    began = json_of(cut / "env.json")
    assert f"continue with: python train.py --resume {cut}" in capsys.readouterr().err
    run_eval(f"--run {cut}")
    assert f"run {cut}, unfinished: epoch 1 of 2" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"is not finished \(epoch 1 of 2\); train.py --resume"):
        report.main([f"--keep={cut}", f"--results={tmp_path}/kept", f"--out={tmp_path}/R.md", f"--media={tmp_path}"])
    leftover, foreign = cut / ".last.pt.abc.tmp", cut / ".test_metrics.json.abc.tmp"  # eval.py may be writing that
    for path in (leftover, foreign):
        path.touch()
        os.utime(path, (0, 0))  # long ago

    monkeypatch.setattr(runs, "commit", lambda: "0123456789abcdef")
    assert train.main(["--resume", "latest"]) == cut
    assert not leftover.exists() and foreign.exists()
    for name in ("best.safetensors", "test_mrl_metrics.json"):
        assert (cut / name).read_bytes() == (run / name).read_bytes()
    saved = json_of(cut / "env.json")
    (resumed,) = saved.pop("resumed")
    assert (saved, resumed["commit"], resumed["device"]) == (began, "0123456789abcdef", began["device"])
    assert "`fedcba9876`, `0123456789`" in tables.where_made([saved, resumed])


def test_a_log_line_of_an_epoch_without_checkpoint_is_dropped_on_resuming_and_a_damaged_one_named(run):
    lines = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(lines + lines.splitlines()[-1].replace('"epoch": 2', '"epoch": 3') + "\n")
    state = load_state(run / "last.pt")
    state["progress"] |= {"epoch": 1, "step": 1}
    torch.save(state, run / "last.pt")
    train.main(["--resume", str(run)])
    assert [line["epoch"] for line in runs.read_log(run)] == [1, 2]
    for text in ('{"epoch": 1', "[]", '{"epoch": 2, "seconds": 1, "train_seconds": 1}'):
        (run / "log.jsonl").write_text(f"{lines.splitlines()[0]}\n{text}\n")
        with pytest.raises(InputError, match=r"log\.jsonl:2.*; remove"):
            train.main(["--resume", str(run)])


@pytest.mark.parametrize(
    ("key", "reached", "modes"),
    [(None, True, ["offline"]), ("secret", True, ["online"]), ("secret", False, ["online", "offline"])],
)
def test_wandb_logs_every_epoch_and_the_test_online_if_it_can(workplace, monkeypatch, key, reached, modes):
    started, fake = MagicMock(), MagicMock(Error=OSError)
    fake.api.api_key = key
    fake.init.side_effect = [*[OSError("no network")] * (not reached), started]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("trainer.training_run.find_spec", lambda name: name)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = run_train("--use_wandb")
    tried = [(each.kwargs["mode"], each.kwargs["config"]["lr"]) for each in fake.init.call_args_list]
    assert tried == [(mode, 0.01) for mode in modes]
    assert [each.kwargs["step"] for each in started.log.call_args_list] == [1, 2]
    (summary,) = started.summary.update.call_args.args
    assert summary["test/8/NDCG@10"] == json_of(run / "test_metrics.json")["NDCG@10"]
    assert started.mock_calls[-1] == call.finish()


def test_tensorboard_has_the_numbers_of_the_log_and_of_the_test(workplace, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with cut_off_after(1):
        run_train("--use_tensorboard")
    run = train.main(["--resume", "latest"])
    events, log = accumulator.EventAccumulator(str(run / "tensorboard")).Reload(), runs.read_log(run)
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(record["epoch"], pytest.approx(record["loss"])) for record in log]
    found = [events.Scalars(f"{part}/8/NDCG@10")[-1].value for part in ("val", "test")]
    assert found == pytest.approx([log[-1]["val"]["8"]["NDCG@10"], metrics_in(run)[8]["NDCG@10"]])
    monkeypatch.setattr("trainer.training_run.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(InputError, match=f"--use_{name} needs the package {name}: pip install"):
            run_train(f"--use_{name}")
