"""Draws from the policy's distribution, rebuilt from what policy.onnx answers: its mode and its scale.

The distribution is the one that was trained (training.networks.distribution): a motion is u tanh(|u|) / |u| with
u ~ N(location, scale^2 I), a command is one of its two ends.
"""

import math

import numpy as np
from numpy.typing import NDArray

from protos.spaces import ActionSpec

EDGE = 1 - 1e-6
"""A float32 mode on the bound itself has no finite location; it is taken to lie this close to it."""


def sample(
    mode: NDArray[np.float32], std: NDArray[np.float32], spec: ActionSpec, rng: np.random.Generator
) -> NDArray[np.float32]:
    """One action [A] in physical units.

    Args:
        mode: [A] physical, the greedy action.
        std: [A] physical: of a motion its scale before the squash.
    """
    normalized, scale = spec.normalize(mode).astype(float), std / spec.scale
    drawn = np.empty(spec.size)
    for field in spec.fields:
        part = spec.slice_of(field.name)
        noise = rng.standard_normal(len(field.components))
        if field.limit is None:
            high = rng.random() < (1 + normalized[part][0]) / 2
            drawn[part] = 1.0 if high else -1.0
        else:
            radius = float(np.linalg.norm(normalized[part]))
            inverse = math.atanh(min(radius, EDGE)) / radius if radius > 0 else 1.0
            drawn[part] = _squash(normalized[part] * inverse + scale[part] * noise)
    return spec.denormalize(drawn).astype(np.float32)


def _squash(u: NDArray[np.float64]) -> NDArray[np.float64]:
    radius = float(np.linalg.norm(u))
    return u * (math.tanh(radius) / radius) if radius > 0 else u
