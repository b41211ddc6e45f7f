import numpy as np
import pytest

from engines.pack import pack_backbone, pack_target


def test_target_layout():
    batch, starts, logit_starts = pack_target(
        [[10, 11, 12], [], [20]], np.array([4, 9, 0]), np.array([2, 0, 1]), capacity=16, max_context=100, first_row=5
    )
    assert batch.token_ids.tolist() == [10, 11, 12, 20] and batch.first_row == 5
    assert batch.pad_index.tolist() == [[0, 1, 2], [0, 0, 0], [3, 0, 0]]
    assert batch.pack_index.tolist() == [0, 1, 2, 6]
    assert batch.position_ids.tolist() == [[4, 5, 6], [9, 10, 11], [0, 1, 2]]
    assert batch.write_index.tolist() == [4, 9, 0]
    assert batch.logit_rows.tolist() == [1, 2, 3]
    assert starts.tolist() == [0, 3, 3] and logit_starts.tolist() == [0, 2, 2]
    assert batch.mask.shape == (3, 1, 3, 16) and batch.mask.dtype == bool
    assert batch.mask.sum(-1)[:, 0].tolist() == [[5, 6, 7], [10, 11, 12], [1, 2, 3]]
    assert batch.mask[0, 0, 0, :5].all()


def test_positions_of_empty_slots_stay_inside_the_rotary_tables():
    batch, _, _ = pack_target([[1], [2] * 4], np.array([18, 3]), np.array([1, 1]), capacity=32, max_context=20)
    assert batch.position_ids.tolist() == [[18, 19, 19, 19], [3, 4, 5, 6]]


def test_backbone_layout():
    features = [[np.full((2, 3), 1.0), np.full((1, 3), 2.0)], [], [np.full((1, 3), 3.0)]]
    batch = pack_backbone(features, np.array([3, 0, 1]), np.array([4, 0, 7]), np.array([9, 0, 8]), 2, 12, 100)
    assert batch.features[:, 0].tolist() == [1, 1, 2, 3]  # F = 4; block rows follow: 4, 5 | 6, 7 | 8, 9
    assert batch.pad_index.tolist() == [[0, 1, 2, 4, 5], [6, 7, 0, 0, 0], [3, 8, 9, 0, 0]]
    assert batch.position_ids.tolist() == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4], [7, 8, 9, 10, 11]]
    assert batch.block_position_ids.tolist() == [[7, 8], [0, 1], [8, 9]]
    assert batch.mask.shape == (3, 1, 2, 12)
    assert batch.mask.sum(-1)[:, 0].tolist() == [[9, 9], [2, 2], [10, 10]]


def test_a_token_each_is_packed_as_any_ragged_batch_is():
    """The short way for one token and one row of logits a request gives what the long way gives beside a longer one."""
    lengths = np.array([4, 99, 0])
    short, starts, logits = pack_target([[7], [8], [9]], lengths, np.array([1, 1, 1]), 128, 100, first_row=2)
    long, long_starts, long_logits = pack_target([[7], [8], [9], [1, 2]], np.append(lengths, 5), np.array([1, 1, 1, 2]), 128, 100)
    assert short.token_ids.tolist() == long.token_ids[:3].tolist() and short.first_row == 2
    assert starts.tolist() == long_starts[:3].tolist() and logits.tolist() == long_logits[:3].tolist()
    for name in ("pad_index", "position_ids"):
        np.testing.assert_array_equal(getattr(short, name), getattr(long, name)[:3, :1])
    np.testing.assert_array_equal(short.mask, long.mask[:3, :, :1])
    np.testing.assert_array_equal(short.write_index, lengths)
    assert short.pack_index.tolist() == short.logit_rows.tolist() == [0, 1, 2]
    for array in (short.token_ids, short.pad_index, short.pack_index, short.position_ids, short.logit_rows):
        assert array.dtype == np.int64


def test_a_prompt_of_one_token_without_logits_takes_the_long_way():
    batch, _, logit_starts = pack_target([[7], [8]], np.array([0, 3]), np.array([0, 1]), 16, 100)
    assert batch.logit_rows.tolist() == [1] and logit_starts.tolist() == [0, 0]


@pytest.mark.parametrize("tokens, wanted, length", [([5, 6, 7], 3, 4), ([5, 6, 7], 1, 4), ([5, 6, 7], 0, 0), ([5], 0, 9), (list(range(9)), 9, 57)])
def test_a_lone_request_is_packed_as_any_ragged_batch_is(tokens, wanted, length):
    """The first of two of the same length, without the other's rows."""
    numbers = lambda *values: np.array(values, np.int64)
    lone, starts, logit_starts = pack_target([tokens], numbers(length), numbers(wanted), 64, 60, 2)
    both, _, _ = pack_target([tokens, tokens], numbers(length, length), numbers(wanted, wanted), 64, 60, 2)
    n = len(tokens)
    assert starts.tolist() == logit_starts.tolist() == [0] and lone.first_row == 2
    np.testing.assert_array_equal(lone.token_ids, both.token_ids[:n])
    np.testing.assert_array_equal(lone.pack_index, both.pack_index[:n])
    np.testing.assert_array_equal(lone.logit_rows, both.logit_rows[:wanted])
    for name in ("pad_index", "position_ids", "write_index", "mask"):
        np.testing.assert_array_equal(getattr(lone, name), getattr(both, name)[:1], err_msg=name)
        assert getattr(lone, name).dtype == getattr(both, name).dtype


@pytest.mark.parametrize("count, length", [(0, 3), (1, 0), (4, 20), (5, 56)])
def test_a_lone_block_is_packed_as_one_of_many(count, length):
    numbers, B = lambda *values: np.array(values, np.int64), 4
    rows = np.arange(3 * count, dtype=np.float32).reshape(count, 3)
    lone = pack_backbone([[rows]], numbers(count), numbers(length), numbers(7), B, 64, 60, 1)
    both = pack_backbone([[rows], [rows]], numbers(count, count), numbers(length, length), numbers(7, 7), B, 64, 60, 1)
    np.testing.assert_array_equal(lone.features, rows)
    for name in ("anchor_ids", "position_ids", "block_position_ids", "write_index", "mask"):
        np.testing.assert_array_equal(getattr(lone, name), getattr(both, name)[:1], err_msg=name)
    context, block = both.pad_index[0, :count], both.pad_index[0, count:] - count  # the other's context lies between
    np.testing.assert_array_equal(lone.pad_index[0], [*context, *block])
    assert lone.first_row == both.first_row == 1
