"""docs/protocol.md cannot fall behind: every name is on it, every example runs and comes out as shown."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pool, json_format
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from protos.errors import Status
from protos.spaces import SPEC, PolicySpec
from serving.security import new_token
from tests.makers import UNHURRIED_MS, certify, tiny_policy_file
from tests.serving.conftest import REPOSITORY

PAGE = REPOSITORY / "docs/protocol.md"
EXAMPLES = REPOSITORY / "docs/examples"
PLAIN, SECURE, TOKEN = "localhost:50051", "robot.lan:50051", "Bearer TOKEN"
"""What the page's examples say; the tests put their own in these places."""
COMPILER = ("make", "g++", "protoc", "grpc_cpp_plugin", "pkg-config")


@dataclass(frozen=True)
class Block:
    """A fenced block of the page, and the line on which its text begins."""

    language: str
    text: str
    line: int


def blocks(*languages):
    page = PAGE.read_text()
    fenced = re.finditer(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    found = [Block(m[1], m[2], page.count("\n", 0, m.start(2)) + 1) for m in fenced]
    return [block for block in found if block.language in languages]


def code(language):
    return "".join(block.text for block in blocks(language))


def with_nested(messages):
    declared = [message for message in messages if not message.GetOptions().map_entry]
    return [one for message in declared for one in (message, *with_nested(message.nested_types))]


MESSAGES = with_nested(pb.DESCRIPTOR.message_types_by_name.values())
ENUMS = [*pb.DESCRIPTOR.enum_types_by_name.values(), *(enum for message in MESSAGES for enum in message.enum_types)]
METHODS = [method for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m.name)
def test_every_message_is_explained_with_every_field(message):
    """From its name in bold to the next one, or the next heading."""
    part = re.search(rf"\*\*`{message.name}`\*\*(.*?)(\*\*`|^#)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert part, f"docs/protocol.md does not explain {message.full_name}"
    missing = [field.name for field in message.fields if f"`{field.name}`" not in part[1]]
    assert not missing, f"docs/protocol.md leaves out of {message.full_name}: {missing}"


@pytest.mark.parametrize("enum", ENUMS, ids=lambda e: e.name)
def test_every_enum_is_explained_with_every_value(enum):
    names = [enum.name, *enum.values_by_name]
    assert [name for name in names if f"`{name}`" not in PAGE.read_text()] == []


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_has_an_example_in_each_language(method):
    assert f".{method.name}(" in code("python")
    assert f"->{method.name}(" in code("cpp")
    assert f"{method.containing_service.name}/{method.name} " in code("sh")


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m.name)
def test_every_message_has_an_example_in_cpp(message):
    assert f"pb::{message.full_name.removeprefix('equiserve.v1.').replace('.', '::')}" in code("cpp")


def test_every_status_and_every_part_of_the_contract_is_on_the_page():
    page = PAGE.read_text()
    assert [status.value for status in Status if f"| {status.value} |" not in page] == []
    assert [name for name in json.loads(SPEC.to_json())["observation"] if f"{name}`" not in page] == []


@pytest.fixture(scope="session")
def policies(tmp_path_factory):
    """The two policies of the page's server."""
    folder = tmp_path_factory.mktemp("policies")
    return [
        f"{name}={tiny_policy_file(folder / f'{name}.onnx', SPEC, task=name, weight=weight)}"
        for name, weight in (("drawer_opening", 1.0), ("block_picking", 2.0))
    ]


@pytest.fixture
def page_server(serve, policies, tmp_path, monkeypatch):
    """{what the examples say: what it is here}, for the page's server and one with TLS; in a folder with ca.pem."""
    monkeypatch.chdir(tmp_path)
    certify(tmp_path, server="localhost")
    secret = new_token("me", ("admin",), tmp_path / "tokens")
    common = {"policy": tuple(policies), "tokens": tmp_path / "tokens"}
    plain = serve(record=tmp_path / "flight", **common)
    secure = serve(tls_cert=tmp_path / "server.pem", tls_key=tmp_path / "server.key", **common)
    return {PLAIN: plain.server.address, SECURE: secure.server.address, TOKEN: f"Bearer {secret}"}


def test_the_python_examples_run(page_server):
    namespace = {}
    for block in blocks("python"):
        text = block.text
        for shown, here in page_server.items():
            text = text.replace(shown, here)
        exec(compile("\n" * (block.line - 1) + text, PAGE, "exec"), namespace)
    namespace["channel"].close()


NO_GRPCURL = pytest.mark.skipif(not shutil.which("grpcurl"), reason="grpcurl is not installed")


@pytest.mark.parametrize("tool", ["a stand-in", pytest.param("grpcurl", marks=NO_GRPCURL)])
def test_the_grpcurl_examples_come_out_as_shown(page_server, tmp_path, tool):
    shown = blocks("sh", "json", "text")
    script = f"export TOKEN={page_server[TOKEN].removeprefix('Bearer ')}\n"
    for i, block in enumerate(shown):
        if block.language == "sh":
            text = block.text.replace(PLAIN, page_server[PLAIN]).replace(SECURE, page_server[SECURE])
            script += f"{{ {text} }} > {i}.out 2>&1; echo $? > {i}.code\n"
    if tool == "grpcurl":
        subprocess.run(["bash", "-c", script], check=True, cwd=tmp_path)
    else:
        run_with_stand_in(script, tmp_path)

    for i, (block, outcome) in enumerate(zip(shown, [*shown[1:], Block("sh", "", 0)], strict=True)):
        if block.language == "sh":
            output, status = (tmp_path / f"{i}.out").read_text(), int((tmp_path / f"{i}.code").read_text())
            where = f"docs/protocol.md, line {block.line}: {output}"
            assert (status != 0) == outcome.text.startswith("ERROR:"), where
            if outcome.language == "text":
                assert [line for line in outcome.text.splitlines() if line not in output.splitlines()] == [], where
            elif outcome.language == "json":
                assert_shows(json.loads(outcome.text), json.loads(output), where)


def assert_shows(shown, came, where):
    """`shown` may leave things out and have other values, but has no names or types that did not come.

    grpcurl says request_id or requestId as its version has it.
    """
    assert type(shown) is type(came), where
    if isinstance(shown, dict):
        came = {re.sub("[A-Z]", lambda m: "_" + m[0].lower(), name): value for name, value in came.items()}
        assert shown.keys() <= came.keys(), where
        for name, value in shown.items():
            assert_shows(value, came[name], where)
    elif isinstance(shown, list):
        assert len(shown) <= len(came), where
        for one, other in zip(shown, came, strict=False):
            assert_shows(one, other, where)


BASH_GRPCURL = """
grpcurl() {
    local code answer
    printf '%s\\0' "$#" "$@" >&3
    IFS= read -r -d '' code <&4 && IFS= read -r -d '' answer <&4
    printf '%s\\n' "$answer"
    return "$code"
}
"""


def run_with_stand_in(script, folder):
    """Run it in bash; what it asks of grpcurl is answered from here."""
    asked, asks = os.pipe()
    answers, answered = os.pipe()
    script = f"exec 3>&{asks} 4<&{answers}\n{BASH_GRPCURL}\n{script}"
    process = subprocess.Popen(["bash", "-c", script], cwd=folder, pass_fds=(asks, answers))
    os.close(asks)
    os.close(answers)
    with os.fdopen(asked, "rb") as questions, os.fdopen(answered, "wb", buffering=0) as replies:
        while count := until_nul(questions):
            status, text = grpcurl([until_nul(questions) for _ in range(int(count))])
            replies.write(f"{status}\0{text}\0".encode())
    assert process.wait() == 0


def until_nul(stream):
    text = bytearray()
    while (byte := stream.read(1)) not in (b"\0", b""):
        text += byte
    return text.decode()


def grpcurl(arguments):
    """(exit status, output) as grpcurl 1.8 has them, as far as the page goes."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("-plaintext", action="store_true")
    parser.add_argument("-max-time", type=float)
    parser.add_argument("-cacert", type=Path)
    parser.add_argument("-H", action="append", default=[])
    parser.add_argument("-d")
    parser.add_argument("address")
    parser.add_argument("symbol")
    asked = parser.parse_args(arguments)
    metadata = [tuple(header.split(": ", 1)) for header in asked.H]
    if asked.plaintext:
        channel = grpc.insecure_channel(asked.address)
    else:
        channel = grpc.secure_channel(asked.address, grpc.ssl_channel_credentials(asked.cacert.read_bytes()))
    with channel:
        if asked.symbol == "list":
            stub, question = reflection_pb2_grpc.ServerReflectionStub(channel), reflection_pb2.ServerReflectionRequest
            (answer,) = stub.ServerReflectionInfo(iter([question(list_services="")]), metadata=metadata, timeout=10)
            return 0, "\n".join(sorted(service.name for service in answer.list_services_response.service))
        service, method = asked.symbol.split("/")
        described = descriptor_pool.Default().FindServiceByName(service).FindMethodByName(method)
        request = json_format.Parse(asked.d, GetMessageClass(described.input_type)())
        answer = GetMessageClass(described.output_type)
        call = channel.unary_unary(f"/{asked.symbol}", type(request).SerializeToString, answer.FromString)
        try:
            message = call(request, metadata=metadata, timeout=asked.max_time or 10)
            return 0, json_format.MessageToJson(message, preserving_proto_field_name=True)
        except grpc.RpcError as error:
            name = error.code().name.title().replace("_", "")
            return 64 + error.code().value[0], f"ERROR:\n  Code: {name}\n  Message: {error.details()}"


assert health_pb2.DESCRIPTOR  # imported so that `grpcurl` knows the service


def test_a_refusal_carries_the_request_id_in_its_trailer(page_server):
    with grpc.insecure_channel(page_server[PLAIN]) as channel:
        metadata = [("authorization", page_server[TOKEN]), ("x-request-id", "arm-1:17")]
        with pytest.raises(grpc.RpcError) as refused:
            pb_grpc.PolicyServiceStub(channel).GetAction(pb.GetActionRequest(), metadata=metadata)
    assert dict(refused.value.trailing_metadata())["x-request-id"] == "arm-1:17"


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """A folder with the C++ controller, and with all C++ examples of the page as the program `protocol`."""
    missing = [tool for tool in COMPILER if not shutil.which(tool)]
    libraries = ["pkg-config", "--exists", "grpc++", "protobuf"]
    if missing or subprocess.run(libraries).returncode != 0:
        pytest.skip(
            f"no C++ toolchain for gRPC: {', '.join(missing) or 'libgrpc++-dev, libprotobuf-dev'} not installed"
        )
    folder = Path(os.environ.get("CPP_BUILD") or tmp_path_factory.mktemp("cpp"))  # .ci/run has compiled some of it
    head, *rest = [f'#line {block.line} "docs/protocol.md"\n{block.text}' for block in blocks("cpp")]
    text = f"#include <cstdlib>\n{head}\nint main() {{\n{''.join(rest)}}}\n"
    for shown, variable in ((PLAIN, "PLAIN"), (SECURE, "SECURE"), (TOKEN, "AUTHORIZATION")):
        text = text.replace(f'"{shown}"', f'std::getenv("{variable}")')
    (folder / "protocol.cc").write_text(text)
    built = subprocess.run(
        ["make", "-j1", "-C", EXAMPLES, f"BUILD={folder}", f"VPATH={folder}", "CXXFLAGS=-O0 -Wall -Wextra -Werror",
         folder / "protocol", folder / "controller"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return folder


def test_the_cpp_examples_compile_and_run(programs, page_server, tmp_path):
    variables = {"PLAIN": page_server[PLAIN], "SECURE": page_server[SECURE], "AUTHORIZATION": page_server[TOKEN]}
    ran = run([programs / "protocol"], tmp_path, **variables)
    assert ran.returncode == 0, ran.stderr
    assert "INVALID_ARGUMENT observation.gripper" in ran.stdout


@pytest.fixture(params=["python", "cpp"])
def controller(request):
    """The command of it."""
    if request.param == "cpp":
        return [request.getfixturevalue("programs") / "controller"]
    return [sys.executable, EXAMPLES / "controller.py"]


def test_the_controller_runs_an_episode(controller, page_server, tmp_path):
    told = {"TOKEN": page_server[TOKEN].removeprefix("Bearer "), "VALID_FOR_MS": f"{UNHURRIED_MS:.0f}"}
    ran = run([*controller, page_server[PLAIN]], tmp_path, **told)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "episode of drawer_opening" in ran.stdout
    assert ran.stdout.count(": move\n") == 5, ran.stdout
    assert "planar: limit 0.02" in ran.stdout
    assert "  field: observation.depth\n  expected: 65536 bytes (128 x 128 x 4)\n  got: 100 bytes\n" in ran.stdout
    assert "OUTCOME_SUCCESS after 5 answered steps" in ran.stdout


def test_the_controller_fails_where_nothing_is_answered(controller, serve, policies, tmp_path):
    """As it sends no pose, which a workspace needs."""
    walled = serve(policy=tuple(policies), workspace=(0.3, 0.7, -0.2, 0.2, 0.0, 0.5))
    ran = run([*controller, walled.server.address], tmp_path)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "OUTCOME_ABORTED after 0 answered steps" in ran.stdout


def test_the_controller_asks_again_only_while_its_frame_is_fresh(controller, serve, policies, tmp_path):
    """By a server that is too slow, no second answer to the same frame could come in time."""
    running = serve(policy=tuple(policies))
    act, asked = running.server.dispatcher.act, []

    def slow(*call):
        asked.append(1)
        time.sleep(0.4)
        return act(*call)

    running.server.dispatcher.act = slow
    ran = run([*controller, running.server.address], tmp_path)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert 1 <= len(asked) <= 3  # one try of each step; the next may not get past the one before
    assert "OUTCOME_ABORTED" in ran.stdout


def test_the_controller_begins_no_episode_under_another_contract(controller, running, tmp_path):
    ran = run([*controller, running.server.address], tmp_path)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "  field: contract.observation.height\n" in ran.stdout


def test_the_cpp_controller_is_built_for_the_contract():
    source = (EXAMPLES / "controller.cc").read_text()
    assert PolicySpec.from_json(re.search(r'kContract\[\] = R"\((.*?)\)"', source, re.DOTALL)[1]) == SPEC
    assert f'"{SPEC.digest}"' in source


def run(command, folder, **variables):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
