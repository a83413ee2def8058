"""What every test runs under: shapes checked, one thread, no network, the same
examples every time.

The signatures of `attn_notes` are checked by jaxtyping and beartype while the tests
run. A test marked `no_shapes` sees the functions as a user does, unchecked: bad input
must then meet the package's own errors.
"""

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

import jaxtyping
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook(
    "attn_notes", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)  # an int is a float

settings.register_profile(
    "book", max_examples=20, deadline=None, derandomize=True, database=None
)
settings.load_profile("book")


@pytest.fixture(autouse=True)
def shapes(request):
    """Turn the checking of shapes off for tests marked no_shapes."""
    jaxtyping.config.update(
        "jaxtyping_disable", request.node.get_closest_marker("no_shapes") is not None
    )
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    import torch

    torch.set_num_threads(1)
