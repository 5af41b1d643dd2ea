"""Prepared tasks: batches are bitwise equal to those of raw data; incompatible data are errors."""

import contextlib
import dataclasses
import itertools
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from gemma_encoder.data import prepared, registry
from gemma_encoder.data.evaluation_stream import evaluation_stream
from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.pipeline import TrainStream, average_examples
from gemma_encoder.data.prepared import Part, PreparedSource
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import Batch, BatchShape
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, ExampleTable, Task
from gemma_encoder.inputs.template import Template
from tests.data import retrieval_files

TASKS = {
    "classes": Task("classes", "classification", Template("{x}"), ("accuracy",), ("a", "b")),
    "targets": Task(
        "targets", "regression", Template("a {x}"), ("spearman",), label_range=(0.0, 10.0)
    ),
    "lists": Task(
        "lists", "ranking", Template("{query} {document}", truncation=("document",)), ("mrr@10",)
    ),
}
DATA = DataOptions(list_size=3)  # lists have five documents, three are sampled
OPTIONS = StreamOptions(
    BatchShape(rows=8, row_length=64, segments=4, groups=4, list_size=3),
    max_length=12,
    readers=4,
    seed=5,
)
RATES = np.array([0.4, 0.3, 0.3])


def records(split):
    """Records by task: some texts are truncated, and one in seven lists has no positive."""
    size = 40 if split == "train" else 21
    rng = np.random.default_rng(size)
    return {
        "classes": [
            [
                Example(
                    {"x": f"número {i} " + "and more " * int(rng.integers(0, 9))},
                    i % 2,
                    info={"idx": i},
                )
            ]
            for i in range(size)
        ],
        "targets": [[Example({"x": f"target of {i}"}, i / 4)] for i in range(size)],
        "lists": [
            [
                Example(
                    {"query": f"query {i}", "document": f"document {j}"},
                    float(j < 2 and i % 7 > 0),
                    f"q{i}",
                    f"d{j}",
                )
                for j in range(5)
            ]
            for i in range(size)
        ],
    }


class Lists(MemorySource):
    """A source with qrels."""

    def qrels(self, split):
        return {"q0": {"d0": 2.0, "unseen": 1.0}}


def raw(name, options=DATA):
    return (Lists if name == "lists" else MemorySource)(
        TASKS[name], options, lambda split: records(split)[name]
    )


def write(source, tokenizer, root):
    folder = root / source.task.name
    if prepared.begin(folder, prepared.describe_prepared(source, tokenizer, OPTIONS.max_length)):
        for part in prepared.parts(source):
            prepared.write_part(source, part, tokenizer, OPTIONS.max_length, folder)
        prepared.finish(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    """Makes parts small, so that every task has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "PART", 16)
        yield


@pytest.fixture(scope="module")
def root(tokenizer, tmp_path_factory):
    """A folder with the three tasks prepared."""
    root = tmp_path_factory.mktemp("prepared")
    for name in TASKS:
        write(raw(name), tokenizer, root)
    return root


def read(root):
    return [PreparedSource(name, root, DATA) for name in TASKS]


def take(sources, tokenizer, count, options=OPTIONS, **arguments):
    stream = TrainStream(sources, RATES, tokenizer, options, **arguments)
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.parametrize(("process", "processes"), [(0, 1), (1, 2)])
def test_training_batches_equal_those_of_raw_data(root, tokenizer, process, processes):
    straight = take(
        [raw(name) for name in TASKS], tokenizer, 8, process=process, processes=processes
    )
    assert_equal(straight, take(read(root), tokenizer, 8, process=process, processes=processes))
    assert len({int(i) for batch in straight for i in np.unique(batch.task_id)}) == 3


@pytest.mark.parametrize(
    "change",
    [{"seed": 6}, {"readers": 2}, {"readers": 8}, {"padding": "left"}, {"micro_batches": 2}],
    ids=str,
)
def test_a_folder_is_valid_for_any_seed_readers_and_batch(root, tokenizer, change):
    shape = dataclasses.replace(OPTIONS.shape, rows=16, groups=16)
    options = dataclasses.replace(OPTIONS, shape=shape, **change)
    raw_batches = take([raw(name) for name in TASKS], tokenizer, 6, options)
    assert_equal(raw_batches, take(read(root), tokenizer, 6, options))
    prepared.check_prepared(read(root), tokenizer, options.max_length)


@pytest.mark.parametrize("list_size", [2, 4, 5])
def test_a_folder_is_valid_for_any_list_size(root, tokenizer, list_size):
    data = dataclasses.replace(DATA, list_size=list_size)
    shape = dataclasses.replace(OPTIONS.shape, list_size=list_size)
    options = dataclasses.replace(OPTIONS, shape=shape)
    ready = [PreparedSource(name, root, data) for name in TASKS]
    prepared.check_prepared(ready, tokenizer, options.max_length)
    straight = take([raw(name, data) for name in TASKS], tokenizer, 6, options)
    assert_equal(straight, take(ready, tokenizer, 6, options))


def test_counts_and_average_examples_equal_those_of_raw_data(root, tokenizer):
    counts = []
    for sources in ([raw(name) for name in TASKS], read(root)):
        stream = TrainStream(sources, RATES, tokenizer, OPTIONS)
        list(itertools.islice(stream, 5))
        counts.append(stream.counts)
        stream.close()
    assert counts[0] == counts[1] and counts[0]["classes"]["cut_texts"]
    measured = [
        average_examples(sources, RATES, tokenizer, OPTIONS, 4)
        for sources in ([raw(name) for name in TASKS], read(root))
    ]
    assert measured[0] == measured[1]


def test_restoring_reads_only_unpacked_records(root, tokenizer):
    straight = take(read(root), tokenizer, 8)
    first = TrainStream(read(root), RATES, tokenizer, OPTIONS)
    before = list(itertools.islice(first, 3))
    state = first.state()
    first.close()
    seen = []
    sources = read(root)

    def spy(record):
        return lambda *args, **options: seen.append(args) or record(*args, **options)

    for source in sources:
        source.record = spy(source.record)
    second = TrainStream(sources, RATES, tokenizer, OPTIONS)
    second.restore(state)
    assert len(seen) == sum(len(json.loads(reader)["waiting"]) for reader in state.values())
    assert_equal(straight, before + list(itertools.islice(second, 5)))
    second.close()


@pytest.mark.parametrize("name", TASKS)
def test_evaluation_equals_that_of_raw_data(root, tokenizer, name):
    results = []
    for source in (raw(name), PreparedSource(name, root, DATA)):
        table = ExampleTable()
        results.append(
            (
                list(evaluation_stream(source, 0, "validation", tokenizer, OPTIONS, table)),
                table,
                source.qrels("validation"),
            )
        )
    (batches, table, qrels), (again, table_again, qrels_again) = results
    assert_equal(batches, again)
    assert dataclasses.replace(table, infos=[dict(info) for info in table.infos]) == table_again
    assert qrels == qrels_again


def test_a_prepared_task_needs_no_raw_data(root):
    for source in read(root):
        assert source.task == TASKS[source.task.name]
        assert source.size("train") == 40


def test_writing_resumes(tokenizer, tmp_path):
    source = raw("classes")
    folder = tmp_path / "classes"
    description = prepared.describe_prepared(source, tokenizer, 12)
    # Preparing was refused or killed before a part was written: the folder is free.
    assert prepared.begin(folder, prepared.describe_prepared(source, tokenizer, 13))
    assert prepared.begin(folder, description)
    first, second, *_ = prepared.parts(source)
    assert prepared.write_part(source, second, tokenizer, 12, folder)["texts"] == 16
    (folder / first.path).mkdir()
    (folder / first.path / "rows.arrow.part").write_bytes(b"half a")
    with pytest.raises(
        InputError, match="is incomplete: the program that prepares it did not finish"
    ):
        PreparedSource("classes", tmp_path, DATA)
    before = (folder / second.path / "rows.arrow").stat().st_mtime_ns
    write(source, tokenizer, tmp_path)
    assert (folder / second.path / "rows.arrow").stat().st_mtime_ns == before
    assert PreparedSource("classes", tmp_path, DATA).size("train") == 40
    assert not prepared.begin(folder, description), "it is complete"


def test_task_names_may_have_spaces(tokenizer, tmp_path):
    task = dataclasses.replace(TASKS["classes"], name="two words", head="classes")
    source = MemorySource(task, DATA, lambda split: records(split)["classes"])
    write(source, tokenizer, tmp_path)
    assert PreparedSource("two words", tmp_path, DATA).task == task


def test_fingerprints_are_those_of_the_raw_data(tmp_path, tokenizer):
    (tmp_path / "train.csv").write_text("text,label\n" + "one,a\ntwo,b\n" * 20)
    options = DataOptions(own={"train": str(tmp_path / "train.csv")})
    own = registry.get("own", options)
    write(own, tokenizer, tmp_path)
    ready = PreparedSource("own", tmp_path, options)
    for split in ("train", "validation"):
        ((name, digest),) = ready.fingerprints(split)
        assert [(name, digest)] == own.fingerprints(split) and name == "train.csv"


def test_incompatible_folders_are_errors(root, tokenizer, tmp_path):
    with pytest.raises(
        InputError,
        match="'nothing': the prepared folder .* does not exist; run gemma-encoder prepare",
    ):
        PreparedSource("nothing", root, DATA)
    with pytest.raises(InputError, match="prepared for another config: max_length: 12 -> 13"):
        prepared.check_prepared(read(root), tokenizer, 13)
    other = PreparedSource("classes", root, DataOptions(max_train_examples=4))
    with pytest.raises(InputError, match="options.max_train_examples: 0 -> 4"):
        prepared.check_prepared([other], tokenizer, 12)
    with pytest.raises(InputError, match="prepared differently .*max_length: 12 -> 13"):
        prepared.begin(root / "classes", prepared.describe_prepared(raw("classes"), tokenizer, 13))
    with pytest.raises(InputError, match="has no dev split"):
        read(root)[0].size("dev")
    with pytest.raises(InputError, match="support training only; use the raw data to evaluate"):
        read(root)[2].examples("train", 0)
    info = json.loads((root / "classes" / prepared.INFO).read_text())
    info["task"]["name"] = "../../elsewhere"
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / prepared.INFO).write_text(json.dumps(info))
    with pytest.raises(InputError, match="files are named after a task"):
        PreparedSource("classes", tmp_path, DATA)
    info["task"]["name"] = "targets"
    (tmp_path / "classes" / prepared.INFO).write_text(json.dumps(info))
    with pytest.raises(InputError, match="contains the task 'targets', not 'classes'"):
        PreparedSource("classes", tmp_path, DATA)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        prepared.begin(tmp_path / "file" / "classes", {})


def damage(path, how):
    """Damages a file so that only its digest, or only its format, tells."""
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "replaced":
        other = path.parent.parent / "00002" / path.name
        path.write_bytes(other.read_bytes() if other.exists() else b"")
    else:
        at = len(content) // 2
        changed = {"flipped": bytes([content[at] ^ 1]), "zeroed": bytes(100), "cut": b""}[how]
        rest = content[at + len(changed) :] if changed else b""
        path.write_bytes(content[:at] + changed + rest)


@pytest.mark.parametrize("how", ["flipped", "zeroed", "cut", "replaced", "deleted"])
@pytest.mark.parametrize("name", ["rows.arrow", "info.json", "validation.qrels.json"])
def test_damage_is_noticed_and_the_file_is_named(root, tmp_path, name, how):
    folder = shutil.copytree(root / "lists", tmp_path / "lists")
    damage(folder / ("train/00001/rows.arrow" if name == "rows.arrow" else name), how)

    def read():
        ready = PreparedSource("lists", tmp_path, DATA)
        return [len(ready.record("train", i, training=True).labels) for i in range(40)]

    message = "does not exist" if (name, how) == ("info.json", "deleted") else f"{name} is "
    with pytest.raises(InputError, match=message) as caught:
        read()
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    if name == "info.json" and how != "deleted":
        with pytest.raises(InputError, match="info.json is .*; delete .*lists and prepare it"):
            prepared.begin(folder, {})


@pytest.mark.parametrize("content", [b"", b"no table", None, "flips"])
def test_damage_without_digests_is_one_line(root, tmp_path, content):
    """Folders of former versions have no digests; Arrow must not end the process."""
    folder = shutil.copytree(root / "classes", tmp_path / "classes")
    for path in folder.rglob(prepared.digests.NAME):
        path.unlink()
    assert len(PreparedSource("classes", tmp_path, DATA).examples("train", 20)) == 1
    path = folder / "train/00001/rows.arrow"
    whole = path.read_bytes()
    if content == "flips":
        for at in range(0, len(whole), 97):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
            ready = PreparedSource("classes", tmp_path, DATA)
            for index in range(16, 32):
                with contextlib.suppress(InputError):
                    ready.examples("train", index)
        return
    other = (folder / "train/00002/rows.arrow").read_bytes()
    path.write_bytes(other if content is None else content)
    ready = PreparedSource("classes", tmp_path, DATA)
    assert ready.examples("train", 0)
    with pytest.raises(InputError, match="train/00001.*(damaged or missing|has 8 records instead)"):
        ready.examples("train", 20)
    for content in ("{", "3"):
        (folder / prepared.INFO).write_text(content)
        with pytest.raises(InputError, match="info.json (is damaged|cannot be read|holds no)"):
            PreparedSource("classes", tmp_path, DATA)


def test_a_row_whose_columns_differ_is_one_line(root, tmp_path):
    folder = shutil.copytree(root / "lists", tmp_path / "lists")
    path = folder / "train/00000/rows.arrow"
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    cut = pa.array([row[:-1] for row in table.column("cut").to_pylist()], pa.list_(pa.int32()))
    damaged = table.set_column(table.column_names.index("cut"), "cut", cut)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, damaged.schema) as writer:
        writer.write_table(damaged)
    (path.parent / prepared.digests.NAME).unlink()
    with pytest.raises(InputError, match="record 0 in .*train is damaged: the columns have differ"):
        PreparedSource("lists", tmp_path, DATA).record("train", 0, training=True)


def test_a_part_without_digests_is_written_again(tokenizer, tmp_path):
    """A kill may come between a part and its digests."""
    source = raw("classes")
    folder = tmp_path / "classes"
    assert prepared.begin(folder, prepared.describe_prepared(source, tokenizer, 12))
    first, *_ = prepared.parts(source)
    counts = prepared.write_part(source, first, tokenizer, 12, folder)
    (folder / first.path / prepared.digests.NAME).unlink()
    assert prepared.write_part(source, first, tokenizer, 12, folder) == counts
    assert prepared.write_part(source, first, tokenizer, 12, folder)["records"] == 0


def test_different_tokenizers_are_errors(root, tokenizer, tmp_path):
    info = json.loads((root / "classes" / prepared.INFO).read_text())
    info["tokenizer"] = {"name": "other", "sha256": "0" * 64}
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / prepared.INFO).write_text(json.dumps(info))
    sources = [read(root)[1], PreparedSource("classes", tmp_path, DATA)]
    with pytest.raises(
        InputError,
        match="must share one tokenizer, but were prepared as 'targets' with 'small' .* "
        "and 'classes' with 'other'",
    ):
        prepared.check_prepared(sources, tokenizer, 12)
    (tmp_path / "classes" / prepared.INFO).write_text(json.dumps(info | {"version": 0}))
    with pytest.raises(
        InputError, match="has version 0, this program reads version 2; prepare it again"
    ):
        PreparedSource("classes", tmp_path, DATA)


def test_malformed_records_name_the_record(tokenizer, tmp_path):
    broken = MemorySource(
        TASKS["classes"],
        DATA,
        lambda split: [[Example({"x": "fine"}, 0)], [Example({"x": " "}, 0)]],
    )
    with pytest.raises(InputError, match="validation record 2: the text is empty"):
        prepared.write_part(broken, Part("validation", 0, 0, 2), tokenizer, 12, tmp_path)
    assert not list(tmp_path.rglob("*.arrow*"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parts", [[0]]),
        ("parts", [["0", "8"]]),
        ("parts", [[8, 0]]),
        ("parts", [0, 8]),
        ("data", [["file"]]),
        ("data", [["file", 3]]),
    ],
)
def test_lists_of_a_damaged_description_are_one_line(root, tmp_path, field, value):
    folder = shutil.copytree(root / "classes", tmp_path / "classes")
    for path in folder.rglob(prepared.digests.NAME):
        path.unlink()
    info = json.loads((folder / prepared.INFO).read_text())
    info[field]["train"] = value
    (folder / prepared.INFO).write_text(json.dumps(info))
    with pytest.raises(InputError, match="info.json is damaged: .*Error: "):
        PreparedSource("classes", tmp_path, DATA)


def retrieval_sources():
    return [
        registry.get("msmarco_retrieval", retrieval_files.options(negatives=2, eval_documents=20)),
        retrieval_files.taught(),
    ]


def test_retrieval_lists_equal_those_of_raw_data(tokenizer, tmp_path, monkeypatch):
    """Grades, keys, roles and the scores of a teacher survive exactly."""
    files = tmp_path / "files"
    files.mkdir()
    retrieval_files.write_msmarco(files)
    monkeypatch.setenv("MSMARCO_DIR", str(files))
    sources = retrieval_sources()
    for source in sources:
        write(source, tokenizer, tmp_path)
    shutil.rmtree(files)
    read = [PreparedSource(s.task.name, tmp_path, s.options) for s in sources]
    prepared.check_prepared(read, tokenizer, OPTIONS.max_length)
    for raw_source, source in zip(sources, read, strict=True):
        assert source.task == raw_source.task
        for split in ("train", "validation"):
            assert source.size(split) == raw_source.size(split)
        assert source.qrels("validation") == raw_source.qrels("validation")
        for index, epoch in itertools.product(range(source.size("train")), range(3)):
            expected = raw_source.training_examples(index, 7, epoch)
            got = source.training_examples(index, 7, epoch)
            for a, b in zip(expected, got, strict=True):
                assert (a.label, a.role, a.key) == (b.label, b.role, b.key)
                assert (a.query_id, a.document_id) == (b.query_id, b.document_id)
                assert isinstance(b.label, tuple) == isinstance(a.label, tuple)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"positives": 3, "negatives": 4}, False),
        ({"negatives": 0}, True),
        ({"document_template": "D: {document}"}, True),
        ({"max_negative_share": 0.5}, True),
    ],
)
def test_a_retrieval_folder_is_valid_for_list_sizes(tokenizer, tmp_path, change, differs):
    write(retrieval_files.taught(), tokenizer, tmp_path)
    data = retrieval_files.options(**{"positives": 1, "negatives": 2} | change)
    read = PreparedSource("taught", tmp_path, data)
    if differs:
        with pytest.raises(InputError, match="was prepared for another config: options.retrieval"):
            prepared.check_prepared([read], tokenizer, OPTIONS.max_length)
        return
    prepared.check_prepared([read], tokenizer, OPTIONS.max_length)
    expected = retrieval_files.taught(**change).training_examples(3, 1, 2)
    assert [e.label for e in read.training_examples(3, 1, 2)] == [e.label for e in expected]


def test_limits_of_a_prepared_search_are_of_queries(tokenizer, tmp_path):
    limited = retrieval_files.options({"max_eval_examples": 3, "max_train_examples": 4})
    source = registry.get("toy_retrieval", limited)
    write(source, tokenizer, tmp_path)
    read = PreparedSource("toy_retrieval", tmp_path, limited)
    assert read.size("validation") == source.size("validation") > 3
    assert read.size("train") == 4


def test_options_of_retrieval_concern_retrieval_only(root, tokenizer):
    """Folders of other tasks, of earlier versions too, lack these options."""
    info = json.loads((root / "classes" / prepared.INFO).read_text())
    assert "retrieval" not in info["options"]
    other = dataclasses.replace(DATA, retrieval=retrieval_files.options(negatives=7).retrieval)
    own = {"positive": "", "negative": "", "score": ""}
    read = PreparedSource("classes", root, dataclasses.replace(other, own=own))
    prepared.check_prepared([read], tokenizer, OPTIONS.max_length)


def test_a_prepared_teacher_is_noticed(tokenizer, tmp_path):
    write(retrieval_files.taught(), tokenizer, tmp_path)
    limits = {"max_train_examples": 3, "max_eval_examples": 2}
    plain = registry.get("toy_retrieval", retrieval_files.options(limits))
    write(plain, tokenizer, tmp_path)
    taught, toy = (PreparedSource(n, tmp_path, plain.options) for n in ("taught", "toy_retrieval"))
    assert taught.has_teacher and not toy.has_teacher
