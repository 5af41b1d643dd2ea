"""Every command of the READMEs, run in their order as a new user would, at smoke size; pods by --dry_run."""

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

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
ELSEWHERE = {  # what a command begins with, and where it is tried, or why it is not
    "make ": "the Makefile's own targets: continuous integration runs `make test`",
    "export ": "the test sets the folders",
    ".venv-prepare/": "tests/test_prepare.py, in Beam's environment",
    "MSMARCO_DIR=DATA .venv-prepare/": "tests/test_prepare.py, in Beam's environment",
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
SHORT = ["--config.train_for=2 steps", "--config.max_eval_examples=8"]


def blocks(readme: str, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall((ROOT / readme).read_text()) if found == language]


def commands(readme: str) -> list[str]:
    """The lines of all blocks that hold commands, continued lines joined, comments dropped."""
    lines = []
    for body in blocks(readme, ""):
        if body.startswith("gemma_encoder/\n"):
            continue  # a tree of folders
        joined = re.sub(r"\\\n\s*", "", body)
        lines += [
            line
            for line in (re.sub(r"\s+#.*$", "", line).strip() for line in joined.splitlines())
            if line
        ]
    return lines


def ours(readme: str) -> list[str]:
    return [line for line in commands(readme) if line.startswith(f"{PROGRAM} ")]


@pytest.mark.parametrize("readme", ["README.md", "launch/README.md", "experiments/README.md"])
def test_every_command_is_known(readme):
    strange = [
        line
        for line in commands(readme)
        if not (line.startswith(f"{PROGRAM} ") and line.split()[1] in cli.COMMANDS)
        and not line.startswith(tuple(ELSEWHERE))
    ]
    assert not strange


def small(words: list[str]) -> list[str]:
    """The same command at smoke size."""
    result = []
    for word in words:
        if match := re.fullmatch(r"--config=([\w/]+)(?::(.*))?", word):
            argument = (
                (match[2] or "")
                .replace("size=gemma3_270m", "size=pretrained")
                .replace("size=gemma2_9b", "size=tiny")
            )
            word = f"--config={match[1]}:{argument}{',' if argument else ''}smoke"
        result.append(word.replace("--topology=v5e:8x8", "--topology=v5e:2x2"))
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
    """A folder with what the README takes for granted: the project, a user's files, data, a pretrained checkpoint."""
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
    (folder / "gemma-3-270m" / "gemma_encoder.json").unlink()
    ge.save_gemma(ge.load_backbone(folder / "gemma-3-270m"), folder / "weights")
    (folder / "weights" / "tokenizer.model").write_bytes(SMALL.read_bytes())
    shared = ROOT.parent / "shared" / "data" / "cranfield_msmarco"
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
    for file in leaderboards.BENCHMARKS["glue"]:
        path = predictions / f"{file.task}.{file.split}.jsonl"
        line = json.loads(path.read_text().splitlines()[0])
        path.write_text(
            "".join(
                json.dumps(line | {"example": number, "idx": number}) + "\n"
                for number in range(file.count)
            )
        )


@pytest.mark.slow
def test_the_readmes_commands(home):
    folder, variables = home
    run(
        home,
        [PROGRAM, "train", "--config=quickstart:smoke", "--workdir=runs/quickstart"],
    )  # make quickstart
    tried = 0
    scripts = blocks("README.md", "python")
    for body in list(scripts):
        if match := re.match(r"# (\w+\.py)\n", body):  # a module that a command names
            (folder / match[1]).write_text(body)
            scripts.remove(body)
    for line in ours("README.md"):
        words = shlex.split(line)
        if "msmarco" in line and not pathlib.Path(variables["MSMARCO_DIR"]).is_dir():
            continue
        if "--config.prepared" in line:  # tests/test_prepare.py
            continue
        if "submit make" in line:  # one run that evaluated every task stands for a run of each
            evaluate = small(
                shlex.split(f"{PROGRAM} evaluate --config=multitask:glue --workdir=runs/glue")
            )
            run(home, [*evaluate, "--config.evaluate_split=test", "--config.max_eval_examples=0"])
            enlarge(home[0] / "runs" / "glue" / "predictions")
            words = [*words[: words.index("runs/cola")], "runs/glue"]
        run(home, small(words))
        tried += 1
    assert tried > 10
    for body in scripts:
        if (
            "sentence_transformers" in body
        ):  # tests/weights/check_huggingface_export.py, where it is installed
            continue
        script = f"import numpy as np\ntokens = np.ones((1, 4), np.int32)\n{body}"
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            cwd=folder,
            env=variables,
            check=False,
        )
        assert done.returncode == 0, f"{body}\n{done.stderr}"


@pytest.mark.slow
def test_the_launchers_commands(home):
    for line in ours("launch/README.md"):
        words = shlex.split(line)
        assert words[1] == "plan" or "--dry_run" in words
        assert run(home, small(words), ROOT).stdout  # pods get the project they are launched from
