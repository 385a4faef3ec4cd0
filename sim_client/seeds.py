"""Which scenes are whose: a scene is its seed, and no policy is tested on one that its data, or their noise, came from.

Recorded ones begin at 0, RECORDED_PER_SEED for each --seed of sim_client.collect; the others have their own ranges.
"""

RECORDED_PER_SEED = 1_000_000
SURVEYED = 700_000_000
"""And above: the tasks' own check-ups. Recorded scenes end here."""
SEEDS = SURVEYED // RECORDED_PER_SEED
"""So many seeds sim_client.collect has."""
CALIBRATED = 800_000_000
"""The noise of a noisy expert is chosen on these."""
WATCHED = 850_000_000
"""A training evaluates itself on these."""
EVALUATED = 900_000_000
EVALUATED_PER_SEED = 100_000
