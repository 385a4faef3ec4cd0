"""What grpcurl does: knowing an address and nothing else, find the service, build a request, get one motion."""

import grpc
import numpy as np
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from serving.server import Server
from tests.makers import scene, settings, tiny_policy_file


@pytest.fixture
def address(tmp_path):
    policy = tiny_policy_file(tmp_path / "policy.onnx")
    with Server(settings(policy)) as server:
        server.load()
        yield server.address


def test_one_action_by_reflection_alone(address):
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"equiserve.v1.PolicyService", "equiserve.v1.PolicyAdmin", "grpc.health.v1.Health"} <= set(
            database.get_services()
        )
        service = DescriptorPool(database).FindServiceByName("equiserve.v1.PolicyService")
        method = service.methods_by_name["GetAction"]
        request_type = message_factory.GetMessageClass(method.input_type)
        response_type = message_factory.GetMessageClass(method.output_type)
        call = channel.unary_unary(
            f"/{service.full_name}/{method.name}",
            request_serializer=request_type.SerializeToString,
            response_deserializer=response_type.FromString,
        )
        depth = scene(0).depth
        request = request_type()
        request.observation.depth = depth.astype("<f4").tobytes()
        request.observation.encoding = 1  # FLOAT32_METERS
        request.observation.height, request.observation.width = depth.shape
        response = call(request, timeout=5)

    action = {field.name: value for field, value in response.action.ListFields()}
    assert set(action) == {"p", "dx", "dy", "dz", "dtheta"}
    assert np.isfinite(list(action.values())).all()
    assert np.hypot(action["dx"], action["dy"]) <= 0.05 * (1 + 1e-6)
    assert response.policy == "tiny"
