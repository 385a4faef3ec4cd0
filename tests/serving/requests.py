"""Requests for tests, and what a refusal says."""

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos.codec import pack_observation
from protos.equiserve.v1 import policy_pb2 as pb
from protos.spaces import Pose
from tests.makers import scene


def acting(picture: int = 1, *, pose: Pose | None = None, age_us: int = 0, **fields: Any) -> pb.GetActionRequest:
    """A good request for the small policy; each picture is another scene."""
    observation = pack_observation(scene(picture), pose=pose, age_us=age_us)
    return pb.GetActionRequest(observation=observation, **fields)


def refusal(method: Any, request: Any, **options: Any) -> tuple[str, dict[str, str]]:
    """The status by name, and the parts of its google.rpc.ErrorInfo."""
    with pytest.raises(grpc.RpcError) as refused:
        method(request, **options)
    status = rpc_status.from_call(refused.value)
    info = error_details_pb2.ErrorInfo()
    assert status is not None, refused.value
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.reason == refused.value.code().name
    return info.reason, dict(info.metadata)
