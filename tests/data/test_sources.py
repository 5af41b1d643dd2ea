"""Sources: GLUE through its real files, MS MARCO's layout, the toy tasks; and every refusal of theirs."""

import itertools
import pathlib

import numpy as np
import pytest

from gemma_encoder.data import mixtures, registry
from gemma_encoder.data.msmarco import MsMarcoSource
from gemma_encoder.data.source import DataOptions, MemorySource
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

GLUE = {"glue_cola": (8551, 1043, 1063), "glue_sst2": (67349, 872, 1821), "glue_mrpc": (3668, 408, 1725), "glue_stsb": (5749, 1500, 1379)}


def records(source, split, **options):
    for batch in source.dataset(split, **options).batch(64):
        columns = {name: column.numpy() for name, column in batch.items()}
        yield from ({name: column[i] for name, column in columns.items()} for i in range(len(next(iter(columns.values())))))


@pytest.mark.parametrize("name", GLUE)
def test_glue_sizes_fields_and_labels(name, shared_data, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(shared_data / "tfds"))
    source = registry.get(name)
    assert tuple(source.num_records(split) for split in ("train", "validation", "test")) == GLUE[name]
    for split in ("train", "validation"):
        for record in itertools.islice(records(source, split), 200):
            (example,) = source.expand(record, split, None)
            text, _ = source.task.template.render(example.fields)
            assert text.startswith(name.removeprefix("glue_") + " sentence")
            source.task.check_label(example.label, split)
    (unlabelled,) = source.expand(next(records(source, "test")), "test", None)
    assert unlabelled.label == -1


def test_a_limit_takes_the_first_records(shared_data, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(shared_data / "tfds"))
    limited = registry.get("glue_cola", DataOptions(max_train=7, max_eval=5))
    assert limited.num_records("train") == 7
    whole = [r["sentence"] for r in itertools.islice(records(registry.get("glue_cola"), "validation"), 5)]
    assert [r["sentence"] for r in records(limited, "validation")] == whole


def test_missing_tfds_data_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"TFDS_DATA_DIR.*tfds build glue/sst2"):
        registry.get("glue_sst2").check()


def test_unknown_task_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'glue_sst2'"):
        registry.get("glue_sst3")


def test_a_task_is_registered_once(monkeypatch):
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    registry.register("mine", lambda options: None)
    with pytest.raises(InputError, match="already registered"):
        registry.register("mine", lambda options: None)


@pytest.mark.parametrize("name", ["toy_sentiment", "toy_similarity", "toy_ranking"])
def test_toy_tasks_are_valid_balanced_and_disjoint(name):
    source = registry.get(name)
    texts, labels = {}, {}
    for split in ("train", "validation"):
        rows = [example for record in source.records(split) for example in record]
        texts[split] = {tuple(sorted(example.fields.items())) for example in rows}
        labels[split] = np.array([example.label for example in rows])
        for example in rows:
            source.task.check_label(example.label, split)
            source.task.template.render(example.fields)
    assert not texts["train"] & texts["validation"]
    if name == "toy_sentiment":
        assert abs(labels["validation"].mean() - 0.5) < 0.05
    elif name == "toy_similarity":
        assert len(np.unique(labels["validation"])) >= 4
    else:
        assert all(sum(example.label for example in record) == 1 and len(record) == 10 for record in source.records("validation"))


def test_a_pass_is_complete_and_shuffled_by_the_seed():
    source = registry.get("toy_sentiment", DataOptions(max_train=300))
    orders = [[int(r["number"]) for r in records(source, "train", seed=seed)] for seed in (1, 1, 2)]
    assert sorted(orders[0]) == list(range(300))
    assert orders[0] == orders[1] != orders[2]


def test_shards_are_disjoint_and_together_complete():
    source = registry.get("toy_sentiment", DataOptions(max_train=101))
    shards = [{int(r["number"]) for r in records(source, "train", seed=3, shard=i, shards=4)} for i in range(4)]
    assert sum(map(len, shards)) == 101 and set.union(*shards) == set(range(101))


TASK = Task("t", "classification", Template("{x}"), ("accuracy",), ("a", "b"))


def memory(count):
    return MemorySource(TASK, DataOptions(), lambda split: [[Example({"x": f"text {i}"}, i % 2)] for i in range(count)])


def test_rates():
    sources = [memory(100), memory(300)]
    np.testing.assert_allclose(mixtures.rates(sources, "equal"), [0.5, 0.5])
    np.testing.assert_allclose(mixtures.rates(sources, "proportional"), [0.25, 0.75])
    # T5's temperature 2: the square roots of the sizes, 10 : 17.32.
    np.testing.assert_allclose(mixtures.rates(sources, "temperature", 2.0), [0.3660254, 0.6339746], rtol=1e-6)
    with pytest.raises(InputError, match="did you mean 'proportional'"):
        mixtures.rates(sources, "proportionl")
    with pytest.raises(InputError, match="temperature"):
        mixtures.rates(sources, "temperature", 0.0)


# MS MARCO's layout


FILES = {
    "collection.tsv": "10\ta passage on wings\n11\ta passage on heat\n12\tone on flutter\n13\tone on shells\n",
    "queries.train.tsv": "1\twhat are wings\n2\twhat is heat\n3\tno positive here\n",
    "qrels.train.tsv": "1\t0\t10\t1\n2\t0\t11\t2\n3\t0\t12\t0\n",
    "run.train.tsv": "1\t11\t1\n1\t10\t2\n1\t12\t3\n1\t13\t4\n2\t11\t1\n2\t12\t2\n3\t10\t1\n",
    "queries.dev.tsv": "7\tflutter of wings\n8\tnever retrieved\n",
    "qrels.dev.tsv": "7\t0\t12\t1\n8\t0\t13\t1\n",
    "run.dev.tsv": "7\t12\t2\n7\t10\t1\n",
}


@pytest.fixture
def marco(tmp_path, monkeypatch):
    def make(options=None, **changes) -> MsMarcoSource:
        for name, content in (FILES | {key.replace("__", "."): value for key, value in changes.items()}).items():
            path = tmp_path / name
            path.write_bytes(content if isinstance(content, bytes) else content.encode()) if content is not None else path.unlink(missing_ok=True)
        monkeypatch.setenv("MSMARCO_DIR", str(tmp_path))
        source = registry.get("msmarco", options or DataOptions(list_size=3))
        source.check()
        return source

    return make


def test_training_lists_hold_a_positive_and_unjudged_negatives(marco):
    source = marco()
    assert source.query_ids("train") == ("1", "2")  # query 3 has no positive
    for draw in range(20):
        examples = source.expand({"number": 0}, "train", np.random.default_rng(draw))
        assert [e.label for e in examples] == [1, 0, 0]
        assert examples[0].document_id == "10" and len({e.document_id for e in examples}) == 3
        assert examples[0].fields == {"query": "what are wings", "document": "a passage on wings"}
    drawn = {tuple(e.document_id for e in source.expand({"number": 0}, "train", np.random.default_rng(i))[1:]) for i in range(20)}
    assert len(drawn) > 1
    assert [e.label for e in source.expand({"number": 1}, "train", np.random.default_rng(0))] == [2, 0]  # a shorter list: one negative


def test_negative_ranks_bound_the_sample(marco):
    source = marco(DataOptions(list_size=8, negative_ranks=(3, 4)))
    assert {e.document_id for e in source.expand({"number": 0}, "train", np.random.default_rng(0))[1:]} == {"12", "13"}


def test_evaluation_scores_every_candidate_in_the_runs_order(marco):
    source = marco()
    assert [e.document_id for e in source.expand({"number": 0}, "validation", None)] == ["10", "12"]
    assert source.qrels("validation") == {"7": {"12": 1}, "8": {"13": 1}}  # the query without candidates counts, as zero
    assert source.qrels("train").keys() == {"1", "2", "3"}


def test_top1000_serves_where_there_is_no_run(marco):
    source = marco(run__dev__tsv=None, top1000__dev__tsv="7\t12\tflutter of wings\tone on flutter\n7\t10\tflutter of wings\ta passage on wings\n")
    assert [e.document_id for e in source.expand({"number": 0}, "validation", None)] == ["12", "10"]


def test_long_passages_are_read_whole(marco):
    long = "word " * 5000 + "end"
    source = marco(collection__tsv=f"10\tshort\n11\t{long}\n12\tlast without newline")
    assert source.passages["11"] == long
    assert source.passages["12"] == "last without newline"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"collection__tsv": "10\ta\n11 no tab\n"}, r"collection.tsv:2: expected 2 tab-separated columns.*pid, passage"),
        ({"collection__tsv": "10\ta\n10\tb\n"}, r"collection.tsv:2: pid '10' appears a second time"),
        ({"collection__tsv": b"10\t\xff\xfe\n"}, r"collection.tsv:1: not valid UTF-8"),
        ({"queries__train__tsv": "1\t \n"}, r"queries.train.tsv:1: expected 2"),
        ({"qrels__train__tsv": "1\t0\t10\tyes\n"}, r"qrels.train.tsv:1: relevance must be a whole number, got 'yes'"),
        ({"run__train__tsv": "1\t99\t1\n"}, r"run.train.tsv:1: pid '99' is not in collection.tsv"),
        ({"run__train__tsv": "77\t10\t1\n"}, r"run.train.tsv:1: qid '77' is not in queries.train.tsv"),
        ({"qrels__train__tsv": "1\t0\t99\t1\n"}, r"qrels.train.tsv: pid '99' is not in collection.tsv"),
        ({"run__train__tsv": None}, r"holds no top1000.train.tsv or top100.train.tsv or run.train.tsv"),
        ({"qrels__train__tsv": "3\t0\t12\t0\n"}, r"no train query has a positive and a negative"),
    ],
)
def test_bad_files_are_named_with_their_line(marco, changes, message):
    with pytest.raises(InputError, match=message):
        marco(**changes).query_ids("train")


def test_missing_folder_says_what_it_should_hold(monkeypatch, tmp_path):
    monkeypatch.delenv("MSMARCO_DIR", raising=False)
    with pytest.raises(InputError, match="MSMARCO_DIR is not set; it names a folder with collection.tsv"):
        registry.get("msmarco").check()
    monkeypatch.setenv("MSMARCO_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="is not a folder"):
        registry.get("msmarco").check()


@pytest.mark.parametrize("options", [DataOptions(negative_ranks=(0, 5)), DataOptions(negative_ranks=(5, 2)), DataOptions(list_size=1)])
def test_bad_ranking_options(options):
    with pytest.raises(InputError, match="ranking"):
        registry.get("msmarco", options)


def test_cranfield_reads_whole(shared_data, monkeypatch):
    monkeypatch.setenv("MSMARCO_DIR", str(shared_data / "cranfield_msmarco"))
    source: MsMarcoSource = registry.get("msmarco")
    assert isinstance(source.folder, pathlib.Path)
    assert source.count("validation") == 75 and 100 <= source.count("train") <= 150
    assert sum(len(source.expand({"number": i}, "validation", None)) for i in range(75)) == 7500
