"""One run of training as a frozen dataclass. Presets are YAML files beside this one; every value has a flag."""

import argparse
import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import tyro
import yaml
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from protos.errors import Rejected
from training.agents.bc import BCConfig
from training.agents.cql import CQLConfig
from training.agents.iql import IQLConfig
from training.networks.family import NetworkConfig

PRESETS = Path(__file__).parent / "presets"
SETTINGS = "config.json"
"""The settings of a run, in its output directory."""
ANEW = frozenset(
    {"dataset", "output", "minutes", "updates", "device", "threads", "checkpoint_s", "resume"}
    | {"eval_every", "eval_episodes", "patience", "keep"}
)
"""What may differ when a run is resumed: where things lie, how long, on what it runs and how it is watched. The rest
makes another run."""
CLONING = {f"--cql.cloning-{name}" for name in ("temperature", "expectile", "value", "warm-up")} | {
    "--cql.largest-weight"
}
ALGORITHMS = {"bc": BCConfig, "iql": IQLConfig, "cql": CQLConfig}
NESTED = {"network": NetworkConfig, **ALGORITHMS}


@dataclass(frozen=True)
class RunConfig:
    """Learn a policy from a dataset of recorded episodes and export it as one file, OUTPUT/policy.onnx.

    Exit code 0 when there is a policy, 1 when training or its export stopped (it says why), 2 for unknown flags, 130
    when it was interrupted: what was learned is saved.

    Example: python -m training.run --dataset runs/drawer20 --algo bc --output runs/bc
    """

    dataset: Path
    """Directory of a Minari dataset, as `python -m sim_client.collect` writes it."""
    output: Path
    """Where checkpoints, logs and policy.onnx go. Must be new, unless --resume."""
    preset: str = "cpu"
    """The defaults of everything below: the name of a file in training/presets, or the path of your own copy of one.
    cpu: the best policy in minutes on two cores. gpu: the same on one GPU. paper: the sizes and rates of
    arXiv 2406.13961."""
    algo: Literal["bc", "iql", "cql"] = "bc"
    """bc imitates; iql also learns what is worth imitating, from rewards; cql learns what may be better still."""
    equivariance: Literal["both", "actor", "critic", "none"] = "both"
    """Which networks are equivariant; the value goes with the critic. The others are plain CNNs of a like size."""
    seed: int = 0
    """Of initial weights, batches and augmentation."""
    minutes: float | None = None
    """Stop after this many minutes of updates, those before a --resume among them. Set-up, probes, checkpoints, waiting
    for the last evaluations and export come on top."""
    updates: int | None = None
    """Stop after this many updates. With both limits, whichever comes first."""
    batch_size: int = 32
    """Transitions per update."""
    learning_rate: float = 1e-3
    """Adam's."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: the learning rate falls to zero over the budget, the nearer of --minutes and --updates."""
    discount: float = 0.99
    """What a reward one step later is worth."""
    n_step: int = 1
    """Steps of recorded reward before an update trusts a value; more carry a sparse reward back in fewer updates."""
    augmentation: Literal["o2", "so2", "se2", "none"] = "so2"
    """so2: every sampled transition is turned by a random angle. o2: and mirrored half of the time, for tasks without
    a left and a right. se2: turned, and moved under the view by up to --shift-m. Applies to every --equivariance."""
    shift_m: float = 0.007
    """Of se2, in metres: two pixels of the default view. The action stays, so it is a tolerance that is asked for."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of convolutions during training. auto: bf16 where the processor has it, else fp32. Exports are fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if there is one."""
    threads: int | None = None
    """Of torch on the CPU; left out: OMP_NUM_THREADS, which torchrun sets to 1 for several processes, else as many as
    there are cores."""
    checkpoint_s: float = 30.0
    """Seconds between checkpoints."""
    failures: Literal["auto", "keep", "drop"] = "auto"
    """Episodes that never succeed. auto: bc drops them, iql and cql keep them."""
    eval_every: int | None = None
    """Measure closed-loop success every so many updates, in a process of its own while training goes on. Needs data
    that sim_client.collect recorded: others have no simulator."""
    eval_episodes: int = 50
    """Episodes of each of these evaluations."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a better success rate (its interval's lower end, that is)."""
    keep: Literal["best", "last"] = "best"
    """Which weights become policy.onnx where success was measured: best.pt or the last ones."""
    resume: bool = False
    """Continue the run in --output from its last checkpoint, with the settings that it was started with; only the
    budget, the device, --threads, --checkpoint-s, evaluation and the place of --dataset may be given anew."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    bc: BCConfig = field(default_factory=BCConfig)
    iql: IQLConfig = field(default_factory=IQLConfig)
    cql: CQLConfig = field(default_factory=CQLConfig)

    def __post_init__(self) -> None:
        for flag, value in _flags(self):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{flag} must be a finite number, got {value}")
        counts = ("batch_size", "n_step", "threads", "eval_every", "eval_episodes", "patience")
        for name in ("minutes", "updates", "learning_rate", "shift_m", "checkpoint_s", *counts):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"--seed must not be negative, and below 2^64, got {self.seed}")
        if not 0.0 <= self.discount < 1.0:
            raise ValueError(f"--discount must lie in [0, 1), got {self.discount}; the paper uses 0.99")
        if self.patience and not self.eval_every:
            raise ValueError("--patience counts evaluations: give --eval-every too, or --patience None")

    @property
    def successful_only(self) -> bool:
        return self.failures == "drop" or (self.failures == "auto" and self.algo == "bc")


def parse(argv: list[str]) -> RunConfig:
    """The command line over its preset or, with --resume, over the settings of the run that it continues.

    Exits with the usage on unknown flags.

    Raises:
        ValueError: on values out of range; as Rejected, when there is no run to resume, or a flag would change it.
        OSError: when a preset, or the settings of the run to resume, cannot be read.
    """
    # These three decide on the defaults of all other flags.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="cpu")
    first.add_argument("--output", type=Path)
    first.add_argument("--resume", action="store_true")
    known = first.parse_known_args(argv)[0]
    resumed = known.resume and known.output is not None
    defaults = _to_resume(known.output) if resumed else _preset(known.preset)
    given = defaults
    # A budget on the command line replaces the one there was, whichever kind that is.
    if any(argument.startswith(("--minutes", "--updates")) for argument in argv):
        given = replace(defaults, minutes=None, updates=None)
    config = tyro.cli(RunConfig, args=argv, default=given, prog="python -m training.run", description=RunConfig.__doc__)
    if config.resume and not resumed:
        raise Rejected("--resume", "--output, the directory of the run to continue", "none on the command line")
    if not (config.minutes or config.updates or config.patience):  # a preset of one's own may leave all of them out
        raise ValueError("nothing says when to stop: give --minutes, --updates, or --eval-every with --patience")
    if getattr(getattr(config, config.algo), "values_first", 0) and not (config.minutes or config.updates):
        raise ValueError(f"--{config.algo}.values-first is a share of a budget: give --minutes or --updates")
    if resumed:
        _require_same(defaults, config)
    for name in ALGORITHMS:
        if name != config.algo and (flags := _changed(f"{name}.", getattr(given, name), getattr(config, name))):
            raise ValueError(f"{flags[0][0]} means nothing to --algo {config.algo}: add --algo {name}, or leave it out")
    _require_effect(given, config)
    return config


def _require_effect(given: RunConfig, config: RunConfig) -> None:
    """Who changes what nothing reads believes that it is in force."""
    before, cql = dict(_flags(given)), config.cql
    changed = {flag for flag, value in _flags(config) if value != before[flag]}
    for flags, read, by in (
        ({"--shift-m"}, config.augmentation == "se2", "without --augmentation se2"),
        ({"--eval-episodes", "--keep"}, config.eval_every, "without --eval-every"),
        ({"--discount", "--n-step", "--network.critic-width"}, config.algo != "bc", "to --algo bc"),
        ({"--iql.warm-up"}, not config.iql.values_first, "with --iql.values-first"),
        ({"--cql.gap-rate"}, cql.gap is not None, "without --cql.gap"),
        ({"--cql.target-entropy"}, cql.entropy == "learned", "without --cql.entropy learned"),
        (CLONING, cql.cloning_weight, "without --cql.cloning-weight"),
    ):
        if (unread := changed & flags) and not read:
            raise ValueError(f"{min(unread)} means nothing {by}: change that, or leave it out")


def _preset(name: str) -> RunConfig:
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise Rejected("--preset", f"{known}, or the path of a .yaml file", name, "copy one of training/presets")
    try:
        values = yaml.safe_load(path.read_text())
        if not isinstance(values, dict):
            raise TypeError(f"{path} holds no settings by name")
        if ours := values.keys() & {"preset", "resume"}:
            raise TypeError(f"{', '.join(sorted(ours))}: only for the command line")
        return RunConfig(**_typed({"dataset": tyro.MISSING, "output": tyro.MISSING, "preset": name} | values))
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise Rejected(f"--preset {name}", "settings of training.run", str(error), "see --help") from error


def recorded(output: Path) -> RunConfig:
    """The settings of the run in `output`. Raises Rejected when there is none, or it is another version's."""
    path = output / SETTINGS
    try:
        return RunConfig(**_typed(json.loads(path.read_text()) | {"output": output, "resume": False}))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Rejected(str(output), "a run of training.run", "none", "name its --output") from error
    except (TypeError, ValueError, KeyError) as error:
        raise Rejected(str(path), "the settings of a run of this version", repr(error), "start a new run") from error


def _to_resume(output: Path) -> RunConfig:
    if not (output / SETTINGS).exists():
        raise Rejected("--resume", f"a run in {output}", "none", "start one without --resume, in an empty directory")
    return recorded(output)


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    """What YAML and JSON hold, as the types of RunConfig's fields. Raises TypeError where it is of another."""
    typed = dict(values)
    for name, made in NESTED.items():
        if name in values:
            part = values[name] or {}  # a heading alone
            if not isinstance(part, dict):
                raise TypeError(f"{name} = {part!r}: settings by name were expected below it")
            typed[name] = made(**_checked(made, {k: tuple(v) if isinstance(v, list) else v for k, v in part.items()}))
    for name in ("dataset", "output"):
        if isinstance(values[name], str):
            typed[name] = Path(values[name])
    return _checked(RunConfig, typed)


def _checked(made: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values, if they are what the fields of `made` say."""
    kinds = get_type_hints(made)
    for name, value in values.items():
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1)
            raise TypeError(f"there is no {name}" + (f"; did you mean {close[0]}?" if close else ""))
        try:
            if value is not tyro.MISSING:
                check_type(value, kinds[name], collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError as error:
            hint = "; YAML takes 1e-4 for text, write 1.0e-4" if _is_number(value) else ""
            raise TypeError(f"{name} = {value!r}: {error}{hint}") from error
        items = value if isinstance(value, tuple) else (value,)
        if any(isinstance(item, bool) for item in items) and kinds[name] is not bool:
            raise TypeError(f"{name} = {value!r}: a number was expected")  # to Python, yes and no are some
    return values


def _is_number(value: Any) -> bool:
    """A text that means one."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _require_same(recorded: RunConfig, given: RunConfig) -> None:
    for flag, old, new in _changed("", recorded, given):
        raise Rejected(flag, f"{old}, as the run was started", str(new), "start a new run for other settings")


def _changed(prefix: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """The flags by which two settings differ in what makes a run, with their values."""
    values = zip(_flags(old, prefix, without=ANEW), _flags(new, prefix, without=ANEW), strict=True)
    return [(flag, a, b) for (flag, a), (_, b) in values if a != b]


def _flags(settings: Any, prefix: str = "", *, without: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Every flag with its value; `without`: the names of some of a whole run's."""
    for name in (f.name for f in fields(settings) if prefix or f.name not in without):
        value = getattr(settings, name)
        if is_dataclass(value):
            yield from _flags(value, f"{name}.")
        else:
            yield f"--{prefix}{name}".replace("_", "-"), value
