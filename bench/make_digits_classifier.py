"""Makes the two assets behind ``fpdm.evaluate``: ``python -m bench.make_digits_classifier [DIR]``.

    digits_classifier.safetensors   weights, float32, trained on split "train" alone; the metadata
                                    entry ``about`` holds settings and accuracies
    digits_baseline.json            distances between halves of the real digits

DIR is ``fpdm/assets`` unless given. Half a minute on one core; the same bytes on the same machine.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import save

from fpdm import classifier, quality
from fpdm.config import DataConfig
from fpdm.data import open_dataset
from fpdm.files import atomic_write


def make_classifier() -> bytes:
    """The weights' file."""
    train = open_dataset(DataConfig(kind="digits", split="train"))
    reference = open_dataset(DataConfig(kind="digits", split="reference"))
    seen, unseen = (data.batch(np.arange(len(data))) for data in (train, reference))
    weights = {name: w.float() for name, w in classifier.train(*seen).items()}
    about = {
        "trained_on": "the built-in digits, split train",
        "data": train.fingerprint,
        "seed": classifier.SEED,
        "steps": classifier.STEPS,
        "accuracy_train": classifier.accuracy(*seen, weights),
        "accuracy_reference": classifier.accuracy(*unseen, weights),
    }
    return save(weights, metadata={"about": json.dumps(about)})


def main(folder: Path) -> None:
    """Write both files into ``folder`` and say what is in them."""
    data = make_classifier()
    path = folder / classifier.WEIGHTS.name
    atomic_write(path, data)
    weights, about = classifier.read(path), classifier.about(path)
    baseline = {"classifier_sha256": hashlib.sha256(data).hexdigest()}
    baseline |= quality.measure_baseline(weights)
    text = json.dumps(baseline, indent=1)
    atomic_write(folder / quality.BASELINE.name, text.encode() + b"\n")
    print(
        f"{path}: {len(data)} bytes, {about['accuracy_reference']:.4f} of the reference half right"
    )
    print(
        f"Frechet distance of {len(baseline['seeds'])} halvings, {baseline['per_half']} each: "
        f"{baseline['frechet_mean']:.4f} +- {baseline['frechet_std']:.4f}; without stratification "
        f"{baseline['unstratified_frechet_mean']:.4f}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else classifier.WEIGHTS.parent)
