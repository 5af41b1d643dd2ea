"""The program: flags in; train, evaluate or predict out.

    python -m gemma_encoder.main --config=experiments/quickstart.py --workdir=DIR [--mode=train|eval|predict] [--config.FIELD=VALUE …]

A run that ends well exits 0; whatever cannot be used exits 2 with one line that says why; a run that was told to stop (SIGTERM)
saves and exits 75: the same command goes on. Ctrl-C exits 130.
"""

import json
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

from gemma_encoder import runtime

if __name__ == "__main__":
    runtime.use_huge_pages()
runtime.quiet()

from absl import flags
from ml_collections import config_flags

from gemma_encoder import commandline
from gemma_encoder.inputs.errors import InputError

MODES = ("train", "eval", "predict")
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "File with get_config(); FILE:ARG passes ARG to it; --config.FIELD=VALUE changes a field.",
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run: checkpoints, metrics.jsonl, TensorBoard files, predictions.",
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    MODES,
    "train: train, or go on; eval: evaluate the newest checkpoint; predict: score the texts of --input.",
)
TASK = flags.DEFINE_string(
    "task",
    None,
    "predict: the task to score for; may be left out when the checkpoint knows only one.",
)
INPUT = flags.DEFINE_string(
    "input",
    None,
    "predict: .txt (one text a line), or .csv, .tsv, .jsonl, .parquet with a column for each of the task's fields; text also as .gz.",
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "predict: a .jsonl, .csv or .parquet file; by default JSON lines on the terminal. A run that was cut off goes on.",
)
COLUMNS = flags.DEFINE_list(
    "columns",
    None,
    "predict: the columns of --input that hold the task's fields, in their order, where they have other names.",
)
KEEP = flags.DEFINE_list(
    "keep", None, "predict: further columns of --input to repeat in the output, e.g. an id."
)


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    try:
        _parse(argv)
        if MODE.value == "predict":
            return _predict()
        return _train_or_evaluate()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; what was saved stays, and the same command goes on from it",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parse(argv: Sequence[str]) -> None:
    """Reads the flags; whatever is wrong with them becomes one line."""
    config = commandline.parse(argv, CONFIG)
    if WORKDIR.value is None:
        raise InputError("--workdir is missing: name a folder for the run")
    if MODE.value != "predict" and config is None:
        raise InputError(
            "--config is missing: name an experiment, e.g. --config=experiments/quickstart.py"
        )


def _train_or_evaluate() -> int:
    from gemma_encoder.training import loop, processes

    processes.start()
    if MODE.value == "train":
        outcome = loop.train(
            CONFIG.value,
            WORKDIR.value,
            shlex.join(["python", "-m", "gemma_encoder.main", *sys.argv[1:]]),
        )
    else:
        outcome = loop.evaluate(CONFIG.value, WORKDIR.value)
    if outcome.preempted:
        return processes.EXIT_PREEMPTED
    if not processes.is_main_process():
        return 0
    print(_summary(outcome, CONFIG.value.evaluate_split))
    return 0


def _summary(outcome, split: str) -> str:
    """What a person wants to see at the end: metrics beside chance, some predictions, the checkpoint, and what to do next."""
    lines = ["", f"{'task':<18} {'metric':<22} {split:>10} {'chance':>8}"]
    for name, values in outcome.metrics.items():
        task = outcome.predictions[name][0].task
        for metric, value in values.items():
            main_metric = metric.startswith(task.metrics[0])
            line = f"{name:<18} {metric:<22} {value:>10.3f}"
            lines.append(
                f"{line} {task.chance:>8.2f}" if main_metric and task.chance is not None else line
            )
        if not values:
            lines.append(f"{name:<18} predictions only: the {split} split has no labels")
    for name, predictions in outcome.predictions.items():
        lines += ["", f"{name}:"]
        for number, fields in enumerate(predictions[0].table.fields[:3]):
            text = " | ".join(fields.values())
            lines.append(
                f"  {text[:100]}{'…' if len(text) > 100 else ''}  ->  {_shown(predictions[0], number)}"
            )
    task, predictions = next(iter(outcome.predictions.items()))
    folder = outcome.checkpoint.parent.parent
    texts = folder / "predictions" / f"{task}.examples.jsonl"
    texts.write_text(
        "".join(json.dumps(fields) + "\n" for fields in predictions[0].table.fields[:10])
    )
    lines += ["", f"checkpoint: {outcome.checkpoint}"]
    if outcome.best and outcome.best[0] != outcome.step:
        lines.append(
            f"best checkpoint: {outcome.checkpoint.parent / str(outcome.best[0])}, {outcome.best[1]:.3f}"
        )
    if outcome.seconds:
        lines.append(f"training took {outcome.seconds:.0f} s, evaluation and checkpoints apart")
    lines += [
        "",
        "next, score texts; replace the file by one of your own:",
        f"  {_python()} -m gemma_encoder.main --workdir={folder} --mode=predict --task={task} --input={texts}",
    ]
    return "\n".join(lines)


def _python() -> str:
    """How this interpreter is called from here, e.g. .venv/bin/python."""
    path = os.path.relpath(sys.executable)
    return sys.executable if path.startswith("..") else path


def _shown(predictions, number: int) -> str:
    task, output, label = (
        predictions.task,
        predictions.outputs[number],
        predictions.table.labels[number],
    )
    if task.kind == "language_model":
        from gemma_encoder.evaluation.metrics import text_perplexity

        return f"perplexity {text_perplexity(output[None])[0]:.1f}"
    classes = task.kind == "classification"
    said = (
        f"{task.classes[int(output.argmax())]} {output.max():.2f}" if classes else f"{output:.2f}"
    )
    if task.is_unlabelled(label):
        return said
    return f"{said} (label: {task.classes[int(label)] if classes else f'{label:g}'})"


def _predict() -> int:
    if INPUT.value is None:
        raise InputError(
            "--input is missing: name a .txt, .csv, .tsv, .jsonl or .parquet file with texts"
        )
    from gemma_encoder.inference import Predictor
    from gemma_encoder.predict_file import predict_file

    predictor = Predictor.load(WORKDIR.value)
    output = pathlib.Path(OUTPUT.value) if OUTPUT.value else None
    predict_file(
        predictor,
        predictor.task(TASK.value),
        pathlib.Path(INPUT.value),
        output,
        COLUMNS.value or (),
        KEEP.value or (),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
