import pytest

import engines
from tests.bundles import oracle_bundle, tiny_bundle


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Vocabulary 64 (20 ends a sequence), block 4, draft vocabulary 40, confidence head: partial acceptance, a cut that varies."""
    loaded = engines.load(tiny_bundle(tmp_path_factory.mktemp("tiny"), draft_vocab=40, eos=20), threads=1)
    yield loaded
    loaded.close()


@pytest.fixture(scope="session", params=["dspark_vanilla", "dflash"])
def oracle(request, tmp_path_factory):
    """(name of the draft, its exported bundle's folder)."""
    return request.param, oracle_bundle(tmp_path_factory.mktemp(request.param), request.param)
