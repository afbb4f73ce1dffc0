"""A run is a folder, <runs_root>/<dataset_code>/<time>-<run_name>/, with

config.json              the settings and where each came from
env.json                 versions, device, commit, command line, and which data and features; the same of each --resume
log.jsonl                a line an epoch
best.safetensors         the weights of the best epoch by validation
last.pt                  what --resume needs (a model that only counts has none: it counts again)
test_metrics.json        the largest size on the test set
test_mrl_metrics.json    every size
test_list_metrics.json   the recommended lists: eval.py --list_metrics
test_ranks.npz           every user's rank up to the last cut-off, at every size (trainer/user_ranks.py)
…_history_masked.*       the same where the history is no candidate: eval.py --mask_history
*.png                    metric against size
deploy.json, deploy.png  what serving every size costs: benchmarks/deploy.py
cold_items.json          how well items that no training saw are found: experiments/cold_items.py
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import cannot_write, read_json, write_json
from common.settings import check_types
from config import COUNTING, Config

REPOSITORY = Path(__file__).parent.parent
CONFIG, ENVIRONMENT, LOG = "config.json", "env.json", "log.jsonl"
WEIGHTS, STATE = "best.safetensors", "last.pt"
LARGEST, EVERY_SIZE, USER_RANKS = "test_metrics.json", "test_mrl_metrics.json", "test_ranks.npz"
LIST_METRICS = "test_list_metrics.json"
DEPLOYMENT, DEPLOYMENT_PICTURE = "deploy.json", "deploy.png"
COLD_ITEMS = "cold_items.json"
LOGGED = {"epoch", "best_epoch", "seconds", "train_seconds"}  # in every line of log.jsonl
TIME = "%Y%m%d-%H%M%S"  # of a run's name


def of_test(name: str, mask_history: bool) -> str:
    """What the file LARGEST, EVERY_SIZE or USER_RANKS is called in a test with the history masked or kept."""
    stem, _, ending = name.partition(".")
    return f"{stem}_history_masked.{ending}" if mask_history else name


def read_settings(values: dict[str, Any]) -> Config:
    """Return the settings that a run's config.json holds."""
    return Config(**check_types(Config, values, "config.json"))


def ineffective_settings(config: Config) -> set[str]:
    """Return the settings without an effect on what is trained, given the others."""
    if config.model_code in COUNTING:
        used = {"dataset_code", "model_code", "run_name", "best_metric", "val_mask_history"}
        return {f.name for f in fields(Config) if not f.metadata["runtime"] and f.name not in used}
    return {f.name for f in fields(Config) if f.metadata["used_if"] and not f.metadata["used_if"](config)}


def run_label(config: Config) -> str:
    """Return the modalities of fmrlrec's items in a word, or the baseline's name."""
    return config.branch if config.model_code == "fmrlrec" else config.model_code


def describe_model(config: Config) -> str:
    """Return what items are described by, or the baseline's name, for titles."""
    if config.model_code != "fmrlrec":
        return config.model_code
    words = {"both": "text and pictures", "language": "text", "image": "pictures", "id": "a learned table"}
    return f"items by {words.get(config.branch, config.branch)}"


def create_run(config: Config, sources: dict[str, str], device: str, data: str, features: list[str]) -> Path:
    """Make a new run's folder with its config.json and env.json. data: the dataset's digest; features: the names of the
    files that are read."""
    name = config.run_name or f"{run_label(config)}-{config.mrl_hidden_sizes[-1]}"
    parent = Path(config.runs_root) / config.dataset_code
    stem = f"{time.strftime(TIME)}-{name}"
    for attempt in range(1, 1000):
        run = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(
                f"cannot make the run's folder {run}: {error.strerror}; give another --runs_root"
            ) from None
        break
    write_json(run / ENVIRONMENT, environment(device) | {"data": data, "features": features})
    write_json(run / CONFIG, {"settings": vars(config), "sources": sources})
    return run


def read_config(run: Path) -> tuple[Config, dict[str, str]]:
    """A run's settings, and where each came from. Raises InputError where the folder is no run."""
    saved = read_json(run / CONFIG, "give a run's folder, as train.py prints it")
    if not isinstance(saved.get("settings"), dict):
        raise InputError(f"{run / CONFIG} is not a run's configuration; give a run's folder, as train.py prints it")
    try:
        return read_settings(saved["settings"]), saved.get("sources", {})
    except InputError as error:
        raise InputError(f"{run}: {error}; {ENVIRONMENT} names the commit that reads it, or train anew") from None


def note_resumed(run: Path, device: str) -> None:
    """Add to a run's env.json where and by which code it goes on."""
    path = run / ENVIRONMENT
    saved = read_environment(run)
    write_json(path, saved | {"resumed": [*saved.get("resumed", []), environment(device)]})


def read_environment(run: Path) -> dict[str, Any]:
    """A run's env.json. Raises InputError where the folder is no run."""
    return read_json(run / ENVIRONMENT, "give a run's folder, as train.py prints it")


def features_of(run: Path) -> list[str]:
    """The names of the features' files that a run was trained on; none where it was not noted."""
    return read_environment(run).get("features", [])


def check_data(run: Path, data: str) -> None:
    """Raise InputError if a run was trained on a dataset of another digest."""
    saved = read_environment(run)
    if saved.get("data", data) != data:
        raise InputError(
            f"the dataset (digest {data}) is not the one that {run} was trained on ({saved['data']}); give its "
            f"--data_root, or train anew"
        )


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Keep other processes from training the run meanwhile. Raises InputError where one does already, or where nothing
    can be written."""
    try:
        file = (run / CONFIG).open("rb+")  # to be written, as NFS wants of what is locked
    except OSError as error:
        raise cannot_write(run / CONFIG, error) from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process trains {run} now; wait for it, or end it") from None
        except (ImportError, OSError):  # a system or a file system without locks
            pass
        yield


def is_finished(epoch: int, best_epoch: int, num_epochs: int, patience: int | None) -> bool:
    """Whether a run that has done `epoch` epochs has nothing left to train."""
    return epoch >= num_epochs or (patience is not None and epoch - best_epoch >= patience)


def unfinished(run: Path) -> str:
    """What a run still lacks, in words: epochs, or the test at their end if it asked for one; "" for a finished one."""
    if progress := untrained(run):
        return progress
    config, _ = read_config(run)
    return "trained, not tested" if config.test and not (run / EVERY_SIZE).exists() else ""


def describe_run(run: Path) -> str:
    """A run for a user to read, with what it still lacks."""
    progress = unfinished(run)
    return f"run {run}{f', unfinished: {progress}' if progress else ''}"


def untrained(run: Path) -> str:
    """The epochs that a run still lacks, in words; "" where there are none."""
    config, _ = read_config(run)
    log = read_log(run)
    done, best = (log[-1]["epoch"], log[-1]["best_epoch"]) if log else (0, 0)
    patience = config.early_stopping_patience if config.early_stopping else None
    if not is_finished(done, best, config.num_epochs, patience):
        return f"epoch {done} of {config.num_epochs}"
    return ""


def environment(device: str) -> dict[str, Any]:
    """Versions, device, commit and command line."""
    packages = ("torch", "numpy", "transformers", "open_clip_torch", "safetensors", "onnx", "onnxruntime")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit(),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": device,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in packages},
    }


def commit() -> str | None:
    """The commit of this code, where it lies in a git repository."""
    return _git("rev-parse", "HEAD")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl."""
    path = run / LOG
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            records.append(json.loads(line))
            missing = LOGGED - records[-1].keys()
        except (ValueError, AttributeError):
            missing = LOGGED
        if missing:
            raise InputError(f"{path}:{number} is damaged: no JSON object with {', '.join(sorted(missing))}; remove it")
    return records


def no_weights(path: Path) -> InputError:
    """What to tell a user of weights that are not there."""
    return InputError(
        f"{path} does not exist: the run has no finished epoch yet (train.py --resume goes on), or was kept as a "
        f"result, without weights (train another one)"
    )
