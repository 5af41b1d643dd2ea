"""The commands and Python examples of every page, run in order as a user would, at smoke size.

Pods are launched with --dry_run. Each page stands on what the fixture `home` holds, not on others.
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from gemma_encoder import cli
from gemma_encoder.evaluation import leaderboards
from tests import pages

ROOT = pages.ROOT
ELSEWHERE = {  # what a command begins with, and where it is tried, or why it is not
    "make ": "the Makefile's own targets: continuous integration runs `make test`",
    "export ": "the test sets the folders",
    ".venv-prepare/": "tests/test_prepare.py, in Beam's environment",
    "MSMARCO_DIR=DATA .venv-prepare/": "tests/test_prepare.py, in Beam's environment",
    ".venv/bin/python -m pytest ": "a test",
    ".venv/bin/python -m gemma_encoder.experiments.pretraining.bag_of_embeddings ": (
        "tests/experiments/test_bag_of_embeddings.py"
    ),
    ".venv/bin/pip ": "needs a package index",
    ".venv/bin/jupyter ": "tests/test_notebooks.py",
    ".venv/bin/tensorboard ": "a server",
    "gcloud ": "needs a cloud project",
    "kubectl ": "needs a cluster",
    "xpk ": "needs a cluster",
    "test -f ": "makes a key for a cloud project",
    "eval ": "an agent for that key",
}
PROGRAM = ".venv/bin/gemma-encoder"
SHORT = ["--config.train_for=2 steps", "--config.max_eval_examples=16"]


def ours(page: str) -> list[str]:
    return [line for line in pages.commands(page) if line.startswith(f"{PROGRAM} ")]


@pytest.mark.parametrize("page", pages.PAGES)
def test_every_command_exists(page):
    strange = [
        line
        for line in pages.commands(page)
        if not (line.startswith(f"{PROGRAM} ") and line.split()[1] in cli.COMMANDS)
        and not line.startswith(tuple(ELSEWHERE))
    ]
    assert not strange


SMALLER = {  # what is replaced in a command, besides the smoke variant of its config
    "size=gemma3_270m": "size=pretrained",
    "size=gemma2_9b": "size=tiny",
    "scale=gemma2_2b": "scale=gemma3_270m",
    "--topology=v5e:8x8": "--topology=v5e:2x2",
    "--topology=v5e:4x4": "--topology=v5e:2x2",
    "micro_batches=8": "micro_batches=2",
    "--config.model.pretrained=BAG": "--config.seed=1",  # from random weights
}


def small(words: list[str]) -> list[str]:
    """The same command at smoke size."""
    result = []
    for word in words:
        for large, little in SMALLER.items():
            word = word.replace(large, little)
        if match := re.fullmatch(r"--config=([\w/]+)(?::(.*))?", word):
            argument = f"{match[2]}," if match[2] else ""
            word = f"--config={match[1]}:{argument}smoke"
        result.append(word)
    if words[1] in ("train", "evaluate", "pretrain"):
        result += SHORT
    if any("ablations/" in word for word in words) or words[1] == "sweep":
        result += ["--config.model.pretrained=weights"]
    if words[1] == "sweep":
        result += ["--smoke", "--seeds=1", "--tasks=sst2", "--rows=bidirectional,causal", *SHORT]
    if words[1] in ("plan", "launch"):  # rows and readers that four chips on one host can share
        result += ["--config.batch.rows=16", "--config.batch.readers=4"]
    return result


@pytest.fixture(scope="module")
def home(tmp_path_factory, prepared, random_predictor):
    """A folder with what the README assumes: project, user files, data, a checkpoint."""
    import gemma_encoder as ge
    from gemma_encoder.inputs.tokenizer import SMALL

    folder = tmp_path_factory.mktemp("home")
    words = ["good", "bad", "fine", "dull"]
    for name, count in (("train", 40), ("dev", 8)):
        rows = "".join(
            f"the {name} film {i} was {words[i % 4]} .,{('yes', 'no')[i % 2]}\n"
            for i in range(count)
        )
        (folder / f"{name}.csv").write_text(f"text,label\n{rows}")
    for name in ("tone", "tone_dev"):
        rows = "".join(f"film {i} was {words[i % 4]}\t{'ab'[i % 2]}\n" for i in range(40))
        (folder / f"{name}.tsv").write_text(rows)
    (folder / "texts.txt").write_text("a fine film .\na dull one .\n")
    (folder / "texts.csv").write_text("id,text\n1,a fine film .\n2,a dull one .\n")
    scifact = folder / "beir" / "scifact"
    (scifact / "qrels").mkdir(parents=True)
    (scifact / "corpus.jsonl").write_text(
        "".join(
            json.dumps({"_id": f"d{i}", "title": f"title {i}", "text": f"text {i}"}) + "\n"
            for i in range(6)
        )
    )
    (scifact / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": f"query {i}"}) + "\n" for i in range(2))
    )
    (scifact / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq0\td1\t1\nq1\td2\t1\n"
    )
    (scifact / "run.test.tsv").write_text(
        "".join(f"q{q}\td{d}\t{rank}\n" for q in range(2) for rank, d in enumerate(range(5), 1))
    )
    ge.export_huggingface(random_predictor(), folder / "gemma-3-270m", heads=False)
    for ours in ("gemma_encoder.json", "digests.json"):  # a published folder has neither
        (folder / "gemma-3-270m" / ours).unlink()
    ge.save_gemma(ge.load_backbone(folder / "gemma-3-270m"), folder / "weights")
    (folder / "weights" / "tokenizer.model").write_bytes(SMALL.read_bytes())
    shared = ROOT.parent / "shared" / "data" / "cranfield_msmarco"
    (folder / "msmarco").symlink_to(shared)
    variables = {
        "TFDS_DATA_DIR": prepared,
        "BEIR_DIR": folder / "beir",
        "MSMARCO_DIR": shared,
        "PYTHONPATH": ROOT,
        "JAX_PLATFORMS": "cpu",
    }
    return folder, os.environ | {name: str(value) for name, value in variables.items()}


def run(home, words: list[str], folder: pathlib.Path | None = None) -> subprocess.CompletedProcess:
    folder, variables = folder or home[0], home[1]
    done = subprocess.run(
        [sys.executable, "-m", "gemma_encoder", *words[1:]],
        capture_output=True,
        text=True,
        cwd=folder,
        env=variables,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
    return done


def enlarge(predictions: pathlib.Path) -> None:
    """Repeats the predictions of the small test sets until they are as many as a leaderboard's."""
    (predictions / "digests.json").unlink()
    for file in leaderboards.BENCHMARKS["glue"]:
        path = predictions / f"{file.task}.{file.split}.jsonl"
        line = json.loads(path.read_text().splitlines()[0])
        path.write_text(
            "".join(
                json.dumps(line | {"example": index, "idx": index}) + "\n"
                for index in range(file.count)
            )
        )


IN_THE_TREE = ("plan", "launch")  # pods get the project that they are launched from
NOT_RUN = {
    "train --config=glue:sst2 --config.prepared=": "tests/test_prepare.py, in Beam's environment",
    "modules=": "modules that a test makes: tests/test_contributing.py, or of the page itself",
    "import mteb": "tests/retrieval/test_mteb_model.py, where it is installed",
    "sentence_transformers": "tests/weights/check_huggingface_export.py, where it is installed",
}


def run_command(home, line: str, modules: set[str]) -> None:
    """Runs a command of a page, at smoke size."""
    words = shlex.split(line)
    if any(mark in line for mark in NOT_RUN) and not any(name in line for name in modules):
        return
    if "msmarco" in line and not pathlib.Path(home[1]["MSMARCO_DIR"]).is_dir():
        return
    if "submit make" in line:  # one run that evaluated every task stands for a run of each
        evaluate = small(
            shlex.split(f"{PROGRAM} evaluate --config=multitask:glue --workdir=runs/glue")
        )
        run(home, [*evaluate, "--config.evaluate_split=test", "--config.max_eval_examples=0"])
        enlarge(home[0] / "runs" / "glue" / "predictions")
        words = [*words[: words.index("runs/cola")], "runs/glue"]
    in_the_tree = words[1] in IN_THE_TREE and words[2] != "local"
    if in_the_tree:
        assert words[1] == "plan" or "--dry_run" in words
    run(home, small(words), ROOT if in_the_tree else None)


def run_script(home, body: str) -> None:
    """Runs a Python example of a page."""
    folder, variables = home
    script = f"import numpy as np\ntokens = np.ones((1, 4), np.int32)\n{body}"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=variables, check=False
    )
    assert done.returncode == 0, f"{body}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in pages.PAGES if page != "CONTRIBUTING.md"])
def test_the_commands_and_examples_of_a_page(home, page):
    folder, _ = home
    if not (folder / "runs" / "quickstart").exists():  # make quickstart
        run(home, [PROGRAM, "train", "--config=quickstart:smoke", "--workdir=runs/quickstart"])
    scripts = []
    modules = set()
    for body in pages.blocks(page, "python"):
        if match := re.match(r"# ((\w+)\.py)\n", body):  # a module that a command names
            (folder / match[1]).write_text(body)
            modules.add(match[2])
        elif not any(mark in body for mark in NOT_RUN):
            scripts.append(body)
    for line in ours(page):
        run_command(home, line, modules)
    for body in scripts:
        run_script(home, body)
