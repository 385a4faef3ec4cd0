"""How a server is set up: a TOML file, the environment (EQUISERVE_LISTEN=...), flags; each overrides the one before."""

import math
import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from serving.envelope import Limits, Workspace
from serving.errors import StartupError
from serving.frames import FrameRules

ENVIRONMENT = "EQUISERVE_"
MOST = 10**9
"""The largest number that a setting may have: timers, and the fields of answers, hold no larger ones."""
MOST_AT_ONCE = 1024
"""Of threads, inferences and waiting calls."""


@dataclass(frozen=True)
class Config:
    """Serve policies to robots over gRPC.

    Every policy must first reproduce its golden actions, turn with the scene if it claims to, and answer to its
    gripper input; a policy that does not is refused and the server does not start.

    Settings come from --config FILE (TOML, names as here with _), then from the environment (EQUISERVE_LISTEN and so
    on), then from flags; --check-config says whether they would work, and starts nothing.

    Exit code 0 when it was told to stop, 1 when it cannot start, 2 for unknown flags.
    """

    policy: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """[NAME=]policy.onnx, as training.run wrote it. Repeat for several; the first is the default. NAME: what callers
    ask for; left out, the task that the file names. Files given one NAME are its versions, the last the newest."""
    policies: Path | None = None
    """A folder of NAME.onnx files, served beside those. SIGHUP or PolicyAdmin loads what is new or changed there."""
    default_policy: str = ""
    """The name that answers callers who name none; left out: the first --policy, or the only one in the folder."""
    listen: str = "localhost:50051"
    """HOST:PORT. Port 0 takes a free one; the line "serving on HOST:PORT" on stdout says which."""
    insecure: bool = False
    """Allow an address that other machines can reach, without encryption: anyone there can then ask for motions, and
    read tokens. For a container whose port is published on the loopback interface, or a network of your own."""
    tls_cert: Path | None = None
    """PEM certificate chain of this server; with --tls-key. Replaced files are read again at the next connection."""
    tls_key: Path | None = None
    """PEM private key."""
    tls_client_ca: Path | None = None
    """PEM certificates that sign clients; with it a client without such a certificate is refused (mTLS)."""
    tokens: Path | None = None
    """File of bearer tokens, hashed, as `python -m serving.tokens` writes it. With it every call but health needs one
    with the role act or admin; without it nobody is admin."""
    intra_op_threads: int = 2
    """Threads that share one inference."""
    concurrency: int = 1
    """Inferences at the same time. More than one only where --intra-op-threads times this is at most the cores."""
    queue: int = 4
    """Calls that may wait for one. Others are refused at once: an answer that comes late is of no use to a robot."""
    max_wait_ms: float = 20.0
    """About how long the last of them may have to; of a slow policy's calls fewer wait, but always one."""
    client_hz: float = 60.0
    """Inferences a second for one client while others, that ask for less, act too; alone it may have any number. And
    so many StartEpisode, ListPolicies, GetPolicy and GetStats a second while others act."""
    max_batch: int = 1
    """Above 1, calls that wait for the same policy share an inference. For many clients of a large policy; with --queue
    of one less, or more."""
    valid_for_ms: float = 200.0
    """How long after its frame was taken an action may be applied. An older frame is refused."""
    workspace: tuple[float, float, float, float, float, float] | None = None
    """X0 X1 Y0 Y1 Z0 Z1: a box in the robot's base frame, metres. No motion ends outside; requests need a pose."""
    limits: dict[str, float] = field(default_factory=dict)
    """Tighter limits than the policies' own, NAME VALUE ...: action fields, or step_m, jump_m, jump_rad, z_floor_m.
    jump_m and jump_rad bound the steps of an episode after its first. All that are given hold, wherever that is; of one
    name, the flags' value before the environment's before the file's."""
    frozen_after: int = FrameRules.frozen_after
    """Warn when a camera sends as many equal frames in a row; 0: never."""
    invalid_share: float = FrameRules.invalid_share
    """Warn when more than this share of a frame's pixels has no depth."""
    strict_frames: bool = False
    """Refuse such frames instead."""
    max_episodes: int = 64
    """Episodes open at the same time. Beyond that, who had no call for longest, and none within 30 s, makes room."""
    episode_idle_s: float = 600.0
    """An episode without a call for so long is forgotten."""
    grace_s: float = 5.0
    """On SIGTERM, how long calls in flight may take to finish."""
    metrics_port: int | None = None
    """Serve Prometheus metrics on this port; 0: on a free one, which the log tells."""
    metrics_host: str = "127.0.0.1"
    """At this address. They tell names of policies and how busy the server is, to whoever can reach it."""
    record: Path | None = None
    """Write a flight recording into this folder (MCAP; `python -m serving.replay` reads it)."""
    record_file_mib: int = 256
    """A new file is begun after so much, or a quarter of the total, or sooner where messages are small."""
    record_total_mib: int = 4096
    """The oldest files of this folder go when together they exceed this."""
    log_format: Literal["text", "json"] = "text"
    """One line an event, for people or for machines."""
    trace: bool = False
    """Make OpenTelemetry spans (pip install opentelemetry-distro opentelemetry-exporter-otlp, and start by
    `opentelemetry-instrument python -m serving.server`: where they go is said by OTEL_*)."""
    check_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Check everything, policies included, say so, and exit."""

    def __post_init__(self) -> None:
        lowest = {
            "intra_op_threads": 1, "concurrency": 1, "queue": 0, "max_wait_ms": 0, "client_hz": 1, "max_batch": 1,
            "valid_for_ms": 1, "frozen_after": 0, "invalid_share": 0, "max_episodes": 1, "episode_idle_s": 1,
            "grace_s": 0, "record_file_mib": 1, "record_total_mib": 1,
        }  # fmt: skip
        at_once = ("intra_op_threads", "concurrency", "queue", "max_batch")
        highest = dict.fromkeys(at_once, MOST_AT_ONCE) | {"invalid_share": 1}
        for name, low in lowest.items():
            most = highest.get(name, MOST)
            if not low <= getattr(self, name) <= most:
                raise StartupError(f"{name} must be {low} to {most}, got {getattr(self, name)}")
        if self.frozen_after == 1:
            raise StartupError("frozen_after must be 0 or at least 2: any frame is the same once running")
        if self.metrics_port is not None and not 0 <= self.metrics_port < 2**16:
            raise StartupError(f"metrics_port must be a port, 0 to 65535, got {self.metrics_port}")
        if not self.policy and not self.policies:
            raise StartupError("no policy: give --policy policy.onnx, or --policies FOLDER")
        if self.policies and not os.path.isdir(self.policies):  # noqa: PTH112  Path's raises where nobody may look
            raise StartupError(f"--policies must be a folder that can be read, {self.policies} is none")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise StartupError("--tls-cert and --tls-key go together")
        if self.tls_client_ca and not self.tls_cert:
            raise StartupError("--tls-client-ca needs --tls-cert and --tls-key: a client's certificate comes over TLS")
        if self.max_batch > 1 and self.queue < self.max_batch - 1:
            raise StartupError(f"--max-batch {self.max_batch} never fills with --queue {self.queue}: raise --queue")
        _ = self.bounds

    @property
    def bounds(self) -> Limits:
        """What the envelope keeps for every policy."""
        box = None
        if self.workspace is not None:
            try:
                box = Workspace(low=self.workspace[::2], high=self.workspace[1::2])
            except ValueError as error:
                raise StartupError(f"--workspace X0 X1 Y0 Y1 Z0 Z1: {error}") from error
        for name, value in self.limits.items():
            if not math.isfinite(value) or (value <= 0 and name != "z_floor_m"):
                raise StartupError(f"--limits {name} must be a positive number, got {value}")
        named = {f.name for f in fields(Limits)} - {"fields", "workspace"}
        own = {name: value for name, value in self.limits.items() if name in named}
        return Limits({n: v for n, v in self.limits.items() if n not in named}, workspace=box, **own)

    @property
    def frame_rules(self) -> FrameRules:
        return FrameRules(self.frozen_after, self.invalid_share, self.strict_frames)


SETTINGS = {f.name for f in fields(Config)} - {"check_config"}
"""What a file and the environment may name."""
TEXTS = {"policy"} | {name for name, kind in get_type_hints(Config).items() if kind in (str, Path, Path | None)}
"""Of those, what is no number even where it looks like one: a policy may be called 1.10."""
LINK = re.compile(r"(\w+_)?(service_(host|port(_\w+)?)|port_\d+_\w+)")
LINKED = re.compile(r"(\w+_)?port")
"""The same where the value is an address, as tcp://10.0.0.1:80."""


def parse(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> Config:
    """The settings of --config, the environment and the flags.

    Raises:
        StartupError: naming the file and the setting that is unknown or does not fit.
    """
    flags = list(sys.argv[1:] if arguments is None else arguments)
    _refuse_empty(
        [
            flag.removesuffix("=") or before
            for before, flag in zip(("a flag", *flags), flags, strict=False)
            if not flag or (flag.startswith("--") and flag.endswith("="))
        ]
    )
    file, variables = _from_file(flags), _from_environment(environment)
    settings = {**file, **variables}
    if limits := {**_limits(file, "the file"), **_limits(variables, "the environment"), **_taken_limits(flags)}:
        settings["limits"] = limits
    named = [flag.split("=")[0].removeprefix("--no-").removeprefix("--") for flag in flags if flag.startswith("--")]
    given = {name.replace("-", "_") for name in named}
    defaults = [part for name, value in settings.items() if name not in given for part in _as_flags(name, value)]
    return tyro.cli(Config, args=defaults + flags, prog="python -m serving.server")


def _from_file(flags: list[str]) -> dict[str, Any]:
    """What --config names, which is taken out of `flags`."""
    path = None
    for i, flag in enumerate(flags):
        if flag == "--config" and i + 1 < len(flags):
            path = Path(flags[i + 1])
            del flags[i : i + 2]
            break
        if flag.startswith("--config="):
            path = Path(flags.pop(i).removeprefix("--config="))
            break
    if path is None:
        return {}
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StartupError(f"--config {path}: {error}") from error
    _require_known(settings, f"--config {path}")
    _refuse_empty([name for name, value in settings.items() if value == ""], f"--config {path}: ")
    return settings


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    found = {k.removeprefix(ENVIRONMENT).lower(): v for k, v in environment.items() if k.startswith(ENVIRONMENT)}
    found = {name: text for name, text in found.items() if not _is_link(name, text)}
    _require_known(found, "the environment")
    empty = [f"{ENVIRONMENT}{name.upper()}" for name, text in found.items() if not text]
    _refuse_empty(empty, "the environment: ")
    return {name: _value(name, text) for name, text in found.items()}


def _is_link(name: str, text: str) -> bool:
    """Kubernetes tells every container of a namespace where a Service called equiserve, or equiserve-more, is."""
    return bool(LINK.fullmatch(name)) or (bool(LINKED.fullmatch(name)) and "://" in text)


def _value(name: str, text: str) -> Any:
    """A variable's text as TOML has it ([0.3, 0.7], true, {planar = 0.02}), or else as it stands."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    is_text = isinstance(value, str) or (name == "policy" and isinstance(value, list))
    return text if name in TEXTS and not is_text else value


def _require_known(settings: Mapping[str, Any], where: str) -> None:
    unknown = sorted(set(settings) - SETTINGS)
    if unknown:
        there_are = ", ".join(sorted(SETTINGS))
        raise StartupError(f"{where}: no setting is called {', '.join(unknown)}; there are {there_are}")


def _refuse_empty(names: Sequence[str], where: str = "") -> None:
    """Of ${RECORD:-} in a compose file, of `--record "$RECORD"`, or of a name mistyped there. As a path it would be the
    current folder, and whoever meant to set tokens or a workspace must not have a server without."""
    if names:
        raise StartupError(f"{where}{', '.join(sorted(names))} must have a value, or not be there at all")


def _limits(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    limits = settings.get("limits", {})
    if not isinstance(limits, dict):
        raise StartupError(f"{where}: limits must be like {{ planar = 0.03 }}, got {limits}")
    return limits


def _taken_limits(flags: list[str]) -> dict[str, str]:
    """Of all --limits among the flags, which are taken out: of two, argparse would forget the first."""
    taken: dict[str, str] = {}
    flags[:] = [
        part
        for flag in flags
        for part in (("--limits", flag.partition("=")[2]) if flag.startswith("--limits=") else (flag,))
    ]
    while "--limits" in flags:
        start = flags.index("--limits")
        others = (i for i in range(start + 1, len(flags)) if flags[i].startswith("--") or flags[i] == "-h")
        end = next(others, len(flags))
        pairs = flags[start + 1 : end]
        if len(pairs) % 2 or not pairs:
            raise StartupError(f"--limits takes pairs NAME VALUE, got {' '.join(pairs) or 'nothing'}")
        taken |= dict(zip(pairs[::2], pairs[1::2], strict=True))
        del flags[start:end]
    return taken


def _as_flags(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag] if value else []
    if name == "policy":
        if not isinstance(value, str | list):
            raise StartupError(f"policy must be text, or a list of it: got {value}")
        return [part for one in ([value] if isinstance(value, str) else value) for part in (flag, str(one))]
    if isinstance(value, dict):
        return [flag, *(str(part) for pair in value.items() for part in pair)]
    return [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]
