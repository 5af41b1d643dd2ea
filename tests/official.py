"""Small GLUE and SuperGLUE data: files in the benchmarks' formats, prepared by TFDS's builders.

Tests therefore read what a user's `tfds build` produces, with its features, splits, label classes
and corrections of WSC.
"""

import itertools
import json
import pathlib
from unittest import mock

# Records of each split, with exceptions below.
TRAIN = 8
VALIDATION = 4
TEST = 4
# More than a smoke run reads: with eight, it would start a hundred epochs, which takes longer than
# its steps.
TRAIN_SST2 = 256
GLUE_NAMES = "cola sst2 mrpc qqp stsb mnli qnli rte wnli ax"
SUPERGLUE_NAMES = "boolq cb copa multirc record rte wic wsc.fixed axb axg"
SPLITS = {"train": TRAIN, "dev": VALIDATION, "val": VALIDATION, "test": TEST}


def _tsv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(header)] if header else []
    lines += ["\t".join(map(str, row)) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))


def _jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _pairs(folder, columns, labels, *, names=("train", "dev", "test"), label="label"):
    """Writes files with a header and two texts per row; test files have no label column."""
    for name in names:
        count = SPLITS[name.partition("_")[0]]
        rows = [
            [i, f"{name} first {i}", f"{name} second {i}", labels[i % len(labels)]]
            for i in range(count)
        ]
        test = name.startswith("test")
        _tsv(
            folder / f"{name}.tsv",
            ["index", *columns, *([] if test else [label])],
            [row[:3] if test else row for row in rows],
        )


def write_glue(folder: pathlib.Path) -> None:
    """Writes the files of all tasks: those of MRPC and AX, and a folder for each other task."""
    for name in ("train", "dev"):  # only CoLA has no header in these files
        _tsv(
            folder / f"CoLA/{name}.tsv",
            None,
            [["src", i % 2, "*", f"{name} sentence {i} ."] for i in range(SPLITS[name])],
        )
    _tsv(
        folder / "CoLA/test.tsv",
        ["index", "sentence"],
        [[i, f"test sentence {i} ."] for i in range(TEST)],
    )
    for name, count in (("train", TRAIN_SST2), ("dev", VALIDATION)):
        _tsv(
            folder / f"SST-2/{name}.tsv",
            ["sentence", "label"],
            [[f"{name} film {i}", i % 2] for i in range(count)],
        )
    _tsv(
        folder / "SST-2/test.tsv",
        ["index", "sentence"],
        [[i, f"test film {i}"] for i in range(TEST)],
    )
    _pairs(folder / "QQP", ["question1", "question2"], [0, 1], label="is_duplicate")
    _pairs(
        folder / "STS-B", ["sentence1", "sentence2"], ["0.0", "5.0", "2.5", "3.75"], label="score"
    )
    nli = ["entailment", "neutral", "contradiction"]
    names = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
    _pairs(folder / "MNLI", ["sentence1", "sentence2"], nli, names=names, label="gold_label")
    _pairs(folder / "QNLI", ["question", "sentence"], ["entailment", "not_entailment"])
    _pairs(folder / "RTE", ["sentence1", "sentence2"], ["entailment", "not_entailment"])
    _pairs(folder / "WNLI", ["sentence1", "sentence2"], [0, 1])
    _tsv(
        folder / "ax.tsv",
        ["index", "sentence1", "sentence2"],
        [[i, f"ax premise {i}", f"ax hypothesis {i}"] for i in range(TEST)],
    )
    strings = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    rows = [
        [i % 2, 2 * i, 2 * i + 1, f"first {i}", f"second {i}"] for i in range(TRAIN + VALIDATION)
    ]
    _tsv(folder / "mrpc_train.txt", ["\ufeff" + strings[0], *strings[1:]], rows)
    _tsv(folder / "mrpc_dev_ids.tsv", None, [row[1:3] for row in rows[TRAIN:]])
    _tsv(folder / "mrpc_test.txt", strings, rows[:TEST])


# (text, (word index, noun), (word index, pronoun), whether the pronoun refers to the noun)
WSC = [
    ("The pot did not fit into the box because it was too big .", (0, "The pot"), (9, "it"), True),
    ("The pot did not fit into the box because it was too big .", (6, "the box"), (9, "it"), False),
    # A word without a space before its quotes.
    ('Ann asked Ida "why?" and "she" said nothing; she left .', (0, "Ann"), (5, "she"), False),
    # An index that is off by one.
    ("Itself a jar , it broke .", (0, "Itself"), (3, "it"), True),
]
PARAGRAPH = "<b>Sent 1: </b>Ann bought a lamp.<br><b>Sent 2: </b>It was red &amp; old.<br>"
RECORD = {
    "text": "Ann Lee met Bob in Rome.\n@highlight\nBob, of Oslo, said no\n@highlight\nThey left",
    "entities": [
        {"start": 0, "end": 6},
        {"start": 12, "end": 14},
        {"start": 19, "end": 22},
        {"start": 36, "end": 38},
        {"start": 44, "end": 47},
    ],
}
MULTIRC_RIGHT = {
    "train": [[0, 1, 1], [1, 0]],
    "val": [[1, 0, 1], [0, 1]],
    "test": [[None] * 3, [None] * 2],
}


def write_superglue(folder: pathlib.Path) -> None:
    """Writes the files of all tasks, in a folder each."""
    for name in ("train", "val", "test"):
        _write_simple_tasks(folder, name)
        _jsonl(folder / f"WSC/{name}.jsonl", _wsc_rows(name))
        _jsonl(folder / f"MultiRC/{name}.jsonl", _multirc_rows(name))
        _jsonl(folder / f"ReCoRD/{name}.jsonl", [_record_row(name)])
    _write_superglue_diagnostics(folder)


def _with_label(name, row, field, value):
    """Adds a label to a row, except in the test split."""
    return row if name == "test" else row | {field: value}


def _write_simple_tasks(folder, name):
    """Writes a split of the tasks with a label per record."""

    def write(task, labels, make_row):
        rows = [
            _with_label(name, make_row(i) | {"idx": i}, "label", labels[i % len(labels)])
            for i in range(SPLITS[name])
        ]
        _jsonl(folder / task / f"{name}.jsonl", rows)

    def pair(i):
        return {"premise": f"{name} premise {i}", "hypothesis": f"claim {i}"}

    def boolq(i):
        return {"question": f"{name} is {i} odd", "passage": f"a passage on {i}"}

    def copa(i):
        return {
            "premise": f"{name} {i}",
            "choice1": f"one {i}",
            "choice2": f"two {i}",
            "question": ("cause", "effect")[i % 2],
        }

    def wic(i):
        return {
            "word": "bank",
            "sentence1": f"{name} bank {i}",
            "sentence2": f"a bank {i}",
            "start1": 0,
            "start2": 0,
            "end1": 4,
            "end2": 4,
        }

    write("BoolQ", [False, True], boolq)
    write("CB", ["entailment", "contradiction", "neutral"], pair)
    write("RTE", ["entailment", "not_entailment"], pair)
    write("COPA", [0, 1], copa)
    write("WiC", [True, False], wic)


def _wsc_rows(name):
    rows = []
    for i in range(SPLITS[name]):
        text, (noun_index, noun), (pronoun_index, pronoun), is_coreferent = WSC[i % len(WSC)]
        target = {
            "span1_index": noun_index,
            "span1_text": noun,
            "span2_index": pronoun_index,
            "span2_text": pronoun,
        }
        row = {"text": text, "target": target, "idx": i}
        rows.append(_with_label(name, row, "label", is_coreferent))
    return rows


def _multirc_rows(name):
    rows = []
    answer_ids = itertools.count()
    for paragraph in range(2):
        questions = []
        for question, labels in enumerate(MULTIRC_RIGHT[name]):
            answers = []
            for i, label in enumerate(labels):
                row = {"text": f"answer {i}", "idx": next(answer_ids)}
                answers.append(_with_label(name, row, "label", label))
            questions.append(
                {
                    "question": f"{name} question {question}?",
                    "idx": 2 * paragraph + question,
                    "answers": answers,
                }
            )
        rows.append({"idx": paragraph, "passage": {"text": PARAGRAPH, "questions": questions}})
    return rows


def _record_row(name):
    queries = [
        ("@placeholder met someone", ["Ann Lee"]),
        ("Oslo knows @placeholder", ["Bob", "Ann Lee"]),
        ("nobody fits @placeholder", ["Zed"]),
    ]
    qas = []
    for i in range(SPLITS[name]):
        query, answers = queries[i % 3]
        row = {"idx": i, "query": query}
        qas.append(_with_label(name, row, "answers", [{"text": answer} for answer in answers]))
    return {"idx": 0, "passage": RECORD, "qas": qas}


def _write_superglue_diagnostics(folder):
    labels = ["entailment", "not_entailment"]
    axb = [
        {
            "idx": i,
            "sentence1": f"axb premise {i}",
            "sentence2": f"axb claim {i}",
            "label": labels[i % 2],
        }
        for i in range(TEST)
    ]
    axg = [
        {
            "idx": i,
            "premise": f"The cook said {('he', 'she')[i % 2]} paid {i // 2}",
            "hypothesis": f"The cook paid {i // 2}",
            "label": labels[i // 2],
        }
        for i in range(TEST)
    ]
    _jsonl(folder / "AX-b/AX-b.jsonl", axb)
    _jsonl(folder / "AX-g/AX-g.jsonl", axg)


def prepare(folder: pathlib.Path) -> pathlib.Path:
    """Prepares all tasks with TFDS, and returns the folder for TFDS_DATA_DIR."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.text import glue, super_glue

    tfds.disable_progress_bar()
    write_glue(folder / "glue")
    write_superglue(folder / "superglue")

    def extract(self, url):
        return str(folder / ("superglue" if "superglue" in url else "glue"))

    def download(self, urls):
        if isinstance(urls, dict):  # MRPC's three files
            return {
                "train": str(folder / "glue/mrpc_train.txt"),
                "dev_ids": str(folder / "glue/mrpc_dev_ids.tsv"),
                "test": str(folder / "glue/mrpc_test.txt"),
            }
        return str(folder / "glue/ax.tsv")

    manager = tfds.download.DownloadManager
    with (
        mock.patch.object(manager, "download_and_extract", extract),
        mock.patch.object(manager, "download", download),
    ):
        for builder, names in ((glue.Glue, GLUE_NAMES), (super_glue.SuperGlue, SUPERGLUE_NAMES)):
            for name in names.split():
                builder(config=name, data_dir=str(folder / "tfds")).download_and_prepare()
    return folder / "tfds"
