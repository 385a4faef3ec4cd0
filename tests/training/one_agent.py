"""Run by torchrun in test_loop: some updates, then what this process's agent has become."""

import hashlib
import os
import sys
from typing import Any

from training import distributed
from training.agents.agent import Diverged
from training.config import parse
from training.loop import Run

if __name__ == "__main__":
    run = Run(parse(sys.argv[1:]))
    drawn: list[int] = []
    draw = run.dataset.draw

    def noted(*args: Any) -> Any:
        index = draw(*args)
        drawn.extend(index.tolist())
        return index

    object.__setattr__(run.dataset, "draw", noted)  # it is frozen
    if os.environ.get("DIVERGES") == str(run.processes.rank):
        run.dataset.reward[:] = float("nan")
    try:
        while run.progress < 1:
            run.step()
    except Diverged as error:
        print(f"rank {run.processes.rank} stopped: {error}", flush=True)
        sys.exit(distributed.leave())
    print(f"rank {run.processes.rank} drew {hashlib.sha256(str(drawn).encode()).hexdigest()}", flush=True)
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in run.learner.agent.parameters()))
    print(f"rank {run.processes.rank} has {digest.hexdigest()}", flush=True)
    distributed.leave()
