"""Write a release: the exports of a run as archives, with their checksums and one card.

fmrlrec-<dataset>-<size>.tar.gz     an export in a folder of the archive's name, the same bytes each time
SHA256SUMS                          checksums of the archives, for sha256sum -c
README.md                           the card of all sizes
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import cannot_write, read_json, remove_leftovers, sha256, temporary_folder
from serving.hub import CARD, front_matter

SUMS = "SHA256SUMS"


def refuse_existing(folder: Path) -> None:
    """Raise InputError if `folder` exists: a release that people may have fetched is never replaced."""
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists; choose another folder for --release, or remove it first")


def write_release(folder: Path, dataset: str, sizes: Sequence[int], export: Callable[[int, Path], None]) -> None:
    """Write the release of a run as a new folder.

    export: writes a size as an export into a new folder. Raises InputError, and leaves nothing, if `folder` exists or
    cannot be written, or if a size cannot be exported.
    """
    refuse_existing(folder)
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent, folder.name)
        temporary = temporary_folder(folder)
        configs, archives = [], []
        for size in sizes:
            unpacked = temporary / f"fmrlrec-{dataset}-{size}"
            export(size, unpacked)
            configs.append(read_json(unpacked / "config.json", "export it again"))
            archives.append(pack(unpacked, temporary / f"{unpacked.name}.tar.gz"))
            shutil.rmtree(unpacked)
        sums = "".join(f"{sha256(archive)}  {archive.name}\n" for archive in archives)
        (temporary / SUMS).write_text(sums, encoding="utf-8")
        (temporary / CARD).write_text(release_card(configs, archives), encoding="utf-8")
        for path in temporary.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def pack(folder: Path, archive: Path) -> Path:
    """Pack the files of a folder, without times and owners, so that the same files give the same bytes."""
    with (
        archive.open("xb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in sorted(folder.iterdir()):
            member = tarfile.TarInfo(f"{folder.name}/{path.name}")  # mode 0644, time 0, owner 0
            member.size = path.stat().st_size
            with path.open("rb") as content:
                tar.addfile(member, content)
    return archive


def release_card(configs: Sequence[dict[str, Any]], archives: Sequence[Path]) -> str:
    """Return the README.md of a release. configs: the config.json of each archive."""
    first, name = configs[0], archives[0].name.removesuffix(".tar.gz")
    code = first["dataset"]["code"]
    columns = ("NDCG@10", "Recall@10")
    rows = ""
    for config, archive in zip(configs, archives, strict=True):
        metrics = config["metrics"] or {}
        cells = (f"{metrics[column]:.4f}" if column in metrics else "" for column in columns)
        unpacked = sum(stored["bytes"] for stored in config["files"].values())
        rows += f"| {config['size']} | `{archive.name}` | {archive.stat().st_size / 1e6:.2f} | {unpacked / 1e6:.2f} | "
        rows += " | ".join(cells) + " |\n"
    return f"""{front_matter(first)}
# {code}, {len(configs)} sizes

Sequential recommenders (fMRLRec, Findings of EMNLP 2024), sliced from the run `{first["run"]}`.
Each reads the last {first["max_len"]} items of a history and ranks {first["num_items"]:,} items.
Test metrics in float32, full ranking, history kept:

| size | archive | MB | MB unpacked | {" | ".join(columns)} |
| ---: | --- | ---: | ---: | ---: | ---: |
{rows}
License: unknown, until the publisher names one above and here. Data and encoders have their own.

Download an archive and `{SUMS}` into one folder, then check and unpack it:

```sh
sha256sum -c --ignore-missing {SUMS}
tar xf {name}.tar.gz
```

In a clone of the repository, or with `from fmrlrec import Recommender` where the package is installed and the archive
has ONNX graphs:

```python
from serving import Recommender

recommender = Recommender.from_pretrained("{name}")
print(recommender.recommend([[1, 2]], top_k=10)[0].ids)  # ids as strings, or item numbers
```

The card of each size is the README.md in its archive.
"""
