"""Distractors: small things on the table that have nothing to do with the task."""

import math

import numpy as np

from sim_client.objects import Body, Box, Traits
from sim_client.tasks.placing import Point, in_disc, until

REACH_M = 0.22
"""Distractors lie within this of the workspace's centre, where the camera sees them."""
RADIUS_M = 0.03
AWAY_XY = (10.0, 10.0)


class Clutter:
    """`count` small bodies, out of the way until they are scattered."""

    def __init__(self, client: int, count: int) -> None:
        shapes = np.random.default_rng(count)  # the same things in every episode; where they lie differs
        self._bodies = []
        for _ in range(count):
            length, width, height = shapes.uniform((0.008, 0.008, 0.006), (0.02, 0.02, 0.025))
            box = Box((length, width, height), (0, 0, height))
            self._bodies.append(Body(client, [box], Traits(), tuple(shapes.uniform(0.3, 0.9, 3))))

    def scatter(self, rng: np.random.Generator, turn: float, keep_out: list[tuple[Point, float]]) -> None:
        """Put every body somewhere on the table, outside the discs `keep_out` and apart from each other."""
        taken = list(keep_out)
        for index, body in enumerate(self._bodies):
            body.place(np.array(AWAY_XY) + index, 0.0)
            try:
                spot = until(lambda: in_disc(rng, REACH_M, turn), lambda spot: _is_free(spot, taken), tries=50)
            except RuntimeError:
                continue  # a full table: this one stays away
            taken.append((spot, RADIUS_M))
            body.place(spot, rng.uniform(-math.pi, math.pi) + turn)


def _is_free(spot: Point, taken: list[tuple[Point, float]]) -> bool:
    return all(np.linalg.norm(spot - centre) > radius + RADIUS_M for centre, radius in taken)
