"""Which policies are live, under which names, and which is the default."""

from collections.abc import Iterator, Sequence

from protos.errors import Rejected, Status
from serving.policy import Policy


class Registry:
    """Empty until `publish`: a server listens, and answers UNAVAILABLE, before its policies have proved themselves."""

    def __init__(self) -> None:
        self._policies: tuple[Policy, ...] = ()  # in the order of loading; the first one's name is the default

    def publish(self, policies: Sequence[Policy]) -> None:
        """Go live with these, at once and all together."""
        self._policies = tuple(policies)

    def __iter__(self) -> Iterator[Policy]:
        return iter(self._policies)

    @property
    def default(self) -> str:
        return self._policies[0].name

    def resolve(self, name: str, version: str, field: str = "policy") -> Policy:
        """The policy of this name (empty: the default) and version (empty: the newest loaded).

        Raises:
            Rejected: NOT_FOUND naming `field` or "version" and what there is; UNAVAILABLE before `publish`.
        """
        policies = self._policies
        if not policies:
            raise Rejected("server", "loaded policies", "none yet", "wait and try again", Status.UNAVAILABLE)
        named = [p for p in policies if p.name == (name or policies[0].name)]
        if not named:
            known = ", ".join(dict.fromkeys(p.name for p in policies))
            raise Rejected(field, f"one of: {known}", _shown(name), "or leave it empty", Status.NOT_FOUND)
        matching = [p for p in named if version in ("", p.version)]
        if not matching:
            known = ", ".join(p.version for p in named)
            raise Rejected("version", f"one of: {known}", _shown(version), "or leave it empty", Status.NOT_FOUND)
        return matching[-1]


def _shown(text: str) -> str:
    """A caller's text in a form that is safe to log and to send back."""
    return repr(text if len(text) <= 64 else text[:61] + "...")
