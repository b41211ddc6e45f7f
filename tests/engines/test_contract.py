import pytest

from engines.bundle import Bundle, BundleError
from engines.contract import compare, contract
from engines.specs import TensorSpec
from tests.bundles import tiny_bundle

WANT = {"logits": ("float32", ("M", 64)), "mask": ("mask", ("R", 1, "Q", "C"))}
LOGITS, MASK = TensorSpec("logits", "float32", ("M", 64)), TensorSpec("mask", "float16", ("R", 1, "Q", "C"))


@pytest.mark.parametrize(
    "options", [dict(rank=0, confidence=None), dict(head="gated"), dict(head="rnn", confidence="hidden")]
)
def test_every_head_fits_the_contract(tmp_path, options):
    assert Bundle.load(tiny_bundle(tmp_path, **options)).draft.block_size == 4


def test_what_a_head_does_not_use_is_absent(tmp_path):
    b = Bundle.load(tiny_bundle(tmp_path, rank=0, confidence=None))
    inputs, outputs = contract(b.target, b.draft)["markov"]
    assert "hidden" not in inputs and "anchor_ids" not in inputs and "markov_embeddings" not in outputs


def test_order_and_symbols_do_not_matter():
    compare("here", "input", WANT, (MASK, LOGITS))
    compare("here", "input", WANT, (TensorSpec("logits", "float32", (5, 64)), MASK))


@pytest.mark.parametrize(
    "message, have",
    {
        "here lacks the input 'mask'": (LOGITS,),
        "here has an unknown input 'more'": (LOGITS, MASK, TensorSpec("more", "int64", ())),
        "input 'logits' is ['M', 65], expected ['M', 64]": (TensorSpec("logits", "float32", ("M", 65)), MASK),
        "input 'logits' is ['M'], expected": (TensorSpec("logits", "float32", ("M",)), MASK),
        "input 'logits' is float16, expected float32": (TensorSpec("logits", "float16", ("M", 64)), MASK),
        "input 'mask' is int64, expected mask": (LOGITS, TensorSpec("mask", "int64", ("R", 1, "Q", "C"))),
    }.items(),
)
def test_what_differs_is_named(message, have):
    with pytest.raises(BundleError) as error:
        compare("here", "input", WANT, have)
    assert message in str(error.value)
