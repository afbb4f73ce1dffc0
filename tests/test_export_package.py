"""`pip install .` installs the serving runtime alone, as the package fmrlrec."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import serving
from serving.packaging import runtime_modules
from tests.recommender.shop import Shop

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]

OPTIONS = ("--no-deps", "--no-build-isolation")

SERVE = """
import json, sys
target, folder, products = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, target)
for name in ("torch", "transformers", "tqdm", "serving", "common", "config", "datasets", "model", "trainer"):
    sys.modules[name] = None  # cannot be imported
import fmrlrec
recommender = fmrlrec.Recommender.from_pretrained(folder)
features = recommender.embed_items(products)
recommender.add_items(["NEW1", "NEW2"], features)
[answer] = recommender.recommend([[3, "NEW1"]], top_k=22, exclude_history=False)
try:
    fmrlrec.Recommender.from_pretrained(folder, "torch")
except fmrlrec.InputError as error:
    refused = str(error)
print(json.dumps([fmrlrec.__version__, answer.ids, answer.scores, features.tolist(), refused]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that the files which the Dockerfile copies were installed into, without dependencies."""
    setuptools = pytest.importorskip("setuptools", "77", reason="building needs setuptools>=77")
    pytest.importorskip("pip", reason="installing needs pip")
    clone, target = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("installed")
    copied = re.findall(r"^COPY (.+) \S+$", (REPOSITORY / "serving/Dockerfile").read_text(), re.MULTILINE)
    for name in " ".join(copied).split():
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, clone)
    stale = clone / "build/lib/fmrlrec/stale.py"  # left by an earlier build
    stale.parent.mkdir(parents=True)
    stale.touch()
    command = [
        sys.executable,
        *["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"],
        target,
        ".",
    ]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"setuptools {setuptools.__version__}\n{done.stderr}"
    return target


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Shop(tmp_path_factory.mktemp("shop"))


def test_the_package_holds_what_serving_imports_and_nothing_of_the_training(installed):
    assert {path.name for path in installed.iterdir()} == {"fmrlrec", "fmrlrec-0.9.0.dist-info", "bin"}
    files = {str(path.relative_to(installed / "fmrlrec")) for path in (installed / "fmrlrec").rglob("*.py")}
    assert files >= {"__init__.py", "recommender.py", "recommend.py", "http.py", "engines.py", "common/errors.py"}
    assert not files & {"export.py", "graphs.py", "convert.py", "torch_engine.py", "packaging.py", "stale.py"}
    assert len(files) == len(runtime_modules())
    for file in files:
        text = (installed / "fmrlrec" / file).read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) (serving|common|datasets)\b", text, re.MULTILINE)


def test_installed_without_torch_it_answers_and_encodes_as_in_the_clone(installed, shop):
    folder, products = shop.export("float16"), shop.records[:2]
    command = [sys.executable, "-I", "-c", SERVE, installed, folder, json.dumps(products)]
    done = subprocess.run(command, cwd=shop.root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    version, ids, scores, features, refused = json.loads(done.stdout)
    recommender = serving.Recommender.from_pretrained(folder)
    np.testing.assert_array_equal(features, recommender.embed_items(products))
    recommender.add_items(["NEW1", "NEW2"], np.array(features))
    [expected] = recommender.recommend([[3, "NEW1"]], top_k=22, exclude_history=False)
    assert (ids, scores) == (expected.ids, expected.scores)
    assert version == serving.__version__ == PROJECT["version"]
    assert refused.startswith("the torch engine needs torch and a clone of the repository")


def test_the_installed_command_prints_what_the_clones_command_prints(installed, shop):
    arguments = [shop.export("float16"), "--history", "3,17", "--top_k", "4"]
    outputs = [
        subprocess.run([*command, *arguments], env=os.environ | environment, cwd=cwd, capture_output=True, text=True)
        for command, environment, cwd in (
            ([installed / "bin/fmrlrec-recommend"], {"PYTHONPATH": str(installed)}, shop.root),
            ([sys.executable, "-m", "serving.recommend"], {}, REPOSITORY),
        )
    ]
    assert outputs[0].stdout == outputs[1].stdout and len(outputs[0].stdout.splitlines()) == 4


def test_the_installed_server_needs_no_torch(installed, shop):
    code = (
        "import sys\nsys.path.insert(0, sys.argv[1])\n"
        "for name in ('torch', 'serving', 'common', 'config', 'datasets', 'model'): sys.modules[name] = None\n"
        "from fmrlrec import Recommender, http\n"
        "print([route.path for route in http.create_app(Recommender.from_pretrained(sys.argv[2])).routes])"
    )
    command = [sys.executable, "-I", "-c", code, installed, shop.export("float16")]
    done = subprocess.run(command, cwd=shop.root, capture_output=True, text=True, check=False)
    assert "/recommend" in done.stdout, done.stderr


def test_the_packages_requirements_are_those_of_the_clone():
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {line.partition("#")[0].strip() for line in lines}
    extras = PROJECT["optional-dependencies"]
    assert {*PROJECT["dependencies"], *extras["pictures"], *extras["encoders"]} <= required
    development = (REPOSITORY / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    assert set(extras["http"]) <= {line.partition("#")[0].strip() for line in development}
