"""The top of the package: what is there, and what importing it costs."""

import subprocess
import sys

import attn_notes as an

HEAVY = (
    "accelerate",
    "huggingface_hub",
    "babel",
    "datasets",
    "matplotlib",
    "transformers",
    "attn_notes.sequence",
    "attn_notes.training",
    "attn_notes.data",
)


def test_the_names_that_are_promised():
    assert set(an.__all__) == {
        "list_models",
        "model_info",
        "create_model",
        "example_inputs",
        "record_attention",
        "ConfigError",
        "InputError",
        "CheckpointError",
        "CheckpointWarning",
    }
    assert all(
        issubclass(error, ValueError)
        for error in (an.ConfigError, an.InputError, an.CheckpointError)
    )
    assert (
        issubclass(an.CheckpointWarning, UserWarning) and an.__version__.count(".") == 2
    )


def test_importing_adds_at_most_half_a_second_to_torch():
    program = (
        "import sys, time, torch; start = time.process_time(); import attn_notes; "
        "print(time.process_time() - start); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    seconds, heavy = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert heavy == "[]"
    assert float(seconds) < 0.5


def test_the_models_of_the_book_are_there():
    assert {
        "seq2seq_lstm",
        "seq2seq_gru",
        "seq2seq_bahdanau",
        "seq2seq_luong",
        "convs2s",
    } <= set(an.list_models())
