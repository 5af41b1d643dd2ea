"""Exports a fine-tuned checkpoint to the format of another library.

    gemma-encoder export --workdir=runs/sst2 --output=exported
    gemma-encoder export --workdir=runs/sst2 --output=backbone --format=gemma

`huggingface` writes a folder for transformers and sentence-transformers, with a model card;
`Predictor` loads it, too. `gemma` writes only the backbone, for `gm.ckpts.load_params` of the gemma
package, with tokenizer.model. `int8` writes a checkpoint for `Predictor` and gemma-encoder predict
on CPUs, a quarter of the size.
"""

from collections.abc import Sequence

from gemma_encoder import activity, terminal
from gemma_encoder.cli import commandline

FORMATS = ("huggingface", "gemma", "int8")


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = commandline.Flags(__doc__)
    flags.text("workdir", "Folder of a run, one of its checkpoints, or an export.")
    flags.text("output", "New folder, local or gs://.")
    flags.choice("format", "Format to write.", FORMATS, "huggingface")
    flags.switch(
        "heads",
        "Export the head, too (huggingface only); use --heads=false for embeddings only, or if "
        "the model has several heads.",
        default=True,
    )
    flags.modules()
    flags.parse(argv)
    workdir = flags.required("workdir", "name a run's folder or one of its checkpoints")
    output = flags.required("output", "name a new folder")
    with activity.starting(f"exporting to {output}"):
        if flags["format"] == "gemma":
            _export_gemma(workdir, output)
        elif flags["format"] == "int8":
            _export_int8(workdir, output)
        else:
            from gemma_encoder.inference import Predictor, export_huggingface

            export_huggingface(Predictor.load(workdir), output, heads=flags["heads"])
    terminal.print_note(f"wrote {output}")
    return 0


def _export_gemma(workdir: str, output: str) -> None:
    from etils import epath

    from gemma_encoder.inputs.errors import InputError
    from gemma_encoder.weights import backbone

    if epath.Path(output).exists():
        raise InputError(f"--output={output} exists; name a new folder")
    tokenizer = backbone.load_tokenizer(workdir)
    backbone.save_gemma(backbone.load_backbone(workdir), output, tokenizer)


def _export_int8(workdir: str, output: str) -> None:
    from gemma_encoder.inference import Predictor
    from gemma_encoder.weights import precision

    predictor = Predictor.load(workdir, quantization="int8")
    precision.save_for_inference(predictor.spec, predictor.parameters, output)
