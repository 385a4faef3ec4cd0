"""Run by torchrun in test_loop: for each named run some updates, then what this process's agent has become."""

import hashlib
import json
import os
import sys
from typing import Any
from unittest import mock

import torch

from protos.errors import Rejected
from training import loop
from training.agents.agent import Agent, Diverged
from training.config import parse
from training.loop import Run, make_agent
from training.run import main, train

DIVERGES, REFUSED, WHOLE = "diverges", "refused", "whole"
"""In the first of these runs, the data of one process turn to NaN; the second must not start; the third is the whole
command, and comes last, since it takes leave of the other process."""


def tell(line: str) -> None:
    """At once: torchrun's processes are not buffered, and print writes a line's end by itself."""
    sys.stdout.write(f"{line}\n")


def apart(*how: Any) -> Agent:
    """An agent that begins a little elsewhere in each process, as on another processor."""
    agent = make_agent(*how)
    with torch.no_grad():
        next(agent.parameters()).add_(1e-3 * int(os.environ["RANK"]))
    return agent


def say(name: str, arguments: list[str]) -> None:
    with mock.patch.object(loop, "make_agent", apart):
        run = Run(parse(arguments))
    drawn: list[int] = []
    draw = run.dataset.draw

    def noted(*args: Any) -> Any:
        index = draw(*args)
        drawn.extend(index.tolist())
        return index

    object.__setattr__(run.dataset, "draw", noted)  # it is frozen
    who = f"{name}: rank {run.processes.rank}"
    if name == DIVERGES and run.processes.rank == 1:
        run.dataset.reward[:] = float("nan")
    try:
        while run.progress < 1:
            run.step()
    except Diverged as error:
        tell(f"{who} stopped: {error}")
        return
    tell(f"{who} drew {hashlib.sha256(str(drawn).encode()).hexdigest()}")
    state = run.learner.agent.state_dict()
    digest = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state)))
    tell(f"{who} has {digest.hexdigest()}")


def refuse(name: str, arguments: list[str]) -> None:
    try:
        train(parse(arguments))
    except Rejected as error:
        tell(f"{name}: rank {os.environ['RANK']} refused: {error}")


if __name__ == "__main__":
    if "PYTHONHASHSEED" not in os.environ:  # what depends on it shall differ each time, as it may where nobody sets it
        again = [sys.executable, "-m", "tests.training.one_agent", *sys.argv[1:]]
        os.execve(sys.executable, again, os.environ | {"PYTHONHASHSEED": str(1 + int(os.environ["RANK"]))})
    for name, arguments in json.loads(sys.argv[1]).items():
        if name == WHOLE:
            sys.argv = ["training.run", *arguments]
            sys.exit(main())
        (refuse if name == REFUSED else say)(name, arguments)
