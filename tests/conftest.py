"""What every test runs under: shapes checked, one thread, no network, the same
examples every time.

The signatures of `attn_notes` are checked by jaxtyping and beartype while the tests
run. A test marked `no_shapes` sees the functions as a user does, unchecked: bad input
must then meet the package's own errors.
"""

import inspect
import json
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

from attn_notes.foundations.checks import Output  # noqa: E402

settings.register_profile(
    "book", max_examples=20, deadline=None, derandomize=True, database=None
)
settings.load_profile("book")


@pytest.fixture(autouse=True)
def shapes(request, monkeypatch):
    """Turn the checking of shapes off for tests marked no_shapes."""
    off = request.node.get_closest_marker("no_shapes") is not None
    jaxtyping.config.update("jaxtyping_disable", off)
    if off:  # torch.compile can not look through the checked making of an output
        for cls in Output.__subclasses__():
            monkeypatch.setattr(cls, "__init__", inspect.unwrap(cls.__init__))
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    import torch

    torch.set_num_threads(1)


# a Marian folder, for those who read its weights, its vocabularies, or both

ENGLISH = [
    "the cat sees the dog",
    "a dog sees a cat",
    "the dogs see",
    "a cat and a dog",
]
GERMAN = ["die Katze sieht den Hund", "ein Hund sieht eine Katze", "die Hunde sehen"]


def write_vocabulary(folder, vocab_size=30):
    """Two small sentencepiece models, and one table of ids as Marian has it: the end
    token first, the padding last."""
    sentencepiece = pytest.importorskip("sentencepiece")
    index = {"</s>": 0, "<unk>": 1}
    for side, texts in (("source", ENGLISH), ("target", GERMAN)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 5),
            model_prefix=str(folder / side),
            vocab_size=20,
            hard_vocab_limit=False,
            bos_id=-1,
            minloglevel=2,
        )
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
        lines = (folder / f"{side}.vocab").read_text("utf-8").splitlines()
        for piece in [line.split("\t")[0] for line in lines][2:]:
            if len(index) < vocab_size - 1:
                index.setdefault(piece, len(index))
    index["<pad>"] = len(index)
    (folder / "vocab.json").write_text(json.dumps(index), encoding="utf-8")
    return len(index)


@pytest.fixture(scope="session")
def marian(tmp_path_factory):
    """Marian of transformers, shaken, and the folder that it writes, with sentencepiece
    models as on the hub."""
    import torch

    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("opus-mt-en-de")
    vocab_size = write_vocabulary(folder)
    config = transformers.MarianConfig(
        vocab_size=vocab_size,
        d_model=12,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        activation_function="swish",
        scale_embedding=True,
        max_position_embeddings=24,
        pad_token_id=vocab_size - 1,
        eos_token_id=0,
        decoder_start_token_id=vocab_size - 1,
        forced_eos_token_id=None,
    )
    torch.manual_seed(19)  # one whose sentences end at different positions
    reference = transformers.MarianMTModel(config).eval()
    for name, parameter in reference.named_parameters():
        if "embed_positions" not in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    reference.final_logits_bias += 0.5 * torch.randn(1, vocab_size)
    reference.final_logits_bias[0, 0] = 1
    reference.save_pretrained(folder)
    return reference.double(), folder
