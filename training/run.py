"""The command that turns a dataset into a policy: `python -m training.run --help`."""

import contextlib
import dataclasses
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from protos.errors import Rejected
from protos.files import Taken, held, remove_unfinished, write_atomically
from training import distributed
from training.agents.agent import Diverged
from training.config import SETTINGS, RunConfig, parse
from training.diagnostics import Probe
from training.distributed import to_resume
from training.evaluations import BEST, FOLDER, EvaluationError, Evaluations, Result, best
from training.export import ExportError, Provenance, code_version, export
from training.loop import CHECKPOINT, Run, saved
from training.memory import keep_freed_memory
from training.names import POLICY
from training.progress import curves, describe, log_success, progress_bar, show, warn_if_behind

LOG_EVERY, PROBE_EVERY = 20, 200
NO_MEMORY = "can't allocate memory"
"""What torch says of a CPU's, in a RuntimeError."""
SAME_SIGNAL_S = 0.5
"""Within this time, signals to several processes of a job are one."""


def train(config: RunConfig) -> Path:
    """Train until the budget is used, then export; returns the path of policy.onnx.

    Raises:
        Rejected: on a dataset, a network, a checkpoint or an output directory that does not fit; nothing has been
            written then. And after training, where it ended before its actor began or best.pt is none.
        Diverged: when a loss is not finite or a value has exploded; the last checkpoint is kept.
        EvaluationError: when an evaluation failed; a checkpoint has been saved.
        ExportError: when the policy's file is not the network that was trained; a checkpoint has been saved.
        OSError: when something cannot be read or written.
        RuntimeError: when there is too little memory; of a GPU's, torch.OutOfMemoryError.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, with a checkpoint saved; on a second one, perhaps without.
    """
    _require_free(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    run = Run(config)
    keep_freed_memory()  # only now: the copies of which the dataset was made go back to the kernel
    run.code_version = code_version()  # now: by the end of a long run the checkout may be at another commit
    evaluations = Evaluations(run) if config.eval_every else None  # in all processes: all refuse, or none
    if not run.processes.leads:
        return _train(run, None)
    with _alone(config):
        _clear_up(config.output)
        return _train(run, evaluations)


def _require_free(config: RunConfig) -> None:
    # A name with a dot is what a run that was killed while it wrote its settings has left.
    taken = config.output.exists() and any(not path.name.startswith(".") for path in config.output.iterdir())
    if taken and not config.resume:
        remedy = "choose another" + (", or add --resume" if (config.output / SETTINGS).exists() else "")
        raise Rejected("--output", "a new or empty directory", str(config.output), remedy)


@contextlib.contextmanager
def _alone(config: RunConfig) -> Iterator[None]:
    """No other process trains into the directory meanwhile: two would save over each other."""
    config.output.mkdir(parents=True, exist_ok=True)
    try:
        with held(config.output):
            _require_free(config)  # another may have come and gone while this one read its data
            yield
    except Taken as error:
        remedy = "wait for it, stop it, or choose another directory"
        raise Rejected("--output", "a directory in which no run is under way", str(config.output), remedy) from error


def _train(run: Run, evaluations: Evaluations | None) -> Path:
    """`train`, once it is certain that it may."""
    config = run.config
    if config.resume:
        run.restore()
        if run.progress >= 1 and run.processes.leads:
            spent = f"{run.updates} updates, {run.seconds / 60:.1f} minutes"
            print(f"the budget is used up ({spent}): no more updates; a larger --updates or --minutes goes on")
        if evaluations:
            evaluations.resume()
    if run.processes.leads:
        _record(config)  # only now is the directory taken: a mistyped flag must not take it
        describe(run)
    try:
        with _interrupt_noted() as stop:
            try:
                _loop(run, evaluations, stop)
            except OSError as error:  # the disk is full, and may have room for a checkpoint where one is replaced
                again = to_resume(config.output)
                with contextlib.suppress(OSError):
                    run.save()
                raise OSError(f"{_named(error, config.output)}. When that is mended, continue with: {again}") from error
            except EvaluationError as error:
                run.save()
                if not stop.wait(SAME_SIGNAL_S):  # who ends a whole job ends its evaluation first, perhaps
                    raise EvaluationError(f"{error}\n{_without_evaluation(run)}") from error
        if stop.is_set():
            raise KeyboardInterrupt
        return _export(run, evaluations) if run.processes.leads else config.output / POLICY
    finally:
        if evaluations is not None:
            evaluations.stop()


def _named(error: OSError, output: Path) -> str:
    """TensorBoard's writer names no file."""
    return str(error) if error.filename else f"{error}, of what lies in {output}"


def _clear_up(output: Path) -> None:
    """What processes that were killed while they wrote have left."""
    for name in (SETTINGS, CHECKPOINT, BEST, POLICY):
        remove_unfinished(output / name)
    for scratch in (output / FOLDER).glob(".update-*.pt.????????"):
        scratch.unlink()


def _without_evaluation(run: Run) -> str:
    """How to come to a policy where evaluation cannot be had."""
    by_patience = not (run.config.minutes or run.config.updates)  # it alone would have ended the run
    how = run.to_policy(*(("--updates", str(run.updates)) if by_patience else ()))
    return f"What was learned is saved; without evaluations, to a policy from the last weights: {how}"


def _export(run: Run, evaluations: Evaluations | None) -> Path:
    """policy.onnx from the best weights that evaluation found, or from the last ones."""
    config, updates, success = run.config, run.updates, None
    if not run.has_policy:
        values = f"time for the actor after --{config.algo}.values-first"
        raise Rejected("--minutes or --updates", values, f"{run.updates} updates", "give more, with --resume")
    results = evaluations.results() if evaluations else []
    if config.keep == "best" and results:
        state = saved(config.output / BEST, "the best snapshot of this run", "add --keep last", run.device, {"agent"})
        run.learner.agent.load_state_dict(state["agent"])
        success = best(results)
        updates = success.update
    provenance = Provenance(
        config.algo, config.equivariance, config.network.group, config.seed, updates, run.code_version
    )
    path = config.output / POLICY
    manifest = export(run.learner.agent, run.dataset, provenance, path, evaluation=_told(success))
    print(
        f"{path}: {run.updates} updates in {run.seconds / 60:.1f} min; equivariance error at most "
        f"{manifest.equivariance_error_90:.1e} at 90 degrees, {manifest.equivariance_error_45:.1e} at 45, to which "
        "no grid of pixels turns exactly"
        + (f"; from update {updates}, success {success.success_rate:.0%} while training" if success else "")
    )
    return path


def _told(result: Result | None) -> Mapping[str, Any]:
    """What the manifest says of closed-loop success; the scenes chose the weights, so a fresh evaluation finds less."""
    if result is None:
        return {}
    low, high = result.interval
    return dataclasses.asdict(result) | {"success_rate": result.success_rate, "wilson_low": low, "wilson_high": high}


@contextlib.contextmanager
def _interrupt_noted() -> Iterator[threading.Event]:
    """Note Ctrl-C and SIGTERM for the loop: between updates the state is whole, within one half old and half new.

    A second one stops at once.
    """
    stop = threading.Event()

    def note(*_: Any) -> None:
        stop.set()
        for number in before:
            signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _loop(run: Run, evaluations: Evaluations | None, stop: threading.Event) -> None:
    saved, leads, behind = run.seconds, run.processes.leads, False
    probe = Probe(run.dataset, run.config.seed)
    with curves(run) as log, progress_bar(disable=not leads) as bar:
        while run.progress < 1 and not _ended(run, evaluations, stop):
            scalars = run.step()
            done = run.progress >= 1
            if leads and (run.updates % LOG_EVERY == 0 or done):
                if run.updates % PROBE_EVERY == 0 or done:
                    scalars |= probe.look(run.learner.agent)
                for name, value in scalars.items():
                    log.add_scalar(name, value, run.updates)
                show(bar, run, scalars)
            bar.update(round(100 * run.progress, 1) - bar.n)
            if evaluations and run.has_policy and run.updates % (run.config.eval_every or 1) == 0:
                evaluations.take()
                behind = warn_if_behind(evaluations, run, warned=behind)
            if evaluations and run.updates % LOG_EVERY == 0:
                log_success(evaluations, evaluations.poll(), log)
            if leads and run.seconds - saved >= run.config.checkpoint_s:
                run.save()
                saved = run.seconds
        if leads:
            run.save()
        if evaluations and run.has_policy and run.progress >= 1:  # what was resumed may have been left without
            evaluations.take()
        if evaluations and evaluations.exhausted and run.progress < 1 and not stop.is_set():
            tqdm.write(
                f"--patience {run.config.patience}: so many evaluations brought nothing better, so training ends here; "
                "--resume with a larger --patience goes on"
            )
        run.processes.meet()
        if evaluations and not stop.is_set():
            bar.set_postfix_str(f"evaluations left: {evaluations.unfinished}; after Ctrl-C, --resume goes on with them")
            log_success(evaluations, evaluations.wait(stop), log)


def _ended(run: Run, evaluations: Evaluations | None, stop: threading.Event) -> bool:
    """Whether to stop before the budget is used: Ctrl-C, or evaluations that do not get better."""
    early = stop.is_set() or (evaluations is not None and run.updates % LOG_EVERY == 0 and evaluations.exhausted)
    return bool(run.processes.from_leader(float(early), run.device))


def _record(config: RunConfig) -> None:
    text = json.dumps(dataclasses.asdict(config), indent=2, default=str)
    write_atomically(config.output / SETTINGS, text.encode())


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """SIGTERM is Ctrl-C, also before the first update and at the export. And where TensorBoard's thread cannot write,
    the loop's next scalar raises that, too, and says what to do."""

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not isinstance(failed.exc_value, OSError):
            usual(failed)

    usual, threading.excepthook = threading.excepthook, hook
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        threading.excepthook = usual


def main() -> int:
    with _in_words():
        return _main()


def _main() -> int:
    try:
        config = parse(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s")
    logging.getLogger("training").setLevel(logging.INFO)
    try:
        train(config)
    except (Rejected, Diverged, EvaluationError, ExportError, OSError) as error:
        print(f"training stopped: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if distributed.lost_another(error):
            what = str(error).splitlines()[0]
            print(f"training stopped: {what}; if another of its processes has ended, it says why", file=sys.stderr)
            return 1
        if not (isinstance(error, torch.OutOfMemoryError) or NO_MEMORY in str(error)):
            raise
        smaller = "a smaller --batch-size or narrower --network.fields"
        elsewhere = ", or take --device cpu" if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"training stopped: {error}\nStart a new run with {smaller}{elsewhere}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        how = f"; continue with: {to_resume(config.output)}"
        begun = (config.output / CHECKPOINT).exists()
        print(f"\ninterrupted{how if begun else ' before the first update'}", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        distributed.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
