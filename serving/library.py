"""Where policies come from: names and the files behind them; each proves itself before it goes live.

Callers name policies, never paths: a name is looked up among the files given at the start and those in the policies
folder (NAME.onnx).
"""

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from protos.errors import Rejected, Status, shown
from protos.spaces import Observation
from serving.envelope import Envelope, Limits
from serving.errors import PolicyRefused, StartupError
from serving.metrics import Metrics
from serving.policy import Policy, load, sha256_at
from serving.proofs import prove
from serving.registry import Registry

log = logging.getLogger(__name__)

WARM_UP_CALLS = 5
PATIENCE_S = 5.0
"""So long a caller waits at most until another's change of policies is over."""
NAME = r"[\w.-]+"


@dataclass
class Library:
    """The policies of one server, on disk and in its registry.

    Args:
        files: [NAME=]path; the first is the default. Without NAME, the task that the file names.
        folder: of NAME.onnx, looked at again by `refresh`.
    """

    registry: Registry
    metrics: Metrics
    files: Sequence[str]
    folder: Path | None
    intra_op_threads: int
    limits: Limits
    changed: Callable[[], None] = lambda: None
    """Called when other names than before are live."""

    def __post_init__(self) -> None:
        self._asked = ""
        """The default that the server was told."""
        self._named: dict[str, Path] = {}
        self._withdrawn: dict[str, str] = {}
        """SHA-256 of a name's file, where that was unloaded on request: a look at the files does not bring it back."""
        self._loading = threading.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether files are being looked at, or prove themselves."""
        return self._loading.locked()

    def open(self, default: str = "", *, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Load and prove everything, then go live with all of it together: True.

        Args:
            stopped: asked between policies; once it says so, nothing goes live: False.

        Raises:
            PolicyRefused, StartupError: and nothing is live.
        """
        self._asked = default
        with self._loading:
            try:
                found = self._in_folder()
            except Rejected as away:
                raise StartupError(str(away)) from away
            if self._leaves_open(found):
                raise StartupError(
                    f"--policies {self.folder} has several: say which acts for who names none, by "
                    f"--default-policy, one of {', '.join(found)}"
                )
            policies: list[Policy] = []
            for name, file in map(_split, self.files):
                if stopped():
                    return False
                policies.append(self._proved(Path(file), name))
            self._named = {p.name: Path(p.file) for p in policies}
            for name, path in found.items():
                if name in self._named:
                    raise StartupError(
                        f"policy {name} is in {self.folder} and is given as {self._named[name]}, too; name them apart: "
                        f"--policy A={self._named[name]}"
                    )
                if stopped():
                    return False
                policies.append(self._proved(path, name))
            if not policies:
                raise StartupError(f"no policy in {self.folder}: put NAME.onnx there, or give --policy")
            _require_apart(policies, unnamed={str(Path(file)) for name, file in map(_split, self.files) if not name})
            if default and default not in [p.name for p in policies]:
                known = ", ".join(dict.fromkeys(p.name for p in policies))
                raise StartupError(f"--default-policy must be one of {known}, got {default}")
            _warn_of_the_idle(self.limits, policies)
            if stopped():
                return False
            self.registry.publish(policies, default)
            for policy in policies:
                self._say_live(policy)
            self.changed()
            return True

    def load(self, name: str, patience_s: float) -> Policy:
        """Load the file behind a name again, and go live with it unless the same version is.

        Raises:
            Rejected: NOT_FOUND for a name without a file; FAILED_PRECONDITION, with every reason, for a file that must
                not serve, or a folder that cannot be read. What was live before stays. UNAVAILABLE before `open`, and
                where another change is not over within `patience_s`, or PATIENCE_S.
        """
        with self._changing(patience_s):
            files = self._named if name in self._named else self._in_folder()
            if name not in files:
                expected = f"one of: {', '.join(sorted(files | self._named))}"
                raise Rejected("name", expected, shown(name), "a name, never a path", Status.NOT_FOUND)
            policy = self._renewed(name, files[name])
            self._withdrawn.pop(name, None)
            self.changed()
        return policy

    def unload(self, name: str, version: str, patience_s: float) -> None:
        """Take a version (empty: all) out of use, until it is asked for by `load` or its file changes.

        Raises what Registry.remove raises, and UNAVAILABLE as `load` does.
        """
        with self._changing(patience_s):
            try:
                files = self._in_folder() | self._named
            except Rejected:
                files = None  # not known: then no version comes back
            for policy in self.registry.remove(name, version):
                if files is None or name not in files or sha256_at(files[name]) in (None, policy.sha256):
                    self._withdrawn[name] = policy.sha256
            self.changed()

    @contextmanager
    def _changing(self, patience_s: float) -> Iterator[None]:
        """Alone, for a caller: it waits in a thread that robots' calls need, too."""
        self.registry.require_published()  # and not after a whole start, which holds the lock
        if not self._loading.acquire(timeout=min(patience_s, PATIENCE_S)):
            expected, got = "no other change of policies under way", "one that takes its time"
            raise Rejected("server", expected, got, "try again when it is over", Status.UNAVAILABLE)
        try:
            yield
        finally:
            self._loading.release()

    def refresh(self) -> list[str]:
        """Look at every file again: what is new or changed goes live, what vanished from the folder is unloaded. What
        was unloaded on request stays so.

        Returns what happened, a line each. A file that must not serve changes nothing but the log, and neither does a
        folder that cannot be read, or has no policy left: it may be a disk that is away.
        """
        said: list[str] = []
        with self._loading:
            if not self.registry.default:  # the start is about to look at every file
                return said
            try:
                found = self._in_folder()
                vanished = {p.name for p in self.registry} - set(found) - set(self._named)
                if vanished and not found:
                    said.append(f"nothing is left in {self.folder}: a disk that is away? What is live stays")
                    vanished = set()
            except Rejected as away:
                said.append(str(away))
                found, vanished = {}, set()
            for name, path in (found | self._named).items():
                if name in self._withdrawn and sha256_at(path) in (None, self._withdrawn[name]):
                    said.append(f"{name} was unloaded and stays so until LoadPolicy, or another file")
                    continue
                try:
                    before = {p.version for p in self.registry if p.name == name}
                    policy = self._renewed(name, path)
                    self._withdrawn.pop(name, None)
                    if policy.version not in before:
                        said.append(f"{name} {policy.version} is live")
                except Rejected as reason:
                    said.append(str(reason))
            if self._leaves_open(found):
                there_are = ", ".join(found)
                said.append(f"{self.folder} has several now: the next start needs --default-policy, one of {there_are}")
            for name in vanished:
                try:
                    self.registry.remove(name)
                    said.append(f"{name} is unloaded")
                except Rejected as reason:
                    said.append(f"{name} has no file any more and stays: {reason}")
            self.changed()
        for line in said:
            log.info("policies: %s", line)
        return said

    def _renewed(self, name: str, path: Path) -> Policy:
        try:
            live = [p for p in self.registry if p.name == name]
            if live and sha256_at(path) == live[-1].sha256:
                return live[-1]
            policy = self._proved(path, name)
            self.registry.add(policy)
        except (PolicyRefused, Rejected) as refused:
            self.metrics.loaded("refused")
            log.error("policy %s: %s", name, refused)
            reasons = refused.reasons if isinstance(refused, PolicyRefused) else (refused,)
            got = "; ".join(f"{r.field}: expected {r.expected}, got {r.got}" for r in reasons)
            remedy = "the policy before stays live"
            raise Rejected("name", "a policy that proves itself", got, remedy, Status.FAILED_PRECONDITION) from refused
        self._say_live(policy)
        return policy

    def _leaves_open(self, found: dict[str, Path]) -> bool:
        """Whether a start with these could not say who acts by default: the first changes with a file that is added."""
        return not (self._asked or self.files) and len(found) > 1

    def _in_folder(self) -> dict[str, Path]:
        """Raises Rejected, FAILED_PRECONDITION, where the folder cannot be read: nothing is known to be gone then."""
        try:
            files = sorted(f for f in self.folder.iterdir() if f.suffix == ".onnx") if self.folder else []
        except OSError as error:
            expected, got = f"a folder that can be read at {self.folder}", str(error.strerror)
            raise Rejected("policies", expected, got, "what is live stays", Status.FAILED_PRECONDITION) from error
        named = {f.stem: f for f in files if re.fullmatch(NAME, f.stem)}
        for file in files:
            if file.stem not in named:
                log.warning("policies: %s is left out, as a policy's name has letters, digits, . _ and -", file)
        return named

    def _proved(self, path: Path, name: str) -> Policy:
        policy = prove(load(path, name, intra_op_threads=self.intra_op_threads))
        try:
            Envelope(policy.spec, self.limits)
        except Rejected as unknown:
            raise PolicyRefused(policy.file, [unknown]) from unknown
        return replace(policy, inference_ms=_warm_ms(policy))

    def _say_live(self, policy: Policy) -> None:
        log.info("policy %s %s: %s", policy.name, policy.version, policy.file)
        for proof in policy.proofs:
            log.info("  proof %s passed: %.3g, bound %.3g (%s)", proof.name, proof.measured, proof.bound, proof.detail)
        log.info("  warm: %.2f ms an action", policy.inference_ms)
        self.metrics.loaded("live")


def _warn_of_the_idle(limits: Limits, policies: Sequence[Policy]) -> None:
    """Whoever writes a limit that no policy exceeds may have meant another unit."""
    for name, value in limits.fields.items():
        own = [field.limit or math.inf for p in policies for field in p.spec.action.fields if field.name == name]
        if own and max(own) <= value:
            log.warning("--limits %s %g changes nothing: the policies' own is %g", name, value, max(own))


def _require_apart(policies: Sequence[Policy], unnamed: set[str]) -> None:
    """Under a name, versions differ and contracts do not; a file in `unnamed` has its own. Raises StartupError."""
    for policy in policies:
        same = [p for p in policies if p.name == policy.name]
        if [p.version for p in same].count(policy.version) > 1:
            raise StartupError(
                f"policy {policy.name} {policy.version} is given twice; name them apart: A={policy.file}"
            )
        try:
            same[0].spec.require_same(policy.spec, f"{policy.file}, also called {policy.name}")
        except Rejected as differs:
            raise StartupError(f"{differs}; name them apart: A={policy.file}") from differs
        if policy is not same[0] and not unnamed.isdisjoint(p.file for p in (same[0], policy)):
            raise StartupError(  # the last would act, where the first is said to
                f"{same[0].file} and {policy.file} are both called {policy.name}; name them apart: A={policy.file}"
            )


def _split(argument: str) -> tuple[str, str]:
    named = re.fullmatch(rf"({NAME})=(.+)", argument)  # a name has no slash, a path may have "="
    return (named[1], named[2]) if named else ("", argument)


def _warm_ms(policy: Policy) -> float:
    golden, times = policy.manifest.golden, []
    for _ in range(WARM_UP_CALLS):
        start = time.perf_counter()
        policy.act(Observation(golden.depth[0], float(golden.gripper[0])))
        times.append(time.perf_counter() - start)
    return min(times) * 1e3
