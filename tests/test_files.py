"""Write files whole or not at all, and name files that cannot be read."""

import errno
import gzip
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common.errors import InputError
from common.files import read_json, read_text, remove_leftovers, replacing, write_json, write_text

HINT = "make it again with the press"


@pytest.fixture
def old(tmp_path) -> Path:
    """Return an existing file."""
    path = tmp_path / "folder" / "[numbers].txt"
    write_text(path, "old")
    return path


def assert_untouched(old: Path) -> None:
    assert old.read_text() == "old"
    assert os.listdir(old.parent) == [old.name]  # noqa: PTH208 (hidden files count too)


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
def test_a_writer_that_fails_leaves_the_old_file_and_its_error_unchanged(old, error):
    with pytest.raises(type(error)) as raised, replacing(old) as temporary:
        temporary.write_text("half")
        assert old.read_text() == "old"
        raise error
    assert raised.value is error
    assert_untouched(old)


@pytest.mark.parametrize("step", [(Path, "write_text"), (os, "fsync"), (Path, "replace")], ids=lambda step: step[1])
def test_a_full_disk_leaves_the_old_file(old, monkeypatch, step):
    def full(*_, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match=r"numbers\].txt: No space .*; free space"),
    ):
        patch.setattr(*step, full)
        write_text(old, "new")
    assert_untouched(old)
    with pytest.raises(InputError, match=r"cannot write .*numbers\].txt/below\.txt"):
        write_text(old / "below.txt", "text")


def test_a_killed_writer_leaves_the_old_file_and_a_leftover_that_the_next_one_removes(old):
    write_half = (
        "import os, sys; from pathlib import Path; from common.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", write_half, str(old)], cwd=Path(__file__).parent.parent, check=False)
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


def test_concurrent_writers_leave_the_whole_file_of_one(tmp_path):
    texts = [letter * 200_000 for letter in "abcdef"]
    threads = [threading.Thread(target=write_text, args=(tmp_path / "a.txt", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.txt").read_text() in texts
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("missing.txt", None, "does not exist"),
        ("blank.txt", b" \n\n", "is empty"),
        ("no-bytes.gz", b"", "is empty"),
        ("latin1.gz", gzip.compress("naïve".encode("latin-1"), mtime=0), "is not UTF-8 (byte 2)"),
        ("truncated.gz", gzip.compress(b"text " * 100, mtime=0)[:-10], "cannot be read"),
        ("plain.gz", b"plain text, not gzipped", "cannot be read"),
        ("damaged.gz", gzip.compress(bytes(range(256)), mtime=0)[:40] + b"\0" * 300, "cannot be read"),
        ("", None, "cannot be read"),  # a folder
        ("literal.json", b"{'a': 1}", "is not JSON ("),
        ("nested.json", b"[" * 100_000, "is not JSON (nested more than 64 deep)"),
        ("deep.json", b'{"a":' * 65 + b"1" + b"}" * 65, "is not JSON (nested more than 64 deep)"),
        ("long.json", b'{"a": -%s}' % (b"1" * 5000), "is not JSON (Exceeds the limit (4300 digits)"),
        ("bomb.gz", gzip.compress(bytes(1 << 20), mtime=0), "has more than 100,000 bytes"),
        ("x" * 256, None, "cannot be read"),
        ("a\0b", None, "cannot be read"),
        ("\ud800\udfff.json", None, "cannot be read"),
        ("list.json", b"[1, null]", "is not a JSON object"),
        ("fifo.json", os.mkfifo, "cannot be read"),  # does not wait for a writer
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_a_remedy(tmp_path, name, content, problem):
    path = tmp_path / name
    if content is not None:
        content(path) if callable(content) else path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        (read_json if path.suffix == ".json" else read_text)(path, HINT, limit=100_000)
    assert str(raised.value).startswith(f"{path} {problem}")
    assert str(raised.value).endswith(f"; {HINT}")
