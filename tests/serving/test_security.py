"""Who may connect and who may do what, over real sockets: transport x token x method."""

import hashlib
import itertools
import logging
import os
import ssl
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from serving.client import PolicyClient, PolicyError
from serving.connection import Tls
from serving.errors import StartupError
from serving.security import Gate, new_token, read_tokens
from serving.server import Server, refresh_when
from serving.tokens import main as make_token
from tests.makers import certify, scene, settings
from tests.serving.requests import acting, refusal
from tests.serving.test_dispatcher import until
from tests.serving.test_metrics import scrape


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """ours/ and theirs/: an authority, a server's pair and a client's pair each."""
    home = tmp_path_factory.mktemp("pki")
    for side in ("ours", "theirs"):
        certify(home / side, localhost="localhost", client="arm-1@factory")
    return home


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    """The file of hashes, and the tokens by role."""
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    return file, {role: new_token(f"the-{role}", (role,), file) for role in ("act", "admin")}


def server_flags(pki, transport):
    tls = {"tls_cert": pki / "ours" / "localhost.pem", "tls_key": pki / "ours" / "localhost.key"}
    return {"plaintext": {}, "TLS": tls, "mTLS": {**tls, "tls_client_ca": pki / "ours" / "ca.pem"}}[transport]


@pytest.fixture(scope="module", params=[*itertools.product(("plaintext", "TLS", "mTLS"), (True, False))], ids=str)
def guarded(request, pki, secrets, healthy):
    """(transport, whether tokens are asked for, a running server)"""
    transport, with_tokens = request.param
    flags = server_flags(pki, transport) | ({"tokens": secrets[0]} if with_tokens else {})
    with Server(settings(f"tiny={healthy}", **flags)) as server:
        server.load()
        yield transport, with_tokens, server


def channel_to(address, pki, how):
    if how == "plaintext":
        return grpc.insecure_channel(address)
    side = "theirs" if how == "mTLS, another authority's" else "ours"
    pair = [(pki / side / f"client.{end}").read_bytes() for end in ("key", "pem")] if how.startswith("mTLS") else []
    return grpc.secure_channel(address, grpc.ssl_channel_credentials((pki / "ours" / "ca.pem").read_bytes(), *pair))


CONNECTS = {
    "plaintext": {"plaintext"},
    "TLS": {"TLS", "mTLS", "mTLS, another authority's"},  # a pair that nobody asked for does no harm
    "mTLS": {"mTLS"},
}
TRANSPORTS = ("plaintext", "TLS", "mTLS", "mTLS, another authority's")


def headers(secrets):
    token = {role: f"Bearer {secret}" for role, secret in secrets[1].items()}
    return {
        "none": (),
        "wrong": (("authorization", "Bearer " + "x" * 43),),
        "empty": (("authorization", ""),),
        "no token": (("authorization", "Bearer "),),
        "basic": (("authorization", "Basic " + secrets[1]["act"]),),
        "bare": (("authorization", secrets[1]["act"]),),
        "two": (("authorization", token["act"]), ("authorization", token["admin"])),
        "with a space": (("authorization", token["act"] + " "),),
        "act": (("authorization", token["act"]),),
        "admin": (("authorization", token["admin"]),),
    }


HEADERS = ("none", "wrong", "empty", "no token", "basic", "bare", "two", "with a space", "act", "admin")


def code_of(call):
    try:
        result = call()
        for _ in result if hasattr(result, "__next__") else ():
            pass
        return "OK"
    except grpc.RpcError as error:
        return error.code().name


def calls(channel, metadata):
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    options = {"timeout": 5, "metadata": metadata}
    policy, admin = pb_grpc.PolicyServiceStub(channel), pb_grpc.PolicyAdminStub(channel)
    return {
        "GetAction": lambda: policy.GetAction(acting(1), **options),
        "GetStats": lambda: policy.GetStats(pb.GetStatsRequest(), **options),
        "SetDefaultPolicy": lambda: admin.SetDefaultPolicy(pb.SetDefaultPolicyRequest(name="tiny"), **options),
        "Check": lambda: health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), **options),
        "reflection": lambda: reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([request]), **options
        ),
    }


def expected(method, header, with_tokens):
    if method == "Check":
        return "OK"
    admin = method == "SetDefaultPolicy"
    if not with_tokens:
        return "PERMISSION_DENIED" if admin else "OK"
    if header not in ("act", "admin"):
        return "UNAUTHENTICATED"
    return "PERMISSION_DENIED" if admin and header == "act" else "OK"


@pytest.mark.parametrize("header", HEADERS)
def test_every_token_at_every_method(guarded, pki, secrets, header):
    transport, with_tokens, server = guarded
    with channel_to(server.address, pki, transport) as channel:
        for method, call in calls(channel, headers(secrets)[header]).items():
            assert code_of(call) == expected(method, header, with_tokens), method


@pytest.mark.parametrize("how", TRANSPORTS)
def test_every_transport_at_every_server(guarded, pki, secrets, how):
    transport, _, server = guarded
    with channel_to(server.address, pki, how) as channel:
        for method, call in calls(channel, headers(secrets)["admin"]).items():
            code = code_of(call)
            if how in CONNECTS[transport]:
                assert code in ("OK", "PERMISSION_DENIED"), method
            else:
                assert code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"), method


def test_the_client_speaks_tls_with_a_pair_and_a_token(healthy, pki, secrets):
    flags = {"tokens": secrets[0], **server_flags(pki, "mTLS")}
    with Server(settings(healthy, **flags)) as server:
        server.load()
        ours = pki / "ours"
        tls = Tls(ours / "ca.pem", ours / "client.pem", ours / "client.key")
        with PolicyClient(server.address, tls=tls, token=secrets[1]["act"]) as client, client.episode() as episode:
            assert episode.act(scene(0)).policy == "tiny"
        with PolicyClient(server.address, tls=tls, token="wrong") as client:
            with pytest.raises(PolicyError, match="UNAUTHENTICATED") as refused:
                client.act(scene(0))
            assert "wrong" not in str(refused.value)


def test_a_token_is_nowhere_but_with_its_holder(serve, healthy, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "tokens"
    secret = new_token("arm-1", ("act",), file)
    running = serve(policy=(str(healthy),), tokens=file, metrics_port=0, record=tmp_path / "flight")
    good, stub = (("authorization", f"Bearer {secret}"),), running.stub
    stub.GetAction(acting(1), metadata=good)
    _, parts = refusal(stub.GetAction, acting(1), metadata=(("authorization", f"Bearer {secret}x"),))
    stats = stub.GetStats(pb.GetStatsRequest(), metadata=good)
    counted = scrape(running.server.metrics_port)
    running.server.stop()
    recorded = b"".join(path.read_bytes() for path in (tmp_path / "flight").iterdir())
    told = [caplog.text, file.read_text(), str(stats), str(parts), counted]
    assert not any(secret in text for text in told)
    assert secret.encode() not in recorded
    assert file.stat().st_mode & 0o777 == 0o600


def test_tokens_come_and_go_with_a_refresh(serve, healthy, tmp_path):
    file = tmp_path / "tokens"
    first = new_token("first", ("act",), file)
    running = serve(policy=(str(healthy),), tokens=file)

    def code(secret):
        return code_of(lambda: running.stub.GetAction(acting(1), metadata=(("authorization", f"Bearer {secret}"),)))

    second = new_token("second", ("act",), file)
    assert (code(first), code(second)) == ("OK", "UNAUTHENTICATED")
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("first")))
    running.server.reload_tokens()
    assert (code(first), code(second)) == ("UNAUTHENTICATED", "OK")
    file.write_text("half a li")
    running.server.reload_tokens()
    assert (code(first), code(second)) == ("UNAUTHENTICATED", "OK")


@pytest.mark.parametrize(
    "line", ["arm act", "arm root " + "0" * 64, "arm act " + "0" * 63, "a b act " + "0" * 64, "ärm"]
)
def test_a_file_that_does_not_parse_is_named_by_line_and_not_repeated(tmp_path, line):
    (tmp_path / "tokens").write_text("# comment\n\n" + line)
    with pytest.raises(StartupError, match="line 3") as refused:
        Gate(tmp_path / "tokens")
    assert line not in str(refused.value)


@pytest.mark.parametrize("name", ["", "two words", "x" * 65, "line\nbreak"])
def test_a_token_needs_a_name(tmp_path, name):
    with pytest.raises(StartupError):
        new_token(name, ("act",), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_a_token_is_added_to_a_file_without_a_last_newline(tmp_path):
    file = tmp_path / "tokens"
    first = new_token("first", ("act",), file)
    file.write_text(file.read_text().rstrip("\n"))
    second = new_token("second", ("act",), file)
    gate = Gate(file)
    for name, secret in (("first", first), ("second", second)):
        assert gate.require("/service/Method", [("authorization", f"Bearer {secret}")]) == name


def test_a_token_file_keeps_its_owner_its_mode_and_its_place(tmp_path):
    file, link = tmp_path / "tokens", tmp_path / "link"
    new_token("first", ("act",), file)
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    if os.getuid() == 0:  # an operator's, while the file is the server's
        os.chown(file, 10001, 10001)
    before = file.stat()
    link.symlink_to(file)
    new_token("second", ("act",), link)
    after = file.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert link.is_symlink()
    assert [token.name for token in read_tokens(link)] == ["first", "second"]


@pytest.mark.parametrize(
    "flags", [[], ["--output", "{}/nowhere/secret"], ["--output", "{}/tokens"], ["--output", "{}/there"]]
)
def test_a_token_that_nobody_has_has_no_hash(tmp_path, flags):
    """Its name would be taken."""
    (tmp_path / "there").touch()
    (tmp_path / "nowhere").touch()
    command = [sys.executable, "-m", "serving.tokens", "arm-1", "--file", str(tmp_path / "tokens")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*command, *(f.format(tmp_path) for f in flags)], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert not (tmp_path / "tokens").exists()
    subprocess.run([*command, "--output", str(tmp_path / "secret")], check=True)
    secret = (tmp_path / "secret").read_text().strip()
    assert Gate(tmp_path / "tokens").require("/service/Method", [("authorization", f"Bearer {secret}")]) == "arm-1"


def test_a_token_whose_hash_cannot_be_written_is_not_left_behind(tmp_path, monkeypatch, capsys):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("serving.security.write_atomically", full)
    flags = ["--file", str(tmp_path / "tokens"), "--output", str(tmp_path / "secret")]
    monkeypatch.setattr(sys, "argv", ["tokens", "arm-1", *flags])
    assert make_token() == 1
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_nobody_can_be_shown_is_not_made(tmp_path):
    command = f"{sys.executable} -m serving.tokens arm-1 --file {tmp_path / 'tokens'} >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert b"no stdout" in done.stderr
    assert not (tmp_path / "tokens").exists()


def test_tokens_made_at_once_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: new_token(f"arm-{name}", ("act",), tmp_path / "tokens"), range(40)))
    assert len(read_tokens(tmp_path / "tokens")) == 40


REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@pytest.mark.parametrize("method", ["/equiserve.v1.PolicyService/GetPolicy", REFLECTION])
def test_a_stranger_is_refused_without_waiting_for_his_message(serve, healthy, secrets, method):
    """He could keep every thread waiting for what he never sends."""
    running, never = serve(policy=(str(healthy),), tokens=secrets[0]), threading.Event()

    def silence():
        never.wait()
        yield b""

    try:
        assert code_of(lambda: running.channel.stream_stream(method)(silence(), timeout=10)) == "UNAUTHENTICATED"
    finally:
        never.set()


def test_a_name_is_given_once(tmp_path):
    new_token("arm", ("act",), tmp_path / "tokens")
    with pytest.raises(StartupError, match="already"):
        new_token("arm", ("admin",), tmp_path / "tokens")


def test_a_token_is_written_for_its_owner_and_survives_a_second_run(tmp_path, monkeypatch, capsys):
    tokens, output = tmp_path / "tokens", tmp_path / "arm.token"
    monkeypatch.setattr("sys.argv", ["tokens", "arm", "--file", str(tokens), "--output", str(output)])
    assert make_token() == 0
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    secret, hashes = output.read_text(), tokens.read_text()
    assert hashlib.sha256(secret.strip().encode()).hexdigest() in hashes
    assert make_token() == 1
    assert (output.read_text(), tokens.read_text()) == (secret, hashes)
    said = capsys.readouterr()
    assert said.out == ""
    assert "arm.token exists already" in said.err
    output.unlink()
    assert make_token() == 1  # the name is taken
    assert not output.exists()


def served_certificate(address):
    host, port = address.rsplit(":", 1)
    return ssl.get_server_certificate((host, int(port)))


def test_certificates_are_replaced_without_a_restart(healthy, pki, tmp_path, caplog):
    cert, key = tmp_path / "server.pem", tmp_path / "server.key"

    def put(side, *files):
        for target, end in ((cert, "pem"), (key, "key")):
            if end in files:
                target.write_bytes((pki / side / f"localhost.{end}").read_bytes())

    def pem(side):
        return ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert((pki / side / "localhost.pem").read_text()))

    put("ours", "pem", "key")
    with Server(settings(healthy, tls_cert=cert, tls_key=key)) as server:
        server.load()
        with channel_to(server.address, pki, "TLS") as lasting:
            stub = pb_grpc.PolicyServiceStub(lasting)
            stub.GetAction(acting(1), timeout=5)
            put("theirs", "pem")  # half replaced
            for _ in range(3):
                assert served_certificate(server.address) == pem("ours")
            assert caplog.text.count("do not fit") == 1
            put("theirs", "key")
            assert served_certificate(server.address) == pem("theirs")
            stub.GetAction(acting(2), timeout=5)


def test_the_clients_authority_is_replaced_without_a_restart(healthy, pki, tmp_path):
    """Else nobody whose certificate was signed by the old one could be kept out."""
    authority = tmp_path / "ca.pem"

    def put(side):
        authority.write_bytes((pki / side / "ca.pem").read_bytes())

    put("ours")
    with Server(settings(healthy, **server_flags(pki, "TLS"), tls_client_ca=authority)) as server:
        server.load()

        def codes():
            found = []
            for how in ("mTLS", "mTLS, another authority's"):
                with channel_to(server.address, pki, how) as channel:
                    stub = pb_grpc.PolicyServiceStub(channel)
                    found.append(code_of(lambda stub=stub: stub.GetAction(acting(1), timeout=5)))
            return found

        assert codes() == ["OK", "UNAVAILABLE"]
        put("theirs")
        assert codes() == ["UNAVAILABLE", "OK"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tls_cert": Path("nothing.pem"), "tls_key": Path("nothing.key")}, "nothing.pem"),
        ({"tls_cert": Path("only.pem")}, "go together"),
        ({"tls_client_ca": Path("ca.pem")}, "needs --tls-cert"),
        ({"tokens": Path("nothing")}, "--tokens"),
    ],
)
def test_what_cannot_be_secured_does_not_start(healthy, changed, words):
    with pytest.raises(StartupError, match=words):
        Server(settings(healthy, **changed))


def test_an_authority_that_is_missing_is_named(healthy, pki):
    with pytest.raises(StartupError, match=r"--tls-client-ca nowhere\.pem.*'nowhere\.pem'"):
        Server(settings(healthy, **server_flags(pki, "TLS"), tls_client_ca=Path("nowhere.pem")))


def test_a_certificate_and_another_key_do_not_start(healthy, pki):
    pair = {"tls_cert": pki / "ours" / "localhost.pem", "tls_key": pki / "theirs" / "localhost.key"}
    with pytest.raises(StartupError, match="tls-cert"):
        Server(settings(healthy, **pair))


def test_an_address_that_others_reach_is_fine_with_tls(healthy, pki):
    with Server(settings(healthy, listen="0.0.0.0:0", **server_flags(pki, "TLS"))) as server:
        assert server.address.startswith("0.0.0.0:")


def test_metadata_is_capped(running):
    with pytest.raises(grpc.RpcError) as refused:
        running.stub.GetAction(acting(1), metadata=(("x-large", "x" * 100_000),))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(healthy, pki, tmp_path):
    flags = server_flags(pki, "TLS")
    key = load_pem_private_key(flags["tls_key"].read_bytes(), None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    flags["tls_key"] = tmp_path / "locked.key"
    flags["tls_key"].write_bytes(locked)
    with pytest.raises(StartupError, match=r"--tls-key .*locked.key: .*passphrase"):
        Server(settings(healthy, **flags))


def test_a_token_is_revoked_while_policies_prove_themselves(healthy, tmp_path):
    new_token("arm-1", ("act",), tmp_path / "tokens")
    server, asked = Server(settings(healthy, tokens=tmp_path / "tokens")), threading.Event()
    refresh_when(asked, server)
    (tmp_path / "tokens").write_text("")
    asked.set()
    until(lambda: not server.gate._tokens)
    assert server.library.refresh() == []  # the start looks at every file itself
    server.load()
    assert [p.name for p in server.registry] == ["tiny"]
    server.stop()
