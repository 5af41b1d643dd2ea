"""The training program under its former name: `--mode` selects train, evaluate or predict.

    python -m gemma_encoder.main --config=CONFIG --workdir=DIR [--mode=train|eval|predict]
        [--config.FIELD=VALUE ...]

It is `gemma-encoder train`, `evaluate` and `predict` in one program, with the flags of all three.
"""

from gemma_encoder import stopping

if __name__ == "__main__":
    stopping.start()  # before other imports, so that Ctrl-C ends them in one line, too

import shlex
import sys
from collections.abc import Sequence

from gemma_encoder import runtime
from gemma_encoder.cli import commandline, evaluate, predict, train

MODES = ("train", "eval", "predict")


def main(argv: Sequence[str]) -> int:
    """Runs the program with arguments (without the program name), and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = commandline.Flags(__doc__)
    train.add_run_flags(flags)
    flags.choice("mode", "Start or resume training, evaluate, or score texts.", MODES, "train")
    predict.add_prediction_flags(flags)
    config = flags.parse(argv)
    if flags["mode"] == "predict":
        return predict.predict_from_flags(flags)
    config, workdir = train.checked(flags, config)
    if flags["mode"] == "eval":
        return evaluate.evaluate_and_report(config, workdir)
    command = shlex.join(["python", "-m", "gemma_encoder.main", *argv])
    return train.train_and_report(config, workdir, command)


def _program() -> int:
    runtime.use_huge_pages()
    runtime.quiet()
    runtime.collect_garbage_rarely()
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(stopping.run(_program))
