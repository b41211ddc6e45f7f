import pytest

import engines
from tests.bundles import tiny_bundle
from tests.losslessness import table


@pytest.fixture(scope="session")
def flat_graphs(tmp_path_factory):
    """Markov and verify graphs of a table without bigrams, draft vocabulary = target vocabulary."""
    return table.graphs(tmp_path_factory.mktemp("flat"))


@pytest.fixture(scope="session")
def jagged(tmp_path_factory):
    """TableEngines of a random table with bigrams and a trimmed draft vocabulary of 5 of the 8 tokens."""
    bigrams = table.mean_bigrams(3, table.DRAFT_TO_TARGET)
    graphs = table.graphs(tmp_path_factory.mktemp("jagged"), draft_vocab=len(table.DRAFT_TO_TARGET), bigrams=bigrams)
    return table.TableEngines(graphs, table.jagged_table(4, bigrams, table.DRAFT_TO_TARGET))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A real bundle: vocabulary 64 (20 ends a sequence), block 4, draft vocabulary 40, confidence head."""
    loaded = engines.load(tiny_bundle(tmp_path_factory.mktemp("tiny"), draft_vocab=40, eos=20), threads=1)
    yield loaded
    loaded.close()
