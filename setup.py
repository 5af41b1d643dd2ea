"""Package metadata: the one place that names dependencies and extras. Locks are made from it by `make lock`."""

import pathlib

import setuptools

ROOT = pathlib.Path(__file__).parent

DEPENDENCIES = [
    "absl-py",
    "clu",
    "etils[epath]",
    "flax>=0.12",
    "einops",
    "importlib_resources",  # tensorflow-datasets imports it without declaring it
    "ir-measures",
    "jax>=0.10",
    "jaxtyping",
    "ml-collections",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "pyarrow",
    "qwix",
    "rax",
    "safetensors",
    "scikit-learn",
    "scipy",
    "sentencepiece",
    "seqio",
    "tensorboard",  # clu imports it without declaring it
    "tensorflow",
    "tensorflow-datasets",
    "tokenizers",
    "tqdm",
]

NOTEBOOK = ["ipykernel", "matplotlib", "pandas"]

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "notebook": ["jupyterlab", *NOTEBOOK],
    "bench": [
        "accelerate",
        "sentence-transformers",
        "torch",
        "transformers",
    ],  # what benchmarks compare with; used nowhere else
    # Beam needs protobuf 6: its environment is one of its own, with its own lock (`make prepare-setup`).
    "prepare": ["apache-beam>=2.60", "protobuf<7", "sentencepiece<0.2.1"],
    # The tests run the notebooks. The gemma package is what weights and hidden states are compared with.
    # With jax[tpu], programs are compiled for a TPU that is not there.
    "test": [
        "gemma>=3.3",
        "hypothesis",
        "jax[tpu]",
        "kauldron>=1.3",
        "nbclient",
        "pytest",
        "pytest-xdist",
        "ruff",
        *NOTEBOOK,
    ],
}

setuptools.setup(
    name="gemma_encoder",
    version="0.1.0",
    description="Gemma 2 and Gemma 3 decoders as text encoders for classification, regression and ranking, in Flax NNX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["gemma_encoder*", "experiments*", "launch*"]),
    package_data={"gemma_encoder": ["assets/*"]},
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
)
