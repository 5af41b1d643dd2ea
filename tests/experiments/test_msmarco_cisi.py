"""CISI in MS MARCO's layout, whose queries may exceed a row, trains at the default recipe."""

import collections
import functools
import itertools
import math
import os
import pathlib
import re

import numpy as np
import pytest

from gemma_encoder import configs
from gemma_encoder.data import registry
from gemma_encoder.inputs.template import encode
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.training import loop
from gemma_encoder.training.config import TrainConfig

DEPTH = 100  # documents of a query in the first-stage run


def read_records(path):
    """Reads a file of records ".I ID", each with sections such as ".W TEXT": text by id."""
    texts = {}
    for record in re.split(r"^\.I ", path.read_text("latin-1"), flags=re.MULTILINE)[1:]:
        identity, *sections = re.split(r"^\.([A-Z])\s*$", record, flags=re.MULTILINE)
        named = dict(zip(sections[::2], sections[1::2], strict=True))
        texts[identity.strip()] = " ".join(f"{named.get('T', '')} {named['W']}".split())
    return texts


def read_cisi(folder):
    """Returns the documents, the judged queries and the judgments of the collection's files."""
    judgments = collections.defaultdict(list)
    for line in (folder / "CISI.REL").read_text().splitlines():
        query, document, *_ = line.split()
        judgments[query].append(document)
    queries = read_records(folder / "CISI.QRY")
    judged = {query: queries[query] for query in judgments}
    return read_records(folder / "CISI.ALL"), judged, judgments


def generate(documents=120, queries=16):
    """Returns a small collection in which a query repeats words of its document; some are long."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"{a}{b}{c}" for a in "bdgk" for b in "aeiou" for c in "lmnr"])
    words = {str(i): " ".join(rng.choice(vocabulary, 60)) for i in range(documents)}
    texts = {}
    for index in range(queries):
        length = 400 if index % 4 < 2 else 8  # in either split
        texts[f"q{index}"] = " ".join(rng.choice(words[str(index)].split(), length))
    return words, texts, {query: [query[1:]] for query in texts}


def bm25(documents, queries, k1=0.9, b=0.4):
    """Returns the documents of each query, best first."""
    bags = {name: collections.Counter(text.lower().split()) for name, text in documents.items()}
    frequency = collections.Counter(word for bag in bags.values() for word in bag)
    mean = sum(bag.total() for bag in bags.values()) / len(bags)

    @functools.cache
    def rarity(word):
        return math.log(1 + (len(bags) - frequency[word] + 0.5) / (frequency[word] + 0.5))

    def score(words, bag):
        norm = k1 * (1 - b + b * bag.total() / mean)
        return sum(rarity(w) * bag[w] * (k1 + 1) / (bag[w] + norm) for w in words & bag.keys())

    ranked = {}
    for query, text in queries.items():
        words = set(text.lower().split())
        order = sorted(bags, key=lambda name: -score(words, bags[name]))
        ranked[query] = order[:DEPTH]
    return ranked


def write_layout(folder, documents, queries, judgments):
    """Writes the files that MSMARCO_DIR names; every third query is for evaluation."""

    def write(name, rows):
        lines = ("\t".join(map(str, row)) + "\n" for row in rows)
        (folder / name).write_text("".join(lines))

    folder.mkdir(exist_ok=True)
    write("collection.tsv", documents.items())
    run = bm25(documents, queries)
    for split in ("train", "dev"):
        names = [name for i, name in enumerate(queries) if (i % 3 == 0) == (split == "dev")]
        write(f"queries.{split}.tsv", [(name, queries[name]) for name in names])
        write(
            f"qrels.{split}.tsv",
            [(name, 0, document, 1) for name in names for document in judgments[name]],
        )
        write(
            f"run.{split}.tsv",
            [
                (name, document, rank)
                for name in names
                for rank, document in enumerate(run[name], 1)
            ],
        )


@pytest.fixture(params=["generated", "cisi"])
def collection(request, tmp_path, monkeypatch):
    """A folder in MS MARCO's layout, and its queries."""
    if request.param == "cisi":
        source = pathlib.Path(os.environ.get("CISI_DIR", "shared/data/cisi"))
        if not (source / "CISI.QRY").is_file():
            pytest.skip("CISI_DIR names no folder with CISI.ALL, CISI.QRY and CISI.REL")
        documents, queries, judgments = read_cisi(source)
    else:
        documents, queries, judgments = generate()
    write_layout(tmp_path / "msmarco", documents, queries, judgments)
    monkeypatch.setenv("MSMARCO_DIR", str(tmp_path / "msmarco"))
    return queries


def test_the_recipe_trains_and_evaluates_with_long_queries(
    collection, changed, tmp_path, capsys, micro
):
    """The lengths of a row and of a text are the recipe's; the model and the run are small."""
    config = configs.load_config("msmarco")
    assert config.max_length == 256
    tokenizer = Tokenizer.load(config.tokenizer)
    lengths = [len(ids) for ids in tokenizer.encode(list(collection.values()))]
    assert sum(length > config.max_length for length in lengths) >= 3
    small = micro()
    config.model = small.model
    config.max_eval_examples = 4
    config = changed(config, {"train_for": "2 steps", "batch__rows": 8, "log_every": "1 steps"})
    outcome = loop.train(config, tmp_path / "run")
    assert outcome.step == 2 and 0 <= outcome.metrics["msmarco"]["mrr@10"] <= 1
    assert loop.evaluate(config, tmp_path / "run").metrics == outcome.metrics


def test_every_pair_fits_a_row_and_has_words_of_both(collection):
    config = TrainConfig.from_config_dict(configs.load_config("msmarco"))
    tokenizer = Tokenizer.load(config.tokenizer)
    source = registry.get("msmarco")
    examples = [
        example.fields
        for split in ("train", "validation")
        for index in range(source.size(split))
        for example in source.examples(split, index)[:3]
    ]
    encoded = encode(tokenizer, source.task.template, examples, config.max_length)
    for text in encoded:
        pieces = itertools.accumulate(tokenizer.pieces(text.tokens))
        end = next(i for i, joined in enumerate(pieces, 1) if joined.endswith("▁Document:"))
        length = len(text.tokens)
        assert length <= config.max_length
        assert end >= 6  # the query and the template's words
        if text.num_truncated:
            assert length >= config.max_length - 3 and length - end > 90
