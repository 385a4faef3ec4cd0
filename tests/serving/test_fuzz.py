"""Whatever bytes come: a status that says whose mistake it is, no crash, no INTERNAL, no traceback."""

import random
from collections import Counter

import grpc
import pytest
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from hypothesis import given
from hypothesis import strategies as st

from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected
from serving.answering import PATHS
from serving.parsing import LARGE_BYTES, _require_little
from serving.security import new_token
from serving.wire import parts
from tests.serving.requests import acting, refusal

FAULTS = {"INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS", "ABORTED", "DEADLINE_EXCEEDED"}
SEEDS: dict[str, Message] = {
    "GetAction": acting(1, policy="tiny"),
    "GetActionBatch": pb.GetActionBatchRequest(requests=[acting(1), acting(2)]),
    "StartEpisode": pb.StartEpisodeRequest(policy="tiny", contract="{}", limits={"planar": 0.02}, seed=3),
    "EndEpisode": pb.EndEpisodeRequest(episode_id="e", outcome=pb.EndEpisodeRequest.OUTCOME_SUCCESS),
    "GetPolicy": pb.GetPolicyRequest(name="tiny", version="0"),
    "ListPolicies": pb.ListPoliciesRequest(),
    "GetStats": pb.GetStatsRequest(),
    "LoadPolicy": pb.LoadPolicyRequest(name="tiny"),
    "UnloadPolicy": pb.UnloadPolicyRequest(name="tiny", version="0"),
    "SetDefaultPolicy": pb.SetDefaultPolicyRequest(name="tiny"),
}
"""All methods but Drain, which an empty message asks for."""
OFTEN = (24, 4, 6, 4, 2, 1, 1, 1, 1, 1)


def mutated(content, rng):
    """One of the ways in which bytes go wrong on their way, or on purpose."""
    content, kind = bytearray(content), rng.randrange(6)
    place = rng.randrange(len(content)) if content else 0
    if kind == 0 or not content:
        return rng.randbytes(rng.choice((0, 1, 2, 7, 40, 300)))
    if kind == 1:
        return bytes(content[:place])
    if kind == 2:
        content[place:place] = rng.randbytes(rng.randint(1, 9))
    elif kind == 3:
        del content[place : place + rng.randint(1, 9)]
    elif kind == 4:  # tags and lengths are at the beginning and the end
        for _ in range(rng.randint(1, 4)):
            edge = rng.randrange(min(40, len(content)))
            content[edge if rng.random() < 0.5 else -1 - edge] = rng.randrange(256)
    else:
        for _ in range(rng.randint(1, 20)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def fuzz(channel, count, seed=0, metadata=()):
    """Send so many mutated messages; how often each (method, status) came, and details that should not have."""
    rng, seen, leaked = random.Random(seed), Counter(), []
    calls = {name: channel.unary_unary(PATHS[name], lambda b: b, lambda b: b) for name in SEEDS}
    contents = {name: message.SerializeToString() for name, message in SEEDS.items()}
    for _ in range(count):
        name = rng.choices(list(SEEDS), OFTEN)[0]
        try:
            calls[name](mutated(contents[name], rng), timeout=10, metadata=metadata)
            seen[name, "OK"] += 1
        except grpc.RpcError as error:
            seen[name, error.code().name] += 1
            said = f"{error.details()} {error.trailing_metadata()}"  # google.rpc.Status is in the latter
            if "Traceback" in said or 'File "' in said or error.code().name in FAULTS:
                leaked.append(said)
    return seen, leaked


def fields_of(content):
    """On the outermost level, as protobuf counts them."""
    known = pb.GetActionBatchRequest.FromString(content)
    return len(known.requests) + len(UnknownFieldSet(known))


FIELDS = (b"\x0a\x00", b"\x0a\x02\x30\x07", b"\x10\x96\x01", b"\x19" + bytes(8), b"\x25" + bytes(4))


@given(st.lists(st.sampled_from(FIELDS)), st.binary(max_size=4))
def test_fields_are_found_without_being_parsed(fields, around):
    content = b"".join(fields)
    found = list(parts(around + content + around, len(around), len(around) + len(content)))
    assert len(found) == fields_of(content) == len(fields)
    assert [part.number for part in found] == [field[0] >> 3 for field in fields]
    assert [part.is_bytes for part in found] == [field[0] & 7 == 2 for field in fields]


@given(st.binary(max_size=40))
def test_what_protobuf_reads_has_as_many_fields_or_a_group(content):
    try:
        count = fields_of(content)
    except DecodeError:
        return
    assert len(list(parts(content))) >= count  # of a group, begin, content and end are found


@pytest.mark.parametrize("field", [b"\x0a", b"\x0a\x05", b"\x80" * 11, b"\x19\x00"])
def test_a_field_without_an_end_is_no_message(field):
    for content in (field, b"\x0a\x00" + field):
        with pytest.raises(DecodeError):
            list(parts(content))


OTHERS = (b"\x08\x05", b"\x0b\x0a\x01\x38\x0c", b"\xa3\x01\x0a\x03\x07\x07\x07\xa4\x01", b"\x0a\x02\x08\x05")
"""Fields that are a number where a message is known, or lie in a group; and a message with one."""


@given(st.lists(st.sampled_from((*FIELDS, *OTHERS))))
def test_what_protobuf_accepts_is_not_refused_as_no_message(fields):
    content = b"".join(fields)
    pb.GetActionBatchRequest.FromString(content)
    _require_little(content, "GetActionBatch")
    large = content + within(pb.GetActionRequest, "observation", within(pb.Observation, "depth", bytes(LARGE_BYTES)))
    pb.GetActionRequest.FromString(large)
    _require_little(large, "GetAction")


def test_the_search_takes_no_longer_than_what_it_prevents(monkeypatch):
    """However the fields are spread over requests, and these over a batch."""
    seen = 0

    def counted(*where):
        nonlocal seen
        for part in parts(*where):
            seen += 1
            yield part

    monkeypatch.setattr("serving.parsing.parts", counted)
    observation = within(pb.GetActionRequest, "observation", b"\x10\x01" * 64)
    batch = within(pb.GetActionBatchRequest, "requests", observation * 64) * 500
    with pytest.raises(Rejected):
        _require_little(batch, "GetActionBatch")
    assert seen < 20_000


def within(message, field, content):
    """`content` as a field of such a message, in bytes."""
    size, head = len(content), message.DESCRIPTOR.fields_by_name[field].number << 3 | 2
    return bytes([head, *(size >> 7 * place & 127 | 128 for place in range(3)), size >> 21]) + content


@pytest.mark.parametrize("where", ["in a request", "in an observation", "in a batch's request"])
def test_a_field_that_comes_again_and_again_is_refused_before_it_is_parsed(running, where):
    """To protobuf all of them are one, and four megabytes of them a tenth of a second in which nothing else goes on."""
    again = within(pb.GetActionRequest, "observation", b"")
    if where == "in an observation":
        pose = within(pb.Observation, "pose", b"")
        again = within(pb.GetActionRequest, "observation", pose * 100)
    frame = within(pb.Observation, "depth", bytes(LARGE_BYTES))
    sent = again * (1 if where == "in an observation" else 100) + within(pb.GetActionRequest, "observation", frame)
    name = "GetAction"
    if where == "in a batch's request":
        sent, name = within(pb.GetActionBatchRequest, "requests", sent + 64 * 256 * again), "GetActionBatch"
    call = running.channel.unary_unary(PATHS[name], lambda b: b, lambda b: b)
    code, told = refusal(call, sent)
    assert (code, told["field"]) == ("INVALID_ARGUMENT", "request")
    assert told["expected"] == f"at most {64 * (256 if name == 'GetActionBatch' else 1)} fields"


@pytest.mark.parametrize("name", ["StartEpisode", "EndEpisode", "GetPolicy", "ListPolicies", "GetStats"])
def test_what_holds_no_frame_is_short(running, name):
    """Else it would keep all others waiting while it is parsed."""
    call = running.channel.unary_unary(PATHS[name], lambda b: b, lambda b: b)
    code, told = refusal(call, b"\x32\x00" * 80_000)
    assert (code, told["field"], told["expected"]) == ("INVALID_ARGUMENT", "request", "at most 131072 bytes")


@pytest.mark.parametrize("seed", range(3))
def test_no_bytes_are_the_servers_fault(serve, healthy, tmp_path, seed, caplog):
    """Sent by one who may do everything: the gate keeps them from no method."""
    secret = new_token("operator", ("admin",), tmp_path / "tokens")
    token = (("authorization", f"Bearer {secret}"),)
    running = serve(policy=(f"tiny={healthy}",), max_episodes=100_000, tokens=tmp_path / "tokens")
    seen, leaked = fuzz(running.channel, 1000, seed, token)
    assert leaked == []
    assert len(seen) > len(SEEDS)
    assert not {code for _, code in seen} & {"PERMISSION_DENIED", "UNAUTHENTICATED"}
    assert "Traceback" not in caplog.text
    running.stub.GetAction(acting(1), metadata=token)
