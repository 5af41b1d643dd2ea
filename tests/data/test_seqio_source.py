"""Tasks of seqio's registry as sources."""

import numpy as np
import pytest

from gemma_encoder.data import mixtures, prepared, registry
from gemma_encoder.data.evaluation_stream import evaluation_stream
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import ExampleTable


@pytest.fixture(scope="module")
def others(seqio, tmp_path_factory):
    """A folder, and the preprocessor of T5 for GLUE."""
    folder = tmp_path_factory.mktemp("others")
    (folder / "sentences.tsv").write_text("".join(f"sentence {i}\t{i % 2}\n" for i in range(40)))
    import tensorflow as tf

    def glue(dataset, name, fields, classes):
        """As T5's `preprocessors.glue`: "sst2 sentence: …" -> "positive"."""

        def text_to_text(record):
            parts = [name]
            for field in fields:
                parts += [f"{field}:", record[field]]
            if classes:
                target = tf.cond(
                    tf.equal(record["label"], -1),
                    lambda: tf.constant("<unk>"),
                    lambda: tf.constant(classes)[record["label"]],
                )
            else:
                target = tf.as_string(tf.round(record["label"] * 5) / 5, precision=1)
            return {"inputs": tf.strings.join(parts, separator=" "), "targets": target}

        return dataset.map(text_to_text)

    return folder, glue


@pytest.fixture
def t5(seqio, others, benchmarks):
    """seqio with T5-style GLUE tasks and a mixture, with tokenized features."""
    import functools

    from gemma_encoder.inputs.tokenizer import SMALL

    _, glue = others
    vocabulary = seqio.SentencePieceVocabulary(str(SMALL))
    features = {name: seqio.Feature(vocabulary, add_eos=True) for name in ("inputs", "targets")}
    declared = {
        "t5_sst2": ("glue/sst2:2.0.0", ["sentence"], ["negative", "positive"]),
        "t5_cola": ("glue/cola:2.0.0", ["sentence"], ["unacceptable", "acceptable"]),
        "t5_stsb": ("glue/stsb:2.0.0", ["sentence1", "sentence2"], None),
    }
    for name, (dataset, fields, classes) in declared.items():
        if name in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=seqio.TfdsDataSource(dataset, tfds_data_dir=str(benchmarks)),
            preprocessors=[
                functools.partial(
                    glue, name=name.removeprefix("t5_"), fields=fields, classes=classes
                ),
                seqio.preprocessors.tokenize,
                seqio.preprocessors.append_eos,
            ],
            output_features=features,
        )
    if "t5_glue" not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add("t5_glue", [("t5_sst2", 3.0), ("t5_cola", 1.0)])
    return seqio


def test_glue_in_the_format_of_t5_is_the_same_task(t5, benchmarks):
    for theirs, ours in (
        ("t5_sst2", "glue_sst2"),
        ("t5_cola", "glue_cola"),
        ("t5_stsb", "glue_stsb"),
    ):
        made = registry.get(f"seqio:{theirs}")
        official = registry.get(ours)
        assert (made.task.name, made.task.kind) == (theirs, official.task.kind)
        assert set(made.task.classes) == set(official.task.classes)
        for split in ("train", "validation", "test"):
            assert made.size(split) == official.size(split)
            seen = [
                [
                    (source.task.template.render(e.fields)[0].strip(), e.label)
                    for index in range(source.size(split))
                    for e in source.examples(split, index)
                ]
                for source in (made, official)
            ]
            if official.task.classes:
                names = [
                    [
                        (text, source.task.kind.show_label(source.task, label))
                        for text, label in part
                    ]
                    for source, part in zip((made, official), seen, strict=True)
                ]
                assert sorted(names[0]) == sorted(names[1])
            else:
                assert [text for text, _ in sorted(seen[0])] == [
                    text for text, _ in sorted(seen[1])
                ]
    assert {e.label for i in range(4) for e in made.examples("test", i)} == {-1.0}


def test_seqio_mixtures_keep_their_rates(t5):
    names = mixtures.expand_mixtures(("seqio:t5_glue", "toy_ranking"))
    assert names == ("seqio:t5_glue/t5_cola", "seqio:t5_glue/t5_sst2", "toy_ranking")
    sources = [registry.get(name) for name in names]
    np.testing.assert_allclose(mixtures.rates(sources[:2], "proportional"), [0.25, 0.75])
    np.testing.assert_allclose(mixtures.rates(sources[:2], "equal"), [0.5, 0.5])
    cola, sst2, ranking = (source.size("train") for source in sources)
    share = (cola + sst2) / (cola + sst2 + ranking)  # divided by the rates of the mixture
    np.testing.assert_allclose(
        mixtures.rates(sources, "proportional"), [share / 4, share * 3 / 4, 1 - share]
    )


def function_task(
    seqio, name, rows, features=("inputs", "targets"), splits=("train", "validation")
):
    """Registers a task over a Python function with untokenized features."""
    import tensorflow as tf

    def dataset(split, shuffle_files, seed=None):
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        return tf.data.Dataset.from_tensor_slices(columns)

    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    passed = seqio.PassThroughVocabulary(1)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset, splits=splits),
        preprocessors=[],
        output_features={
            feature: seqio.Feature(
                passed,
                add_eos=False,
                dtype=tf.as_dtype(np.array(rows[0][feature]).dtype.type)
                if not isinstance(rows[0][feature], str)
                else tf.string,
                rank=0,
            )
            for feature in features
        },
    )


def test_documents_of_a_query_are_ranked(seqio):
    rows = [
        {
            "inputs": f"query {q} document {d}",
            "targets": "true" if d == q % 3 else "false",
            "query_id": f"q{q}",
        }
        for q in range(6)
        for d in range(3)
    ]
    function_task(seqio, "their_ranking", rows)
    made = registry.get("seqio:their_ranking")
    assert made.task.kind is kinds.get("ranking") and made.size("train") == 6
    for index in range(6):
        examples = made.examples("validation", index)
        assert [e.label for e in examples] == [float(d == index % 3) for d in range(3)]
        assert {e.query_id for e in examples} == {f"q{index}"}
    drawn = made.examples("train", 2, np.random.default_rng(0))
    assert [e.label for e in drawn] == [1.0, 0.0, 0.0]


def test_fingerprints_are_of_the_content(seqio):
    def rows(flipped):
        return [{"inputs": f"text {i}", "targets": str((i + flipped) % 2)} for i in range(20)]

    prints = []
    for flipped in (0, 0, 1):
        function_task(seqio, "their_labels", rows(flipped))
        made = registry.get("seqio:their_labels")
        assert made.task.classes == ("0", "1")
        prints.append(made.fingerprints("train"))
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"inputs": f"text {i}", "targets": f"a summary of {i}"} for i in range(200)],
            "more than 100 distinct targets, such as 'a summary of 0'; an encoder predicts classes",
        ),
        ([{"inputs": "a", "targets": "x"}] * 3, "has 1 distinct targets, such as 'x'"),
        (
            [{"inputs": "a", "targets": "maybe", "query_id": "q"}] * 3,
            "need grades as targets; 'maybe' is neither a number nor true or false",
        ),
        ([{"text": "a", "label": 1}] * 3, "has no feature 'inputs'; it has"),
        (
            [{"inputs": [1, 2, 3], "targets": "x"}] * 3,
            "'inputs' is not text and cannot be decoded; make its preprocessor keep inputs_pre",
        ),
    ],
)
def test_unlearnable_tasks_are_errors(seqio, rows, message):
    function_task(seqio, "their_bad", rows, features=())
    with pytest.raises(InputError, match=message):
        registry.get("seqio:their_bad")


def test_missing_and_broken_tasks_are_errors(seqio, t5):
    with pytest.raises(
        InputError, match="unknown task or mixture of seqio 't5_sst'; did you mean 't5_sst2'"
    ):
        mixtures.expand_mixtures(("seqio:t5_sst",))
    rows = [{"inputs": "a", "targets": "x"}]
    function_task(seqio, "their_test", rows, splits=("test",))
    with pytest.raises(InputError, match="no train split to infer classes from, only test"):
        registry.get("seqio:their_test")
    function_task(seqio, "their_broken", rows)

    def broken(split, shuffle_files, seed=None):
        return 1 / 0

    seqio.TaskRegistry.get("their_broken").source._dataset_fn = broken
    with pytest.raises(InputError, match="train split cannot be read: ZeroDivisionError"):
        registry.get("seqio:their_broken")


def test_a_changed_preprocessor_is_detected(t5, benchmarks):
    """Tasks of seqio are read again at every start."""
    before = registry.get("seqio:t5_sst2").fingerprints("train")
    task = t5.TaskRegistry.get("t5_sst2")
    original = task._preprocessor_constructor_args
    task._preprocessor_constructor_args = [
        lambda dataset: original[0](dataset).map(lambda e: e | {"inputs": "new " + e["inputs"]}),
        *original[1:],
    ]
    task.__dict__.pop("preprocessors", None)
    changed = registry.get("seqio:t5_sst2")
    assert changed.examples("train", 0)[0].fields["inputs"].startswith("new ")
    assert changed.fingerprints("train") != before


def test_duplicate_names_and_invalid_rates_are_errors(seqio, t5, micro):
    from gemma_encoder.training.build import build

    with pytest.raises(InputError, match="none twice"):
        build(micro(tasks=("seqio:t5_sst2", "seqio:t5_glue")))
    for name, rates in {"zero": (0.0, 0.0), "negative": (1.0, -0.5)}.items():
        if f"t5_{name}" not in seqio.MixtureRegistry.names():
            pairs = zip(("t5_sst2", "t5_cola"), rates, strict=True)
            seqio.MixtureRegistry.add(f"t5_{name}", list(pairs))
        sources = [registry.get(task) for task in mixtures.expand_mixtures((f"seqio:t5_{name}",))]
        with pytest.raises(InputError, match="rates must be positive"):
            mixtures.rates(sources, "proportional")


def test_validation_classes_are_checked_before_training(seqio):
    import tensorflow as tf

    def dataset(split, shuffle_files, seed=None):
        targets = ["a", "b"] if split == "train" else ["a", "c"]
        return tf.data.Dataset.from_tensor_slices({"inputs": ["x", "y"], "targets": targets})

    function_task(seqio, "their_split", [{"inputs": "a", "targets": "x"}])
    seqio.TaskRegistry.get("their_split").source._dataset_fn = dataset
    with pytest.raises(InputError, match="their_split, validation split: unknown class 'c'"):
        registry.get("seqio:their_split")
    with pytest.raises(InputError, match="unknown task or mixture of seqio 'nowhere/their_split'"):
        registry.get("seqio:nowhere/their_split")


def test_prepared_mixtures_keep_names_and_rates(t5, tokenizer, tmp_path):
    names = mixtures.expand_mixtures(("seqio:t5_glue",))
    for name in names:
        source = registry.get(name)
        folder = tmp_path / source.task.name
        prepared.begin(folder, prepared.describe_prepared(source, tokenizer, 64))
        for part in prepared.parts(source):
            prepared.write_part(source, part, tokenizer, 64, folder)
        prepared.finish(folder)
    ready = [prepared.PreparedSource(name, tmp_path, DataOptions()) for name in names]
    np.testing.assert_allclose(mixtures.rates(ready, "proportional"), [0.25, 0.75])


def test_preprocessors_may_use_seeds_and_lengths(seqio):
    """Seeded preprocessors are repeatable, and sequence lengths are defined."""
    import tensorflow as tf

    @seqio.map_over_dataset(num_seeds=1)
    def noisy(element, seed):
        noise = tf.random.stateless_uniform([], seed, 0, 1000, tf.int32)
        return element | {"inputs": element["inputs"] + tf.as_string(noise)}

    def shortened(dataset, sequence_length):
        return dataset.map(
            lambda e: e | {"inputs": tf.strings.substr(e["inputs"], 0, sequence_length["targets"])}
        )

    rows = [{"inputs": f"text {i}", "targets": "ab"[i % 2]} for i in range(20)]
    prints = []
    for _ in range(2):
        function_task(seqio, "their_noise", rows)
        task = seqio.TaskRegistry.get("their_noise")
        task._preprocessor_constructor_args = [noisy, shortened]
        for feature in task._output_features.values():
            object.__setattr__(feature, "rank", 1)  # as for a tokenized feature
        task._validate_preprocessing = lambda dataset: dataset
        task._trim_output_features = lambda dataset, sequence_length: dataset
        prints.append(registry.get("seqio:their_noise").fingerprints("train"))
    assert prints[0] == prints[1]


def test_targets_may_mark_unpublished_labels(seqio):
    import tensorflow as tf

    def made(train, test):
        def dataset(split, shuffle_files, seed=None):
            targets = test if split == "test" else train
            inputs = [f"text {i}" for i in range(len(targets))]
            return tf.data.Dataset.from_tensor_slices({"inputs": inputs, "targets": targets})

        splits = ("train", "validation", "test")
        function_task(seqio, "their_test", [{"inputs": "a", "targets": "x"}], splits=splits)
        seqio.TaskRegistry.get("their_test").source._dataset_fn = dataset
        return registry.get("seqio:their_test")

    for unpublished in ("<unk>", "-1"):
        source = made(["a", "b"] * 5, [unpublished] * 3)
        assert {e.label for i in range(3) for e in source.examples("test", i)} == {-1.0}
    with pytest.raises(
        InputError, match="train split has the target '<unk>', which marks an unpublished label"
    ):
        made(["a", "b", "<unk>"], ["a"])


def test_label_range_is_that_of_the_training_split(seqio, tokenizer):
    import tensorflow as tf

    def dataset(split, shuffle_files, seed=None):
        targets = ["0.0", "3.8"] if split == "train" else ["1.0", "5.0"]
        return tf.data.Dataset.from_tensor_slices({"inputs": ["a", "b"], "targets": targets})

    function_task(seqio, "their_scores", [{"inputs": "a", "targets": "x"}])
    seqio.TaskRegistry.get("their_scores").source._dataset_fn = dataset
    made = registry.get("seqio:their_scores")
    assert made.task.label_range == (0.0, 3.8)
    table = ExampleTable()
    options = StreamOptions(BatchShape(rows=1, row_length=16, segments=2), max_length=16)
    (batch,) = evaluation_stream(made, 0, "validation", tokenizer, options, table)
    assert table.labels == [1.0, 5.0]  # beyond the range, and evaluated
    np.testing.assert_allclose(batch.label[0], [1 / 3.8, 5 / 3.8], rtol=1e-6)  # float32


def test_query_ids_are_checked_before_training(seqio):
    import tensorflow as tf

    def dataset(split, shuffle_files, seed=None):
        columns = {"inputs": ["a", "b"], "targets": ["1", "0"]}
        queries = {"query_id": ["q", "q"]} if split == "train" else {}
        return tf.data.Dataset.from_tensor_slices(columns | queries)

    function_task(seqio, "their_queries", [{"inputs": "a", "targets": "x"}])
    seqio.TaskRegistry.get("their_queries").source._dataset_fn = dataset
    with pytest.raises(InputError, match="its validation split lacks the feature query_id"):
        registry.get("seqio:their_queries")
