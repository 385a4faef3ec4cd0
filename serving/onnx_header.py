"""Which operators a model file may use, read from the file itself before a runtime sees it.

A model declares the operator sets that it uses, but the runtime also takes nodes of its own sets undeclared: both are
read. ONNX is protobuf, so the server needs no onnx package for that; field numbers are onnx.proto's.
"""

from collections.abc import Iterator
from typing import Any

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
    foreign = dict.fromkeys(d for d in (*domains, *_used(model.graph)) if d not in STANDARD_DOMAINS)
    custom = [shown(d) for d in foreign]
    if custom or model.functions:
        found = f"operator sets {', '.join(custom)}" if custom else "functions of its own"
        raise _refused("ONNX's standard operators alone", found, "export the policy again with training.run")


def _refused(expected: str, got: str, remedy: str) -> Rejected:
    return Rejected("file", expected, got, remedy, Status.FAILED_PRECONDITION)


def _used(graph: Any) -> Iterator[str]:
    """The domains of its nodes, and of those of the graphs within them."""
    for node in graph.node:
        yield node.domain
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _used(inner)


def _declare():  # type: ignore[no-untyped-def]  # a message class made at run time has no static type
    file = descriptor_pb2.FileDescriptorProto(
        name="equiserve/onnx_header.proto", package="equiserve.onnx", syntax="proto2"
    )
    declared: dict[str, dict[str, tuple[int, bool, str]]] = {  # field -> (number, repeated, type)
        "OperatorSet": {"domain": (1, False, "string")},
        "Attribute": {"g": (6, False, "Graph"), "graphs": (11, True, "Graph")},
        "Node": {"attribute": (5, True, "Attribute"), "domain": (7, False, "string")},
        "Graph": {"node": (1, True, "Node")},
        "Model": {
            "graph": (7, False, "Graph"),
            "opset_import": (8, True, "OperatorSet"),
            "functions": (25, True, "bytes"),
        },
    }
    for name, its_fields in declared.items():
        message = file.message_type.add(name=name)
        for field, (number, repeated, kind) in its_fields.items():
            made = message.field.add(name=field, number=number, label=f"LABEL_{'REPEATED' if repeated else 'OPTIONAL'}")
            if kind in declared:
                made.type, made.type_name = made.TYPE_MESSAGE, f".equiserve.onnx.{kind}"
            else:
                made.type = getattr(made, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("equiserve.onnx.Model"))


_Model = _declare()
