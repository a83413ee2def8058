"""A small vocabulary, small models, and folders as transformers writes them."""

import torch
import transformers

from attn_notes.data.subwords import WordPiece
from attn_notes.language.bert import (
    BertConfig,
    BertForSequence,
    BertForSpans,
    BertForTokens,
)

TEXTS = ["the king came to the city", "who made it", "in the year of the film a b c"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
HEADS = {"sequence": BertForSequence, "token": BertForTokens, "span": BertForSpans}


def vocabulary():
    return WordPiece.train([*TEXTS, f"z{LETTERS}"], 120)


def model(kind, known, classes=2, positions=64, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "dropout": 0.0, "num_classes": classes}
    sizes |= {"max_position_embeddings": positions}
    return HEADS[kind](BertConfig(vocab_size=len(known), **sizes))


def foreign_folder(folder, kind, known, labels=("no", "yes"), **change):
    """A folder of transformers with a head of this kind; its model."""
    config = transformers.BertConfig(
        vocab_size=len(known),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
        **change,
    )
    heads = {
        "sequence": transformers.BertForSequenceClassification,
        "token": transformers.BertForTokenClassification,
        "span": transformers.BertForQuestionAnswering,
    }
    torch.manual_seed(1)
    theirs = heads[kind](config).eval()
    theirs.save_pretrained(folder)
    known.save(folder)
    return theirs
