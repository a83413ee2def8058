"""Folders of BERT and GPT-2 of the hub at the command line: what a head says of a text,
and what is wrong with a text, a vocabulary or a folder."""

import json
import shutil

import pytest

from attn_notes.data.subwords import ByteBPE, WordPiece

TEXTS = [
    "The cat sees the dog in the house.",
    "A dog and a cat walk to the river, and the river is deep.",
    "Who sees the house? The man sees the house by the river.",
]
NAMES = {0: "bad", 1: "good", 2: "mixed"}
HEADS = {
    "bert_base_masked_lm": "BertForMaskedLM",
    "bert_base_pretraining": "BertForPreTraining",
    "bert_base_sequence": "BertForSequenceClassification",
    "bert_base_token": "BertForTokenClassification",
    "bert_base_span": "BertForQuestionAnswering",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each name of a model."""
    import torch
    import transformers

    root, wordpiece = tmp_path_factory.mktemp("hub"), WordPiece.train(TEXTS, 80)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 24}
    sizes["vocab_size"] = len(wordpiece)
    for name, head in HEADS.items():
        named = {"id2label": NAMES} if "Classification" in head else {}
        config = transformers.BertConfig(**sizes, **named)
        getattr(transformers, head)(config).save_pretrained(root / name)
        wordpiece.save(root / name)
    pairs = ByteBPE.train(TEXTS, 300)
    gpt = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
    gpt |= {"bos_token_id": pairs.end_token_id, "eos_token_id": pairs.end_token_id}
    config = transformers.GPT2Config(vocab_size=len(pairs), **gpt)
    transformers.GPT2LMHeadModel(config).save_pretrained(root / "gpt2")
    pairs.save(root / "gpt2")
    return root


@pytest.fixture
def predict(folders):
    """The arguments of `predict` for the folder of a name."""
    return lambda name, *more: ("predict", name, "--pretrained", folders / name, *more)


@pytest.mark.parametrize("name", ["bert_base_masked_lm", "bert_base_pretraining"])
def test_a_bert_fills_in(predict, ask, name):
    found = ask(*predict(name, "the cat sees [MASK].", "[MASK] dog [MASK]"))
    assert found[0].startswith("the cat sees") and len(found) == 2
    assert "[MASK]" not in "".join(found) and "dog" in found[1]


def test_a_head_that_the_model_has_not_is_left_aside_quietly(folders, ask):
    folder = folders / "bert_base_pretraining"
    given = "bert_base_masked_lm", "--pretrained", folder, "a [MASK]"
    assert len(ask("predict", *given)) == 1


def test_a_bert_names_tags_and_answers(predict, ask):
    found = ask(*predict("bert_base_sequence", "a cat", "a cat ||| a dog"))
    assert len(found) == 2 and {*found} <= {*NAMES.values()}
    found = ask(*predict("bert_base_token", "the cat"))[0].split()
    assert [word.split("/")[0] for word in found] == ["the", "cat"]
    assert {word.split("/")[1] for word in found} <= {*NAMES.values()}
    passage = "the cat sees the dog"
    (found,) = ask(*predict("bert_base_span", f"who sees the dog? ||| {passage}"))
    assert found and found in passage


def test_a_gpt_continues(predict, run, capsys):
    def ask(*options):
        argv = *predict("gpt2", "the cat", "--max-new-tokens", 4), *options
        code, said = run(*argv), capsys.readouterr()
        assert code == 0 and said.err == "" and said.out.startswith("the cat")
        return said.out

    draw = "--temperature", 2, "--top-k", 50, "--top-p", 0.99, "--seed"
    assert ask("--temperature", 0) == ask("--temperature", 0)
    assert ask(*draw, 1) == ask(*draw, 1)
    assert len({ask(*draw, seed) for seed in range(4)}) > 1


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "name, text, said",
    [
        ("bert_base_masked_lm", "no mask", "expected a text with [MASK]"),
        ("bert_base_masked_lm", "[MASK] " * 40, "expected at most 24 tokens"),
        ("bert_base_masked_lm", "\ud800 [MASK]", "got the surrogate"),
        ("bert_base_masked_lm", "", "expected a text of a token or more; got ''"),
        ("bert_base_sequence", "a ||| b ||| c", "two texts with ||| between them"),
        ("bert_base_sequence", "dog " * 40, "expected at most 24 tokens"),
        ("bert_base_token", " ", "expected a text of a token or more"),
        ("bert_base_span", "no passage", "expected two texts with |||"),
        ("bert_base_span", "who ||| " + "a cat " * 20, "expected at most 24 tokens"),
        ("gpt2", "", "expected a text of a token or more"),
        ("gpt2", "\udfff", "got the surrogate"),
        ("gpt2", "dog " * 90, "expected at most 23 tokens"),
    ],
)
def test_a_bad_text_costs_its_own_answer(predict, run, capsys, name, text, said):
    good = {"bert_base_masked_lm": "a [MASK]", "bert_base_span": "who ||| a cat"}
    good = good.get(name, "a cat")
    assert run(*predict(name, text)) == 2
    seen = capsys.readouterr()
    assert seen.out == "" and seen.err.count("\n") == 1 and said in seen.err
    assert run(*predict(name, good, text, good)) == 1
    seen = capsys.readouterr()
    lines = seen.out.removesuffix("\n").split("\n")
    assert len(lines) == 3 and lines[1] == "" and lines[0] == lines[2] != ""
    assert seen.err.count("\n") == 1
    assert seen.err.startswith("attn-notes: input 2: ") and said in seen.err


@pytest.mark.parametrize(
    "text", ["a\x00\x07b\x1b[31m [MASK]", "a\r\tb [MASK]", "a\n[MASK]"]
)
def test_control_characters_are_no_text_of_a_bert(predict, ask, text):
    (line,) = ask(*predict("bert_base_masked_lm", text))
    assert line and not {*line} & {*"\x00\x07\x1b\r"}


def spoiled(folders, name, tmp_path):
    return shutil.copytree(folders / name, tmp_path / "model")


def write_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


VOCABULARIES = {
    "longer": (lambda tokens: [*tokens, "more"], "expected a vocabulary of"),
    "twice": (lambda tokens: [*tokens[:-1], tokens[5]], "expected distinct tokens"),
    "no mask": (
        lambda tokens: [t.replace("[MASK]", "[mask]") for t in tokens],
        "[MASK]",
    ),
    "empty": (lambda tokens: [], "[PAD]"),
}


@pytest.mark.no_shapes
@pytest.mark.parametrize("name", ["bert_base_masked_lm", "bert_base_sequence"])
@pytest.mark.parametrize("kind", VOCABULARIES)
def test_a_vocabulary_that_is_none(folders, refused, tmp_path, name, kind):
    folder, (change, said) = spoiled(folders, name, tmp_path), VOCABULARIES[kind]
    path = folder / "vocab.txt"
    tokens = path.read_text(encoding="utf-8").split("\n")[:-1]
    path.write_text("".join(f"{t}\n" for t in change(tokens)), encoding="utf-8")
    assert said in refused("predict", name, "--pretrained", folder, "a [MASK]")


@pytest.mark.no_shapes
@pytest.mark.parametrize("name", ["bert_base_masked_lm", "gpt2"])
def test_folders_that_are_half_there(folders, refused, tmp_path, name):
    folder = spoiled(folders, name, tmp_path)
    predict = "predict", name, "--pretrained", folder, "a [MASK]"
    write_config(folder, vocab_size=77)
    assert "expected a vocabulary of 77 tokens" in refused(*predict)
    for path in (
        *folder.glob("vocab.*"),
        *folder.glob("token*"),
        *folder.glob("merges*"),
    ):
        path.unlink()
    said = "vocab.txt" if "bert" in name else "vocab.json and merges.txt"
    assert f"task.json or {said} or tokenizer.json; got no" in refused(*predict)
    (folder / "model.safetensors").unlink()
    assert "holds no model.safetensors" in refused(*predict)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "name, other, said",
    [
        ("bert_base_masked_lm", "bert_base_token", "left as they were: predictions"),
        ("bert_base_span", "bert_base_masked_lm", "left as they were: spans"),
        ("bert_base_sequence", "bert_base_span", "id2label"),
        ("bert_base_sequence", "bert_base_token", "left as they were: bert.pooler"),
        ("bert_base_masked_lm", "gpt2", "expected WordPiece"),
        ("gpt2", "bert_base_masked_lm", "expected byte-level BPE"),
        ("bert_base", "bert_base_masked_lm", "expected task.json; got the files of"),
        ("transformer_base", "gpt2", "expected task.json or source.spm"),
    ],
)
def test_the_folder_of_another_head(folders, refused, name, other, said):
    text = "who ||| a cat" if "span" in name else "a [MASK]"
    assert said in refused("predict", name, "--pretrained", folders / other, text)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "name, options, said",
    [
        ("bert_base_masked_lm", "--seed 3", "--seed: expected an option of masked_"),
        ("bert_base_span", "--top-k 3", "--top-k: expected an option of question_"),
        ("gpt2", "--num-beams 3", "--num-beams: expected an option of causal_"),
        ("gpt2", "--top-p 0", "--top-p: expected a number from above 0 to 1"),
        ("gpt2", "--max-new-tokens 24", "expected less than 24, the positions"),
    ],
)
def test_options_of_another_kind(predict, refused, name, options, said):
    assert said in refused(*predict(name, "a", "b", *options.split()))


@pytest.mark.slow
def test_training_starts_from_a_folder(folders, tmp_path, run, ask, capsys):
    """Its sizes and vocabulary; the head is new."""
    train = "train", "bert_base_sequence", "--data", "kjv-pairs", "--max-steps"
    folder = folders / "bert_base_pretraining"
    where = "--pretrained", folder, "--output", tmp_path / "run"
    assert run(*train, 1, *where) == 0
    assert "left as they were: classifier.weight" in capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["hidden_size"] == 16 and config["vocab_size"] < 81
    assert run(*train, 2, *where, "--resume") == 0
    argv = "predict", "bert_base_sequence", "--pretrained", tmp_path / "run"
    assert len(ask(*argv, "a cat ||| a dog")) == 1


@pytest.mark.no_shapes
def test_the_most_tokens_of_an_example_reach_the_task(refused, tmp_path):
    train = "train", "bert_book_token", "--max-steps", 1, "--output", tmp_path / "run"
    assert "max_tokens: expected" in refused(*train, "--max-tokens", 1)
    train = "train", "gpt_book", "--output", tmp_path / "run"
    assert "max_tokens" in refused(*train, "--max-tokens", 9)
    assert not (tmp_path / "run").exists()


@pytest.mark.no_shapes
def test_training_from_a_folder_that_does_not_fit(folders, refused, tmp_path):
    train = "train", "bert_base_sequence", "--output", tmp_path / "run"
    said = refused(*train, "--pretrained", folders / "gpt2")
    assert "WordPiece" in said
    weights = folders / "bert_base_pretraining" / "model.safetensors"
    assert "single file" in refused(*train, "--pretrained", weights)
    assert "nowhere" in refused(*train, "--pretrained", "nowhere")
    assert not (tmp_path / "run").exists()
