"""attn-notes as a reader meets it: exit codes, one clear line, nothing half written."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

import attn_notes as an
from attn_notes.cli import main
from attn_notes.data.brain import hard_brain
from attn_notes.data.image_sets import image_set
from attn_notes.data.scenes import scenes
from attn_notes.zoo.registry import weights_folder

ROOT = Path(__file__).parents[1]

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
COMMAND = [
    sys.executable,
    "-c",
    "import sys; from attn_notes.cli import main; sys.exit(main())",
]


def feed(monkeypatch, content: bytes) -> None:
    """Put bytes on the standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def run(*argv):
    """Exit code; argparse leaves by SystemExit."""
    try:
        return main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def refused(capsys):
    """The one line of complaint about a command that is refused with exit code 2."""

    def ask(*argv):
        assert run(*argv) == 2
        seen = capsys.readouterr()
        assert (
            seen.out == ""
            and seen.err.startswith("attn-notes: ")
            and seen.err.count("\n") == 1
        )
        return seen.err

    return ask


# looking up


def test_list_shows_every_model_with_its_size(capsys):
    assert run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == an.list_models()
    assert all(
        f"{an.model_info(line.split()[0]).parameters:,}" in line for line in lines
    )
    assert run("list", "seq2seq_l*") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "seq2seq_lstm",
        "seq2seq_luong",
    ]


def test_info_is_the_registered_record(capsys):
    assert run("info", "seq2seq_gru") == 0
    assert capsys.readouterr().out == f"{an.model_info('seq2seq_gru')}\n"


@pytest.mark.parametrize(
    "command", [[], ["list"], ["info"], ["check"], ["train"], ["predict"], ["bench"]]
)
def test_help_explains_with_examples(command, capsys):
    assert run(*command, "--help") == 0
    said = capsys.readouterr().out
    assert (
        "usage: attn-notes" in said
        and ("attn-notes " + (command or ["COMMAND"])[0]) in said.split("usage:")[1]
    )
    assert not command or "example" in said


def test_version(capsys):
    assert run("--version") == 0 and an.__version__ in capsys.readouterr().out


# checking and measuring


def test_check_runs_a_model_on_the_stand_in_and_on_the_cpu(capsys):
    assert run("check", "seq2seq_gru", "--device", "fake") == 0
    assert capsys.readouterr().out.startswith(
        "ok      seq2seq_gru  24,230,000 parameters on fake"
    )
    assert run("check", "seq2seq_gru", "--device", "cpu") == 0


def test_a_model_that_fails_its_check_is_named(monkeypatch, capsys):
    from attn_notes.zoo import devices

    def fails(name, device):
        raise RuntimeError("two devices\nand a long story")

    monkeypatch.setattr(devices, "check_model", fails)
    assert run("check", "seq2seq_gru") == 1
    assert capsys.readouterr().out == "FAILED  seq2seq_gru  two devices\n"


@pytest.mark.parametrize("ratio, code", [(0.9, 0), (1.3, 1)])
def test_bench_prints_the_ratio_and_fails_when_ours_is_slower(
    monkeypatch, capsys, ratio, code
):
    from attn_notes.zoo import benchmark
    from attn_notes.zoo.benchmark import Benchmark, TimingRatio

    time = TimingRatio(ratio, ratio, ratio, 1.0, 1.0)
    monkeypatch.setattr(
        benchmark, "run_pair", lambda title: Benchmark(title, time, 1, 1, 0.5, 0.5)
    )
    assert run("bench", "multihead") == code
    assert f"time x{ratio:.2f}" in capsys.readouterr().out


# wrong questions


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "argv, said",
    [
        (["info", "seq2sec_lstm"], "did you mean 'seq2seq_lstm'"),
        (["list", "nothing*"], "unknown model 'nothing*'"),
        (["check", "seq2seq_lstn", "--device", "fake"], "did you mean 'seq2seq_lstm'"),
        (["check", "seq2seq_gru", "--device", "nonsense"], "got 'nonsense'"),
        (["bench", "nonsense"], "unknown benchmark"),
        (
            ["predict", "seq2seq_gru", "--pretrained", "nowhere", "a"],
            "no checkpoint file or folder at nowhere",
        ),
        (
            ["predict", "seq2seq_gru", "--num-beams", "0", "a"],
            "whole number of at least 1",
        ),
        (["predict", "seq2seq_gru"], "required: INPUT"),
        (["train", "seq2seq_gru"], "required: --output"),
        (["dance"], "invalid choice: 'dance'"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_questions(refused, argv, said):
    assert said in refused(*argv)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "more, said",
    [
        (["--data", "cldr-en-fx"], "did you mean 'cldr-en-fr'"),
        (["--data", "wmt14-en-de"], "wmt14-en-de needs a folder"),
        (["--task", "painting"], "unknown kind of task 'painting'"),
        (["--data", "wmt14-en-de", "--data-dir", "nowhere"], "nowhere"),
        (["--recipe", "huge"], "invalid choice: 'huge'"),
        (["--max-steps", "0"], "whole number of at least 1"),
        (["--seed", "-1"], "seed"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_training_is_refused_before_anything_is_written(refused, tmp_path, more, said):
    assert said in refused("train", "seq2seq_gru", "--output", tmp_path / "run", *more)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.no_shapes
def test_an_output_folder_that_is_taken_or_can_not_be_written(refused, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("do not lose")
    assert "is not empty; --resume continues" in refused(
        "train", "seq2seq_gru", "--output", tmp_path / "taken"
    )
    assert "can not be written" in refused(
        "train", "seq2seq_gru", "--output", tmp_path / "taken" / "thesis.txt" / "run"
    )
    assert "can not be written" in refused(
        "train", "seq2seq_gru", "--output", "/proc/run"
    )
    assert [p.read_text() for p in (tmp_path / "taken").iterdir()] == ["do not lose"]


@pytest.mark.no_shapes
def test_a_data_folder_that_is_half_there(refused, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.en").write_text("a\nb\n")
    said = refused(
        "train",
        "seq2seq_gru",
        "--data",
        "wmt14-en-de",
        "--data-dir",
        tmp_path / "data",
        "--output",
        tmp_path / "run",
    )
    assert "data" in said and not (tmp_path / "run").exists()


@pytest.mark.no_shapes
def test_checkpoints_that_can_not_predict(refused, tmp_path):
    model = an.create_model("seq2seq_gru", **an.model_info("seq2seq_gru").tiny)
    model.save_pretrained(tmp_path / "model")
    assert "task.json" in refused(
        "predict", "seq2seq_gru", "--pretrained", tmp_path / "model", "a"
    )
    assert "single file" in refused(
        "predict",
        "seq2seq_gru",
        "--pretrained",
        tmp_path / "model" / "model.safetensors",
        "a",
    )
    unshipped = [
        name
        for name in an.list_models()
        if not an.zoo.registry.weights_folder(name).is_dir()
    ]
    for name in unshipped[:1]:
        assert "ships no weights" in refused("predict", name, "a")


def test_ctrl_c_before_training_gives_130_and_a_line(monkeypatch, capsys, tmp_path):
    from attn_notes.data import tasks

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "create_task", interrupted)
    assert run("train", "seq2seq_gru", "--output", tmp_path / "run") == 130
    assert (
        capsys.readouterr().err == "attn-notes: interrupted\n"
        and list(tmp_path.iterdir()) == []
    )


@pytest.mark.slow
def test_a_reader_who_has_seen_enough_ends_it_quietly():
    process = subprocess.run(
        f'{sys.executable} -c "{COMMAND[2]}" list | head -1',
        shell=True,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout.split()[0] == an.list_models()[0] and process.stderr == ""


# from phrases to a translation


def start(*argv):
    return subprocess.Popen(
        [*COMMAND, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_train_interrupt_resume_predict(tmp_path, capsys):
    train = [
        "train",
        "seq2seq_gru",
        "--data",
        "dates-iso",
        "--max-steps",
        60,
        "--seed",
        3,
        "--output",
    ]
    process = start(*train, tmp_path / "broken")
    deadline = time.monotonic() + 200
    rows = tmp_path / "broken" / "metrics.jsonl"
    while (
        not (rows.exists() and rows.read_text().count("\n") >= 3)  # steps into the run
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == (
        f"attn-notes: interrupted; --resume continues the run in {tmp_path / 'broken'}"
    )
    assert (
        "Traceback" not in said
        and not (tmp_path / "broken" / "model.safetensors").exists()
    )
    reached = steps(tmp_path / "broken")
    assert 0 < reached < 60

    assert run(*train, tmp_path / "broken", "--resume") == 0
    assert run(*train, tmp_path / "whole") == 0
    saved = [
        (tmp_path / run / "model.safetensors").read_bytes()
        for run in ("broken", "whole")
    ]
    assert saved[0] == saved[1]  # the break changed nothing
    assert steps(tmp_path / "broken") == steps(tmp_path / "whole") == 60
    assert (
        json.loads((tmp_path / "broken" / "config.json").read_text())["architecture"]
        == "seq2seq_gru"
    )

    capsys.readouterr()
    assert (
        run(
            "predict",
            "seq2seq_gru",
            "--pretrained",
            tmp_path / "broken",
            "--num-beams",
            2,
            "3 May 2020",
            "4 June 1999",
        )
        == 0
    )
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.fixture
def wmt14(tmp_path):
    """A few sentences as the set wmt/wmt14 lies on the hub."""
    import pyarrow
    import pyarrow.parquet as parquet

    rows = [
        {"en": f"{n} of the {house}s, please.", "de": f"{n} der {haus}, bitte!"}
        for n in range(1, 13)
        for house, haus in (("house", "Häuser"), ("street", "Straßen"))
    ]
    kind = pyarrow.struct([("de", pyarrow.string()), ("en", pyarrow.string())])
    (tmp_path / "wmt" / "de-en").mkdir(parents=True)
    for split, part in (("train", rows), ("validation", rows[:3]), ("test", rows[3:6])):
        parquet.write_table(
            pyarrow.table({"translation": pyarrow.array(part, kind)}),
            tmp_path / "wmt" / "de-en" / f"{split}-00000-of-00001.parquet",
        )
    return tmp_path / "wmt"


@pytest.mark.parametrize("name", ["transformer_tiny", "seq2seq_gru"])
def test_wmt14_from_its_files_to_a_translation(wmt14, tmp_path, capsys, name):
    train = [
        "train",
        name,
        "--data",
        "wmt14-en-de",
        "--data-dir",
        wmt14,
        "--max-steps",
        3,
        "--output",
        tmp_path / "run",
    ]
    assert run(*train) == 0
    stored = json.loads((tmp_path / "run" / "task.json").read_text())
    shared = name.startswith("transformer")
    assert (
        stored["shared_vocabulary"] is shared
        and ("merges" in stored["source"]) is shared
        and (stored["source"]["tokens"] == stored["target"]["tokens"]) is shared
    )
    capsys.readouterr()
    assert (
        run("predict", name, "--pretrained", tmp_path / "run", "2 of the streets") == 0
    )
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 and said.err == ""


@pytest.mark.slow
def test_sentences_beyond_the_positions_are_left_out(monkeypatch, tmp_path, capsys):
    from attn_notes.data import translation_task
    from attn_notes.data.phrases import TranslationPair

    long = [
        TranslationPair("word " * 200, "Wort " * 200),
        TranslationPair("word", "Wort " * 128),
    ]
    read_pairs = translation_task.read_pairs
    monkeypatch.setattr(
        translation_task,
        "read_pairs",
        lambda split, **data: (
            read_pairs(split, **data)[:40] + long * (split == "train")
        ),
    )
    assert (
        run("train", "transformer_tiny", "--max-steps", 2, "--output", tmp_path / "run")
        == 0
    )
    assert (
        "warning: 2 of 42 training pairs have more than 128 tokens, and are left out"
        in capsys.readouterr().err
    )
    assert (
        json.loads((tmp_path / "run" / "task.json").read_text())["max_new_tokens"] < 128
    )


def test_fewer_steps_keep_the_recipe_in_proportion(monkeypatch):
    from argparse import Namespace

    from attn_notes.commands import train
    from attn_notes.training.recipes import Recipe
    from attn_notes.zoo import registry

    recipe = Recipe(
        schedule="cosine",
        warmup_steps=4000,
        max_steps=100_000,
        average_last=5,
        average_every=1500,
    )
    monkeypatch.setattr(
        registry, "model_info", lambda name: Namespace(recipes={"paper": recipe})
    )
    short = {
        steps: train._recipe(
            Namespace(
                name="any",
                recipe="paper",
                max_steps=steps,
                seed=None,
                save_every=None,
            )
        )
        for steps in (None, 1000, 50, 3, 1)
    }
    assert short[None] == recipe
    assert {
        steps: (r.warmup_steps, r.average_last, r.average_every)
        for steps, r in short.items()
        if steps
    } == {1000: (40, 5, 15), 50: (2, 5, 1), 3: (0, 3, 1), 1: (0, 1, 1)}


def test_predict_uses_the_shipped_weights_and_reads_lines(monkeypatch, capsys):
    feed(monkeypatch, b"France\nin 3 weeks\n")
    assert run("predict", "seq2seq_bahdanau", "France", "-") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0] == lines[1] and "3" in lines[2]


def test_list_imports_no_chapter():
    code = (
        "import sys; from attn_notes.cli import main; main(['list']);"
        "print(sorted(m for m in sys.modules if m.startswith('attn_notes.sequence')))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert said.stdout.splitlines()[-1] == "[]", said.stderr


class Reverse:
    """A task that is no translation: what the command line may know of one."""

    kind = "reverse"

    def predict(self, model, inputs, **options):
        for i, text in enumerate(inputs):
            if not text.isalpha():
                from attn_notes.foundations.checks import InputError

                raise InputError(f"inputs: expected letters; got {text!r} at {i}")
        self.calls.append((list(inputs), options))
        return [{"text": text[::-1]} for text in inputs]


@pytest.fixture
def reverse(monkeypatch):
    """`predict` with that task, and what the task was asked."""
    from attn_notes.commands import predict

    task = Reverse()
    task.calls = []
    monkeypatch.setattr(predict, "find_task", lambda arguments: (task, None))
    monkeypatch.setattr(predict, "load_model", lambda name, folder: None)
    return task


def test_a_bad_line_costs_that_line(reverse, monkeypatch, capsys):
    lines = ["ab", "cd", "3", "ef", "gh", "ij", "kl", "", "mn"]
    feed(monkeypatch, "\n".join(lines).encode() + b"\n")
    assert run("predict", "any", "xy", "-") == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f'{{"text": "{line[::-1]}"}}' if line.isalpha() else ""
        for line in ["xy", *lines]
    ]
    complaints = said.err.splitlines()
    assert [line.split(": ")[1] for line in complaints] == ["line 3", "line 8"]
    assert "got '3'" in complaints[0]
    asked = [text for some, _ in reverse.calls for text in some]
    assert asked == [line for line in ["xy", *lines] if line.isalpha()]
    assert len(reverse.calls) < len(asked)  # the good ones still go together


def test_no_control_character_reaches_the_terminal(reverse, capsys, tmp_path):
    reverse.predict = lambda model, inputs: [text[::-1] for text in inputs]
    odd = "a\x1b[2Jb\rc\x85d\u2028e\u202ef\ud800g\nh"
    assert run("predict", "any", odd) == 0
    escapes = r"h g\ud800f\u202ee\u2028d\x85c\rbJ2[\x1ba"
    assert capsys.readouterr().out == f"{escapes}\n"
    assert run("predict", "any", "--output", tmp_path / "answers", odd) == 0
    assert (tmp_path / "answers").read_text("utf-8") == f"{escapes}\n"
    kept = "caf\u00e9\u00a0!\t\u4e2d\U0001f468\u200d\U0001f469 \u0627"
    assert run("predict", "any", kept[::-1]) == 0
    assert capsys.readouterr().out == f"{kept}\n"


def test_a_sign_of_the_parser_is_no_input(reverse, refused):
    assert "INPUT: expected a text" in refused("predict", "any", "--", "--")


def test_inputs_that_are_all_bad(reverse, capsys):
    assert run("predict", "any", "1", "2") == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 2
    assert "input 2" in said.err and not reverse.calls


def test_no_lines_no_answers(reverse, monkeypatch, capsys):
    feed(monkeypatch, b"")
    assert run("predict", "any", "-") == 0 and capsys.readouterr().out == ""


def test_options_reach_the_task_only_when_given(reverse):
    run("predict", "any", "ab")
    run("predict", "any", "--num-beams", 3, "ab")
    assert [options for _, options in reverse.calls] == [{}, {"num_beams": 3}]


@pytest.mark.no_shapes
def test_weights_that_leave_a_part_untrained_do_not_predict(refused, monkeypatch):
    import warnings

    from attn_notes.foundations.checks import CheckpointWarning
    from attn_notes.zoo import factory

    def untrained(*args, **kwargs):
        said = "x: re-initialized, of another size: head"
        warnings.warn(said, CheckpointWarning, stacklevel=1)

    monkeypatch.setattr(factory, "create_model", untrained)
    assert "re-initialized" in refused("predict", "seq2seq_bahdanau", "a")


@pytest.fixture
def painting(monkeypatch):
    """A kind of task that the package does not have, with a data set of its own."""
    from attn_notes.data import tasks

    monkeypatch.setattr(tasks, "KINDS", dict(tasks.KINDS))
    monkeypatch.setattr(tasks, "_CLASSES", dict(tasks._CLASSES))
    made = []

    @tasks.register_task("painting", data=("louvre", "cldr-en-fr"))
    class Painting:
        @classmethod
        def create(cls, data_name, data_dir=None, seed=0):
            made.append((data_name, data_dir, seed))
            raise KeyboardInterrupt  # seen enough

    return made


@pytest.mark.no_shapes
def test_the_data_set_implies_the_task(painting, refused, capsys, tmp_path):
    train = ["train", "seq2seq_gru", "--output", tmp_path / "run", "--seed", 3]
    said = refused(*train, "--data", "louvre")
    assert "--data: louvre is for painting, seq2seq_gru is for translation" in said
    assert run(*train, "--data", "louvre", "--task", "painting") == 130
    assert run(*train, "--task", "painting", "--data-dir", "here") == 130
    assert painting == [("louvre", None, 3), ("louvre", "here", 3)]
    # a set that serves both kinds goes to the model's own
    from attn_notes.data.tasks import kind_of_data

    assert kind_of_data("cldr-en-fr", "translation") == "translation"
    assert not (tmp_path / "run").exists()


# lines and answers


def test_lines_of_the_standard_input_end_at_newlines_alone(
    reverse, monkeypatch, capsys
):
    feed(monkeypatch, b"\xef\xbb\xbfab\r\nc\xe9\ncd\n\xff\xfe\n")
    assert run("predict", "any", "xy", "-") == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        '{"text": "yx"}',
        '{"text": "ba"}',
        "",
        *(['{"text": "dc"}', ""]),
    ]
    assert [line.split(": ", 3)[2] for line in said.err.splitlines()] == [
        "line 2",
        "line 4",
    ]
    # nothing that Python takes for the end of a line ends one
    feed(monkeypatch, "a\u2028b\x85c\x0bd\x0ce\rf\n".encode())
    assert run("predict", "any", "-", "ok") == 1
    assert capsys.readouterr().err.count("line") == 1


@pytest.mark.no_shapes
def test_utf_16_is_refused_in_one_line(reverse, refused, monkeypatch):
    feed(monkeypatch, "ab\ncd\n".encode("utf-16"))
    said = refused("predict", "any", "-")
    assert said == "attn-notes: standard input: expected UTF-8; got UTF-16\n"


def test_what_is_not_understood_is_said_of_its_line(monkeypatch, capsys):
    feed(monkeypatch, ("3 weeks ago\n" * 3 + "xyzzy\n\n" + "in 5 days\n").encode())
    long = "1 " * 129
    assert run("predict", "transformer_tiny", "-", long, "plugh 3") == 1
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 8 and [i for i, x in enumerate(lines) if not x] == [4, 6]
    assert sorted(said.err.splitlines()) == [
        "attn-notes: input 2: expected at most 128 tokens; got 129",
        "attn-notes: line 5: expected a text of a token or more; got ''",
        "attn-notes: warning: input 3: not in the vocabulary, so read as <unk>: plugh",
        "attn-notes: warning: line 4: not in the vocabulary, so read as <unk>: xyzzy",
    ]


def test_answers_go_to_a_file_whole_or_not_at_all(reverse, tmp_path, capsys):
    path = tmp_path / "answers.txt"
    assert run("predict", "any", "--output", path, "a\xe9", "3", "bc") == 1
    assert path.read_bytes() == (
        b'{"text": "\\u00e9a"}\n' + b"\n" + b'{"text": "cb"}\n'
    )
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == [path]
    assert run("predict", "any", "--output", path, "4") == 2
    assert path.read_bytes().count(b"\n") == 3
    (tmp_path / "link").symlink_to(path)
    assert run("predict", "any", "--output", tmp_path / "link", "de") == 0
    assert (tmp_path / "link").is_symlink()
    assert path.read_text() == '{"text": "ed"}\n'
    assert run("predict", "any", "--output", os.devnull, "de") == 0
    assert not Path(os.devnull).is_file()


def test_a_task_may_write_its_answers_itself(reverse, tmp_path):
    written = []
    reverse.write_answers = lambda answers, path: written.append((answers, path))
    assert run("predict", "any", "--output", tmp_path / "pictures", "ab") == 0
    assert written == [([{"text": "ba"}], tmp_path / "pictures")]


@pytest.mark.no_shapes
@pytest.mark.parametrize("path", ["", ".", "nowhere/answers", "~nosuchuser/x"])
def test_a_file_that_can_not_be_written(reverse, refused, path):
    assert "expected a file" in refused("predict", "any", "--output", path, "ab")
    assert not reverse.calls


def test_a_marian_folder_translates(marian, capsys):
    predict = ["predict", "transformer_base", "--pretrained", marian[1]]
    assert run(*predict, "the cat sees the dog", "a dog", "--num-beams", 2) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


# whatever happens


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "argv, said",
    [
        (["bench", ""], "expected a name of 1 to 200 characters; got ''"),
        (["check", " "], "expected a name"),
        (["list", "[" * 200_000], "expected a name"),
        (["info", "x" * 200_000], "expected a name"),
        (
            ["predict", "transformer_tiny", "--pretrained", "~nosuchuser/x", "a"],
            "~nosuchuser",
        ),
        (["predict", "transformer_tiny", "--num-beams", "9" * 99, "a"], "nine digits"),
        (["predict", "transformer_tiny", "--num-beams", "\u00b2", "a"], "whole number"),
        (["train", "seq2seq_gru", "--output", "~nosuchuser/x"], "~nosuchuser"),
        (["train", "seq2seq_gru", "--output", "x", "--seed", "9" * 20], "18 digits"),
        (["predict", "transformer_tiny", "--pretrained", "", "a"], "got ''"),
        (["dance\nfloor"], "invalid choice"),
        (["list", "--a\nb\x1b[31m"], "unrecognized arguments: --a b\\x1b[31m"),
        (["list", "a", "b" * 200_000], "unrecognized arguments"),
    ],
)
def test_odd_questions_get_one_short_line(refused, argv, said):
    line = refused(*argv)
    assert said in line and len(line) < 1100 and "\x1b" not in line


@pytest.mark.no_shapes
@pytest.mark.parametrize("name", ["config.json", "task.json"])
@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000, "\x00", ""])
def test_nested_json(refused, tmp_path, name, content):
    folder = shutil.copytree(weights_folder("transformer_tiny"), tmp_path / "model")
    (folder / name).write_text(content)
    said = refused("predict", "transformer_tiny", "--pretrained", folder, "a")
    assert name in said


def test_the_unexpected_is_one_line_and_code_1(reverse, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise KeyError("a long\nstory" + "!" * 9999)

    monkeypatch.setattr(reverse, "predict", fails)
    monkeypatch.delenv("ATTN_NOTES_TRACEBACK", raising=False)
    assert run("predict", "any", "ab") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < 600
    assert "unexpected KeyError: " in said and "ATTN_NOTES_TRACEBACK=1" in said
    monkeypatch.setenv("ATTN_NOTES_TRACEBACK", "1")
    assert run("predict", "any", "ab") == 1
    assert "Traceback" in (said := capsys.readouterr().err) and "in fails" in said


def shell(command, **environment):
    """Run a line of shell in which $A is attn-notes; code, output, complaints."""
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        env={**ENVIRONMENT, "A": f"{sys.executable} -m attn_notes.cli", **environment},
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize(
    "command, code, said",
    [
        ("$A predict transformer_tiny - <&-", 2, "standard input; it is closed"),
        ("$A --help >&-", 2, "expected an open standard output; it is closed"),
        ("$A dance 2>&-", 2, None),
        ("$A --help > /dev/full", 2, "No space left on device"),
        ("$A --help | true; exit ${PIPESTATUS[0]}", 0, None),
        ("$A --help > /dev/null 2>&-", 0, None),
    ],
)
def test_closed_and_full_streams(command, code, said):
    found = shell(command)
    assert found[0] == code and "Traceback" not in found[2]
    assert found[2].count("\n") == (said is not None) and (said or "") in found[2]


@pytest.mark.slow
def test_an_ascii_terminal_gets_an_answer():
    command = '$A predict transformer_tiny "12 kilometers"'
    for environment in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}):
        code, out, err = shell(command, **environment)
        assert (code, err) == (0, "") and out.startswith(b"12 kilom")
    code, out, _ = shell(command, PYTHONIOENCODING="ascii", PYTHONCOERCECLOCALE="0")
    assert out == b"12 kilom\\xe8tres\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from attn_notes.cli import main; main(['train', '--help']);"
        "main(['dance']); print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.2, 0.6, 1.2])
def test_ctrl_c_while_it_imports_is_quiet(seconds):
    command = [sys.executable, "-m", "attn_notes.cli", "info", "transformer_tiny"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert b"Traceback" not in said and process.returncode in (0, 130, -signal.SIGINT)
    assert said in (b"", b"attn-notes: interrupted\n")


# examples

EXAMPLE = re.compile(r"^ *(attn-notes (?:.*\\\n)*.*)$", re.MULTILINE)


def examples(text):
    return [found.replace("\\\n", " ") for found in EXAMPLE.findall(text)]


@pytest.fixture(scope="module")
def all_examples():
    """Every command of the help, the home page and the README."""
    found = []
    for command in ("list", "info", "check", "bench", "train", "predict"):
        said = subprocess.run(
            [*COMMAND, command, "--help"], capture_output=True, text=True
        ).stdout
        found += examples(said[said.index("example") :])
    pages = [ROOT / "nbs" / "index.ipynb", ROOT / "README.md"]
    texts = [
        "".join("".join(cell["source"]) + "\n" for cell in json.loads(text)["cells"])
        if page.suffix == ".ipynb"
        else text
        for page in pages
        if (text := page.read_text("utf-8"))
    ]
    found += [line for text in texts for line in examples(text)]
    return list(dict.fromkeys(found))


def test_examples_are_what_the_parser_takes(all_examples):
    from attn_notes.cli import make_parser

    assert len(all_examples) > 14
    for example in all_examples:
        make_parser().parse_args(shlex.split(example.split("<")[0])[1:])


FRENCH = {"3 weeks ago": "il y a 3 semaines", "12 kilometers": "12 kilomètres"}


def test_examples_of_shipped_models_are_within_their_reach(
    all_examples, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    digit = image_set("mnist", "valid")[0][0]
    Image.fromarray(digit[0].numpy()).save("digit.png")
    scene = scenes("valid", 1).images[0].permute(1, 2, 0)
    Image.fromarray(scene.numpy()).save("scene.png")
    Image.fromarray(scene.numpy()).save("small.png")
    brain = hard_brain("valid", size=(40, 32, 36))[0][0].numpy()
    nibabel.save(nibabel.Nifti1Image(brain, np.eye(4)), "brain.nii.gz")
    tried = 0
    for example in all_examples:
        words = shlex.split(example.split("<")[0])[1:]
        if words[0] in ("list", "info") or (
            words[0] == "predict" and "--pretrained" not in words
        ):
            feed(monkeypatch, b"3 weeks ago\nin 5 days\n")
            assert run(*words) == 0, example
            said = capsys.readouterr()
            assert said.err == "", example
            if "--output" in words:
                assert Path(words[words.index("--output") + 1]).is_file(), example
            elif words[0] == "predict" and "-" not in words:
                answers = [FRENCH[text] for text in words[2:]]
                assert said.out.splitlines() == answers
                tried += 1
    assert tried >= 2


@pytest.mark.parametrize(
    "more, said",
    [
        (["--output", ""], "path: expected a file or folder"),
        (
            ["--output", "o", "--data", "wmt14-en-de", "--data-dir", ""],
            "path: expected",
        ),
        (["--output", "o", "--task", ""], "--task: expected a name"),
    ],
)
def test_an_empty_option_is_no_option(refused, tmp_path, monkeypatch, more, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused("train", "transformer_tiny", *more)
    assert not [*tmp_path.iterdir()]


def test_a_loop_of_links_for_answers(refused, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    argv = "predict", "transformer_tiny", "a", "--output", str(tmp_path / "loop")
    assert "expected" in refused(*argv)


def test_warnings_are_said_whatever_the_filters(monkeypatch, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["predict", "transformer_tiny", "zzz"]) == 0
    assert "not in the vocabulary" in capsys.readouterr().err
