"""Which operators a model file may use, read from the file itself before a runtime sees it.

ONNX is protobuf, and a model must declare every operator set that it uses. Only that declaration is read here, so the
server needs no onnx package: field numbers as in onnx.proto's ModelProto and OperatorSetIdProto.
"""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from protos.errors import Rejected, Status, shown

STANDARD_DOMAINS = ("", "ai.onnx")


def require_standard_operators(content: bytes) -> None:
    """Raise Rejected, FAILED_PRECONDITION, when `content` is no ONNX model or brings operators of its own."""
    try:
        model = _Model.FromString(content)
    except DecodeError as error:
        raise _refused(
            "an ONNX model", f"{len(content)} bytes that are none", "copy the file again, completely"
        ) from error
    domains = [operator_set.domain for operator_set in model.opset_import]
    if not domains:
        raise _refused(
            "an ONNX model", f"{len(content)} bytes without operator sets", "copy the file again, completely"
        )
    custom = [shown(d) for d in domains if d not in STANDARD_DOMAINS]
    if custom or model.functions:
        found = f"operator sets {', '.join(custom)}" if custom else "functions of its own"
        raise _refused("ONNX's standard operators alone", found, "export the policy again with training.run")


def _refused(expected: str, got: str, remedy: str) -> Rejected:
    return Rejected("file", expected, got, remedy, Status.FAILED_PRECONDITION)


def _declare():  # type: ignore[no-untyped-def]  # a message class made at run time has no static type
    file = descriptor_pb2.FileDescriptorProto(
        name="equiserve/onnx_header.proto", package="equiserve.onnx", syntax="proto2"
    )
    operator_set = file.message_type.add(name="OperatorSet")
    operator_set.field.add(name="domain", number=1, type="TYPE_STRING", label="LABEL_OPTIONAL")
    model = file.message_type.add(name="Model")
    model.field.add(
        name="opset_import",
        number=8,
        type="TYPE_MESSAGE",
        label="LABEL_REPEATED",
        type_name=".equiserve.onnx.OperatorSet",
    )
    model.field.add(name="functions", number=25, type="TYPE_BYTES", label="LABEL_REPEATED")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("equiserve.onnx.Model"))


_Model = _declare()
