"""`gemma-encoder inspect` on data: it shows the model's own input, in at most 100 columns."""

import json
import re

import numpy as np
import pytest

from gemma_encoder.cli import inspect, inspect_data
from gemma_encoder.cli.inspect_data import Settings, Text
from gemma_encoder.data import registry
from gemma_encoder.data.source import DataOptions
from gemma_encoder.inputs.task import Example
from gemma_encoder.inputs.template import encode
from gemma_encoder.inputs.tokenizer import Tokenizer


@pytest.fixture
def run(capsys, monkeypatch, shared_data):
    """`run(*flags)`: the exit code, the lines of stdout, and stderr."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(shared_data / "tfds"))
    monkeypatch.setenv("MSMARCO_DIR", str(shared_data / "cranfield_msmarco"))

    def start(*arguments):
        code = inspect.main(arguments)
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err

    return start


@pytest.mark.parametrize(
    "task",
    [
        "glue_cola",
        "glue_sst2",
        "glue_mrpc",
        "glue_stsb",
        "msmarco",
        "msmarco_retrieval",
        "toy_sentiment",
        "toy_similarity",
        "toy_ranking",
    ],
)
def test_every_task_is_shown(run, task):
    code, lines, error = run(f"--task={task}", "--n=2", "--sample=60", "--max_length=256")
    assert code == 0, error
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    source = registry.get(task, DataOptions())
    assert lines[0] == f"{task}: {source.task.kind}, train split, {source.size('train'):,} records"
    assert source.task.template.text in text.replace("\n           ", " ")
    for part in (
        "── record 1",
        "── record 2",
        "raw record",
        "each piece over its id",
        "── packed row",
        "real",
        {"regression": "targets", "retrieval": "truncated"}.get(source.task.kind.name, "labels"),
    ):
        assert part in text
    assert "── record 3" not in text
    counts = [
        int(match[1].replace(",", ""))
        for line in lines
        if (match := re.match(r" *\d+–\d+ tokens +([\d,]+)", line))
    ]
    assert sum(counts) == int(
        re.search(r"── ([\d,]+) texts of 60 records", text)[1].replace(",", "")
    )


def test_tokens_and_row_are_the_models_own(run):
    code, lines, _ = run("--task=glue_sst2", "--n=1", "--sample=50")
    assert code == 0
    first = next(index for index, line in enumerate(lines) if line.startswith("tokens: "))
    assert "" in lines
    last = next(index for index in range(first, len(lines)) if not lines[index])
    printed = [int(token) for line in lines[first + 2 : last : 2] for token in line.split()]
    source = registry.get("glue_sst2")
    record = np.random.default_rng(0).permutation(source.size("train"))[0]
    (example,) = source.examples("train", int(record))
    tokenizer = Tokenizer.load("small")
    (encoded,) = encode(tokenizer, source.task.template, [example.fields], 128)
    assert printed == encoded.tokens.tolist()
    header = lines.index("raw record                                       │ text")
    first_words = " ".join(example.fields["sentence"].split()[:3])
    assert first_words in lines[header + 1]
    bar = next(
        line
        for line in lines
        if set(line) <= set("123456789abcdefghijklmnopqrstuvwxyz·") and len(line) == 64
    )
    assert abs(bar.count("1") * 2 - len(printed)) <= 1
    assert any(line.startswith(f"1        1       0–{len(printed) - 1} ") for line in lines)


def test_truncation_is_reported(run):
    _, lines, _ = run("--task=glue_mrpc", "--n=1", "--sample=40", "--max_length=24")
    match = re.fullmatch(
        r"tokens: 24, (\d+) more were truncated; each piece over its id",
        next(line for line in lines if line.startswith("tokens: ")),
    )
    assert int(match[1]) > 0
    assert any(re.search(r"texts \((9\d|100)\.\d%\) exceed max_length=24", line) for line in lines)


def test_the_users_own_files_are_shown(run, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "review,label\n" + "".join(f"text number {i},{'ab'[i % 2]}\n" for i in range(30))
    )
    code, lines, error = run("--config=own:classification", f"--config.own.train={path}", "--n=1")
    assert code == 0, error
    assert lines[0] == "own: classification, train split, 27 records"
    assert "classes    0 a, 1 b" in lines
    assert any(line.startswith("review: text number ") for line in lines)


def test_unusual_characters_stay_within_the_width():
    """Wide, combining and blank characters, and long words."""
    task = registry.get("toy_sentiment").task
    settings = Settings(registry.get("toy_sentiment"), Tokenizer.load("small"), 16, 128, 8)
    for sentence in ("漢字 " * 30, "e\u0301\u200b", "\u00a0x\u3000" * 5, "word" * 90):
        fields = {"sentence": sentence}
        (encoded,) = encode(settings.tokenizer, task.template, [fields], inspect_data.NO_LIMIT)
        text = Text(0, Example(fields, 1), {"number": "0"}, encoded.tokens)
        lines = list(inspect_data._show([text], 0, settings))
        assert max(map(len, lines)) <= 100


def test_the_histogram_counts_every_length():
    for lengths in ([5], [1, 1000], list(range(3, 90)), [128] * 7):
        lines = list(inspect_data._histogram(np.array(lengths)))
        counts = [line.split("tokens")[1].split()[0].replace(",", "") for line in lines]
        assert sum(map(int, counts)) == len(lengths)
        assert len(lines) <= 17 and max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a task, e.g. --task=glue_mrpc"),
        (("--task=glue_mrcp",), "did you mean 'glue_mrpc'"),
        (
            ("--task=toy_ranking", "--split=tset"),
            "unknown split of toy_ranking 'tset'; did you mean 'test'",
        ),
        (("--task=toy_ranking", "stray"), "unexpected argument 'stray'"),
        (("--task=toy_ranking", "--n=x"), "--n=x"),
        (("--config=experiments/nothing.py",), "experiments/nothing.py"),
        (
            ("--config=experiments/quickstart.py", "--task=glue_sst2"),
            "unknown task of the config 'glue_sst2'",
        ),
        (("--config=experiments/own.py",), "own.train is not set"),
    ],
)
def test_refusals_are_one_line(run, arguments, message):
    code, lines, error = run(*arguments)
    assert code == 2 and not lines
    assert len(error.strip().splitlines()) == 1 and error.startswith("error: ") and message in error


def test_metrics_are_checked_as_in_training(run, tmp_path):
    rows = [f"word {index},{'abc'[index % 3]},{index}\n" for index in range(12)]
    (tmp_path / "train.csv").write_text("text,label,score\n" + "".join(rows))
    (tmp_path / "dev.csv").write_text("text,label,score\n" + rows[3])
    data = [
        f"--config.own.train={tmp_path}/train.csv",
        f"--config.own.validation={tmp_path}/dev.csv",
    ]
    data.append("--config.own.fields=('text',)")
    code, _, error = run("--config=own:classification", *data, "--config.own.metrics=('f1',)")
    assert code == 2 and "'f1' cannot be computed: it needs two classes" in error
    regression = ["--config=own:regression", *data, "--config.own.label=score"]
    code, lines, _ = run(*regression, "--split=validation")
    text = " ".join(" ".join(lines).split())
    assert code == 0 and "refused task 'own': the metric 'spearman' cannot be computed" in text
    code, lines, _ = run(*regression)
    assert code == 0 and not any(line.startswith("refused") for line in lines)


def test_a_query_and_its_documents_have_their_templates(capsys, tmp_path):
    rows = [{"query": f"wings {i}", "positive": f"lift {i}", "score": [0.5]} for i in range(9)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--config=own:retrieval", f"--config.own.train={path}", "--n=1"]
    assert inspect_data.main(flags) == 0
    text = capsys.readouterr().out
    assert "template   Query: {query}\ntemplate   Document: {document}\n" in text
    assert "record 1: a list of 2 texts for query" in text
    query, document = (part.splitlines() for part in text.split("raw record")[1:])
    assert "query: wings" in query[1] and "│ Query: wings" in query[1]
    assert not any("label" in line for line in query[:4])
    assert "document: lift" in document[1] and "│ Document: lift" in document[1]
    assert any("label: 1, teacher 0.5" in line for line in document)
    assert inspect_data.main([*flags, "--split=validation"]) == 0
