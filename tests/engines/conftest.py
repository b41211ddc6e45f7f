import pytest

import engines
from tests.bundles import tiny_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def loaded(bundle):
    return engines.load(bundle, threads=1)
