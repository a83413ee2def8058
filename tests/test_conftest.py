"""The tests' own ground: shapes are checked, except where a test asks to see what a
user sees."""

import jaxtyping
import pytest
import torch

from attn_notes.foundations.attention import attention_weights

q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5)


def test_shapes_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        attention_weights(q, k)


@pytest.mark.no_shapes
def test_shapes_are_not_checked_where_marked():
    with pytest.raises(RuntimeError):
        attention_weights(q, k)
    assert attention_weights(q[0, 0], q[0, 0]).shape == (3, 3)


def test_shapes_are_checked_again_afterwards():
    test_shapes_are_checked()


def test_one_thread():
    assert torch.get_num_threads() == 1
