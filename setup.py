"""Package metadata: the single source of dependencies and extras; `make lock` derives the locks.

`gemma_encoder/experiments` and `gemma_encoder/launch` are symbolic links to the folders at the top
of the repository. A wheel contains their files as `gemma_encoder.experiments` and
`gemma_encoder.launch`.
"""

import pathlib

import setuptools

ROOT = pathlib.Path(__file__).parent

# For embedding, prediction and export. Lower bounds are tested versions; upper bounds are announced
# breaking changes.
DEPENDENCIES = [
    "absl-py>=2.1",
    "einops>=0.8",
    "etils[epath]>=1.9",
    "filelock>=3.12",  # JAX limits its cache size with it but does not declare it
    "flax>=0.12.8",
    "google-crc32c>=1.6",
    "importlib_resources>=6",  # imported by etils.epath, which does not declare it
    "jax>=0.10",
    "jaxtyping>=0.3",
    "ml-collections>=1.0",
    "numpy>=2.1",
    "orbax-checkpoint>=0.12,<1",  # version 1 changes the interface
    "pyarrow>=18",
    "qwix>=0.1.8",
    "safetensors>=0.5",
    "sentencepiece>=0.2",
    "tokenizers>=0.21",
    "tqdm>=4.66",
]

TRAIN = [
    "clu>=0.0.12",
    "grain>=0.2.15",
    "ir-measures>=0.3.7",
    "optax>=0.2.8",
    "rax>=0.4",
    "scikit-learn>=1.6",
    "scipy>=1.14",
    "tensorboard>=2.20",  # imported by clu, which does not declare it
    "tensorboardX>=2.6",  # writes TensorBoard event files without TensorFlow
]

# For reading prepared TensorFlow Datasets for the first time, and for seqio tasks.
TFDS = ["seqio>=0.0.20", "tensorflow>=2.21", "tensorflow-datasets>=4.9.9"]

# For BM25, approximate search, search of sparse vectors, and the metrics of a run.
RETRIEVAL = ["bm25s>=0.3", "faiss-cpu>=1.12", "ir-measures>=0.3.7", "scipy>=1.14"]

NOTEBOOK = ["ipykernel>=6.29", "matplotlib>=3.9", "pandas>=2.2"]

# `make docs`: the pages under docs/ and the API reference.
DOCS = ["furo>=2025.7", "myst-parser>=4.0", "sphinx>=8.2"]

EXTRAS = {
    "train": TRAIN,
    "tfds": TFDS,
    "retrieval": RETRIEVAL,
    "mteb": ["mteb>=2.26"],  # evaluation by its tasks; brings PyTorch, hence in no lock
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "notebook": ["jupyterlab>=4.2", *NOTEBOOK],
    "docs": DOCS,
    "bench": [
        "accelerate>=1.0",
        "sentence-transformers>=5.0",
        "torch>=2.5",
        "transformers>=4.57",
    ],  # baselines of the benchmarks; used nowhere else
    # Beam needs protobuf 6, hence a separate environment with its own lock (`make prepare-setup`).
    "prepare": [*TRAIN, *TFDS, "apache-beam>=2.60", "protobuf<7", "sentencepiece<0.2.1"],
    # The tests run the notebooks, compare weights and hidden states with the gemma package, and
    # compile programs for TPUs without one attached (jax[tpu]).
    "test": [
        *TRAIN,
        *TFDS,
        *DOCS,
        *RETRIEVAL,
        "gemma>=3.3",
        "hypothesis>=6.100",
        "jax[tpu]",
        "kauldron>=1.3",
        "nbclient>=0.10",
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "ruff>=0.8",
        *NOTEBOOK,
    ],
}

setuptools.setup(
    name="gemma_encoder",
    version="0.1.0",
    description=(
        "Gemma 2 and Gemma 3 decoders as text encoders for classification, regression and ranking, "
        "in Flax NNX"
    ),
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["gemma_encoder", "gemma_encoder.*"]),
    package_data={
        "gemma_encoder": ["py.typed", "assets/*"],
        # Pretrained decoders for configs of scale `mini`.
        "gemma_encoder.experiments": ["decoders/**/*"],
    },
    include_package_data=False,
    entry_points={"console_scripts": ["gemma-encoder = gemma_encoder.__main__:main"]},
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
)
