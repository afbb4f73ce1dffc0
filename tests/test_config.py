"""Settings: which value wins, what is refused and how, what is saved, and that each has an effect."""

import dataclasses
import errno
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train
from common.cli import add_switch, parse_args, run_cli
from common.errors import InputError
from common.files import read_json, read_text, remove_leftovers, replacing, write_json, write_text
from common.settings import is_runtime
from config import ALL_PRESETS, EXTENSIONS, METRICS, MODEL_PRESETS, PRESETS, SECTIONS, Config, resolve
from tests.prepared import contents, write_prepared, write_tiny_bert
from trainer.runs import read_settings

REPOSITORY = Path(__file__).parent.parent
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


SCRIPTS = ("train.py", "eval.py", "datasets.prepare", "experiments.run", "experiments.report", "experiments.cold_items",
           "experiments.cut", "experiments.look", "experiments.tune", "serving.export", "serving.recommend",
           "media.draw", "benchmarks.deploy", "benchmarks.pictures")  # fmt: skip


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
    assert done.returncode == 0, done.stderr
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
}  # fmt: skip
# Do not change the weights of a short run: chosen, named, or tested elsewhere.
ELSEWHERE = {
    "img_encoder", "encoder_precision", "num_heads", "early_stopping", "early_stopping_patience", "val_mask_history",
    "best_metric", "run_name", "validate_untrained", "features", "init_from", "item_embedding_updates",
    "item_embedding_gate", "teachers",
}  # fmt: skip
RUNTIME = {
    "data_root", "features_root", "runs_root", "device", "use_wandb", "use_tensorboard", "encoder_batch_size",
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
    """Return an existing file."""
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
