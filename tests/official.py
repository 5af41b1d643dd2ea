"""GLUE and SuperGLUE in small: hand-made files in the benchmarks' own formats, prepared by TFDS's real builders.

So tests read what a user's `tfds build` would give, features, splits, label classes and WSC's repairs included.
"""

import json
import pathlib
from unittest import mock

TRAIN, VALIDATION, TEST = 8, 4, 4  # records of each split, unless said otherwise below
TRAIN_SST2 = 256  # more than a smoke run takes: with eight, such a run opens an epoch a hundred times, which takes longer than its steps
SPLITS = {"train": TRAIN, "dev": VALIDATION, "val": VALIDATION, "test": TEST}


def _tsv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(header)] if header else []
    path.write_text(
        "".join(line + "\n" for line in [*lines, *("\t".join(map(str, row)) for row in rows)])
    )


def _jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _pairs(folder, columns, labels, *, names=("train", "dev", "test"), label="label"):
    """Files with a header and two texts a row; test files have no label column."""
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
    """The files of all tasks but MRPC and AX, one folder each, and those two's."""
    for name in ("train", "dev"):  # CoLA alone has no header there
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


WSC = [  # text, noun (place in words, words), pronoun (place in words, word), whether it stands for the noun
    ("The pot did not fit into the box because it was too big .", (0, "The pot"), (9, "it"), True),
    ("The pot did not fit into the box because it was too big .", (6, "the box"), (9, "it"), False),
    (
        'Ann asked Ida "why?" and "she" said nothing; she left .',
        (0, "Ann"),
        (5, "she"),
        False,
    ),  # a word glued to quotes
    ("Itself a jar , it broke .", (0, "Itself"), (3, "it"), True),  # miscounted by one
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
    """The files of all tasks, one folder each."""
    for name in ("train", "val", "test"):
        count, known = SPLITS[name], name != "test"

        def rows(task, make, labels, name=name, count=count, known=known):
            _jsonl(
                folder / task / f"{name}.jsonl",
                [
                    make(i) | {"idx": i} | ({"label": labels[i % len(labels)]} if known else {})
                    for i in range(count)
                ],
            )

        rows(
            "BoolQ",
            lambda i, n=name: {"question": f"{n} is {i} odd", "passage": f"a passage on {i}"},
            [False, True],
        )
        rows(
            "CB",
            lambda i, n=name: {"premise": f"{n} premise {i}", "hypothesis": f"claim {i}"},
            ["entailment", "contradiction", "neutral"],
        )
        rows(
            "RTE",
            lambda i, n=name: {"premise": f"{n} premise {i}", "hypothesis": f"claim {i}"},
            ["entailment", "not_entailment"],
        )
        rows(
            "COPA",
            lambda i, n=name: {
                "premise": f"{n} {i}",
                "choice1": f"one {i}",
                "choice2": f"two {i}",
                "question": ("cause", "effect")[i % 2],
            },
            [0, 1],
        )
        rows(
            "WiC",
            lambda i, n=name: {
                "word": "bank",
                "sentence1": f"{n} bank {i}",
                "sentence2": f"a bank {i}",
                "start1": 0,
                "start2": 0,
                "end1": 4,
                "end2": 4,
            },
            [True, False],
        )
        wsc = []
        for i in range(count):
            text, (span1, noun), (span2, pronoun), right = WSC[i % len(WSC)]
            target = {
                "span1_index": span1,
                "span1_text": noun,
                "span2_index": span2,
                "span2_text": pronoun,
            }
            wsc.append(
                {"text": text, "target": target, "idx": i} | ({"label": right} if known else {})
            )
        _jsonl(folder / f"WSC/{name}.jsonl", wsc)
        multirc, answers = [], 0
        for paragraph in range(2):
            questions = []
            for question, right in enumerate(MULTIRC_RIGHT[name]):
                listed = [
                    {"text": f"answer {i}", "idx": answers + i}
                    | ({} if label is None else {"label": label})
                    for i, label in enumerate(right)
                ]
                answers += len(right)
                questions.append(
                    {
                        "question": f"{name} question {question}?",
                        "idx": 2 * paragraph + question,
                        "answers": listed,
                    }
                )
            multirc.append(
                {"idx": paragraph, "passage": {"text": PARAGRAPH, "questions": questions}}
            )
        _jsonl(folder / f"MultiRC/{name}.jsonl", multirc)
        gaps = [
            ("@placeholder met someone", ["Ann Lee"]),
            ("Oslo knows @placeholder", ["Bob", "Ann Lee"]),
            ("nobody fits @placeholder", ["Zed"]),
        ]
        qas = [
            {"idx": i, "query": gaps[i % 3][0]}
            | ({"answers": [{"text": answer} for answer in gaps[i % 3][1]]} if known else {})
            for i in range(count)
        ]
        _jsonl(folder / f"ReCoRD/{name}.jsonl", [{"idx": 0, "passage": RECORD, "qas": qas}])
    labels = ["entailment", "not_entailment"]
    _jsonl(
        folder / "AX-b/AX-b.jsonl",
        [
            {
                "idx": i,
                "sentence1": f"axb premise {i}",
                "sentence2": f"axb claim {i}",
                "label": labels[i % 2],
            }
            for i in range(TEST)
        ],
    )
    _jsonl(
        folder / "AX-g/AX-g.jsonl",
        [
            {
                "idx": i,
                "premise": f"The cook said {('he', 'she')[i % 2]} paid {i // 2}",
                "hypothesis": f"The cook paid {i // 2}",
                "label": labels[i // 2],
            }
            for i in range(TEST)
        ],
    )


def prepare(folder: pathlib.Path) -> pathlib.Path:
    """Every task, prepared by TFDS from these files; returns the folder for TFDS_DATA_DIR."""
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
        for builder, names in (
            (
                glue.Glue,
                ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli", "ax"),
            ),
            (
                super_glue.SuperGlue,
                (
                    "boolq",
                    "cb",
                    "copa",
                    "multirc",
                    "record",
                    "rte",
                    "wic",
                    "wsc.fixed",
                    "axb",
                    "axg",
                ),
            ),
        ):
            for name in names:
                builder(config=name, data_dir=str(folder / "tfds")).download_and_prepare()
    return folder / "tfds"
