"""What the tests of a Recommender are given."""

import pytest

from serving import Recommender
from tests.recommender.shop import ENGINES, KINDS, Shop


@pytest.fixture(scope="session")
def shop(tmp_path_factory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(params=ENGINES)
def engine(request) -> str:
    return request.param


@pytest.fixture
def r(shop, engine) -> Recommender:
    """The export in float32, opened anew."""
    return shop.open(engine)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param
