"""How a head begins: the layers it looks at."""

from training.initialisation import default_layer_ids


def test_default_layer_ids():
    assert default_layer_ids(30) == (1, 8, 14, 21, 28)
    assert default_layer_ids(3) == (1,) and default_layer_ids(2) == (0,) and default_layer_ids(1) == (-1,)
