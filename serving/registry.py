"""Which policies are live, under which names, and which is the default. Every change is one assignment."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from protos.errors import Rejected, Status, shown
from protos.spaces import PolicySpec
from serving.policy import Policy

KEPT_VERSIONS = 2
"""Of each name: the newest, and the one before, for those who ask for it. Episodes keep theirs as long as they last."""


@dataclass(frozen=True)
class _Live:
    policies: tuple[Policy, ...] = ()
    """In the order of loading."""
    default: str = ""


class Registry:
    """Empty until `publish`: a server listens, and answers UNAVAILABLE, before its policies have proved themselves."""

    def __init__(self) -> None:
        self._live = _Live()
        self._contracts: dict[str, PolicySpec] = {}
        """Of every name that ever was live: controllers rely on what it stands for."""
        self._changing = threading.Lock()

    def publish(self, policies: Sequence[Policy], default: str = "") -> None:
        """Go live with these, at once and all together; the default is the first one's name unless named."""
        with self._changing:
            self._contracts |= {policy.name: policy.spec for policy in policies}
            self._live = _Live(tuple(policies), default or policies[0].name)

    def require_published(self) -> None:
        """Raises Rejected, UNAVAILABLE, before `publish`."""
        if not self._live.policies:
            raise Rejected("server", "loaded policies", "none yet", "wait and try again", Status.UNAVAILABLE)

    def add(self, policy: Policy) -> None:
        """Go live with one more. It is the newest of its name; the oldest beyond KEPT_VERSIONS leave.

        Raises:
            Rejected: FAILED_PRECONDITION when the name stands for another contract, or ever did.
        """
        with self._changing:
            live = self._live
            same = [p for p in live.policies if p.name == policy.name and p.version != policy.version]
            contract = self._contracts.setdefault(policy.name, policy.spec)
            contract.require_same(policy.spec, f"the new {policy.name} {policy.version}")
            kept = same[-(KEPT_VERSIONS - 1) :] if KEPT_VERSIONS > 1 else []
            others = [p for p in live.policies if p.name != policy.name or p in kept]
            self._live = _Live((*others, policy), live.default or policy.name)

    def remove(self, name: str, version: str = "") -> list[Policy]:
        """Take a version (empty: all of them) from those that new calls and episodes can ask for, and return it.

        Raises:
            Rejected: NOT_FOUND; FAILED_PRECONDITION when the default would be left without a policy.
        """
        with self._changing:
            self.resolve(name, version, "name")
            live = self._live
            left = tuple(p for p in live.policies if p.name != name or version not in ("", p.version))
            if not any(p.name == live.default for p in left):
                remedy = "make another one the default first"
                expected = "a policy other than the default's last"
                raise Rejected("name", expected, shown(name), remedy, Status.FAILED_PRECONDITION)
            self._live = _Live(left, live.default)
            return [p for p in live.policies if p not in left]

    def set_default(self, name: str) -> None:
        """Raises Rejected, NOT_FOUND."""
        with self._changing:
            self._live = _Live(self._live.policies, self.resolve(name, "", "name").name)

    def __iter__(self) -> Iterator[Policy]:
        return iter(self._live.policies)

    @property
    def default(self) -> str:
        return self._live.default

    def resolve(self, name: str, version: str, field: str = "policy") -> Policy:
        """The policy of this name (empty: the default) and version (empty: the newest loaded).

        Raises:
            Rejected: NOT_FOUND naming `field` or "version" and what there is; UNAVAILABLE before `publish`.
        """
        self.require_published()
        live = self._live
        named = [p for p in live.policies if p.name == (name or live.default)]
        if not named:
            known = ", ".join(dict.fromkeys(p.name for p in live.policies))
            raise Rejected(field, f"one of: {known}", shown(name), "or leave it empty", Status.NOT_FOUND)
        matching = [p for p in named if version in ("", p.version)]
        if not matching:
            known = ", ".join(p.version for p in named)
            raise Rejected("version", f"one of: {known}", shown(version), "or leave it empty", Status.NOT_FOUND)
        return matching[-1]
