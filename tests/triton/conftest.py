import pytest

from tests.triton.support import SHARED, Alone


@pytest.fixture(scope="session")
def bundle():
    yield SHARED.acquire().bundle
    SHARED.release()


@pytest.fixture(scope="session")
def alone(bundle):
    reference = Alone(bundle)
    yield reference
    reference.engines.close()


@pytest.fixture(scope="session")
def server(bundle):
    return SHARED.serve()
