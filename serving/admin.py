"""Operating a server: load, unload, choose the default, drain. Another role than acting: see serving.security."""

import logging
from collections.abc import Callable

import grpc

from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from protos.errors import Rejected, shown
from serving.answering import Answering
from serving.library import Library

log = logging.getLogger(__name__)


class PolicyAdminServicer(pb_grpc.PolicyAdminServicer):
    """Each change is logged with who made it."""

    def __init__(self, library: Library, answering: Answering, drain: Callable[[], None]) -> None:
        self._library, self._answering, self._drain = library, answering, drain

    def LoadPolicy(self, request: pb.LoadPolicyRequest, context: grpc.ServicerContext) -> pb.LoadPolicyResponse:
        with self._answering("LoadPolicy", context) as call:
            self._require_name(request.name)
            policy = self._library.load(request.name, call.patience_s)
            log.info("%s loaded %s %s", call.client, policy.name, policy.version)
            return pb.LoadPolicyResponse(policy=policy.info())

    def UnloadPolicy(self, request: pb.UnloadPolicyRequest, context: grpc.ServicerContext) -> pb.UnloadPolicyResponse:
        with self._answering("UnloadPolicy", context) as call:
            self._require_name(request.name)
            self._library.unload(request.name, request.version, call.patience_s)
            log.info("%s unloaded %s %s", call.client, shown(request.name), shown(request.version))
            return pb.UnloadPolicyResponse()

    def SetDefaultPolicy(
        self, request: pb.SetDefaultPolicyRequest, context: grpc.ServicerContext
    ) -> pb.SetDefaultPolicyResponse:
        with self._answering("SetDefaultPolicy", context) as call:
            self._require_name(request.name)
            self._library.registry.set_default(request.name)
            log.info("%s made %s the default", call.client, shown(request.name))
            return pb.SetDefaultPolicyResponse()

    def Drain(self, request: pb.DrainRequest, context: grpc.ServicerContext) -> pb.DrainResponse:
        with self._answering("Drain", context) as call:
            log.info("%s asked to drain", call.client)
            self._drain()
            return pb.DrainResponse()

    def _require_name(self, name: str) -> None:
        """Elsewhere an empty name is the default; what changes a server must say what it means."""
        if not name:
            known = ", ".join(dict.fromkeys(p.name for p in self._library.registry))
            raise Rejected("name", f"one of: {known}", "''")
