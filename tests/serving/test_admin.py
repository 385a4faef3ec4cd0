"""Operating a server: new versions go live whole or not at all, and nobody who acts notices."""

import shutil
import threading
from types import SimpleNamespace

import grpc
import onnx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from protos.errors import Rejected, Status
from protos.spaces import ACTION, ObservationSpec, PolicySpec
from serving.envelope import Limits
from serving.library import Library
from serving.metrics import Metrics
from serving.registry import Registry
from serving.security import new_token
from serving.server import refresh_when
from tests.makers import tiny_policy_file
from tests.serving.conftest import start
from tests.serving.requests import acting, refusal


def filled(folder):
    """The folder, with door.onnx and other.onnx."""
    folder.mkdir()
    tiny_policy_file(folder / "door.onnx", weight=1.0)
    tiny_policy_file(folder / "other.onnx", weight=2.0)
    return folder


def operate(serve, folder, tokens):
    """(running server over `folder`, the admin's stub, the metadata that makes a caller admin)"""
    secret = new_token("operator", ("admin",), tokens)
    running = serve(policies=folder, default_policy="door", tokens=tokens)
    return running, pb_grpc.PolicyAdminStub(running.channel), (("authorization", f"Bearer {secret}"),)


@pytest.fixture
def folder(tmp_path):
    return filled(tmp_path / "policies")


@pytest.fixture
def operated(serve, folder, tmp_path):
    return operate(serve, folder, tmp_path / "tokens")


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """Another, shared by tests that change nothing."""
    home = tmp_path_factory.mktemp("unchanged")
    operated = operate(start, filled(home / "policies"), home / "tokens")
    yield operated
    operated[0].channel.close()
    operated[0].server.stop()


def versions(running, name="door"):
    return [p.version for p in running.server.registry if p.name == name]


def take_up(operated, folder, weight):
    """Another door.onnx goes live; its version."""
    _, admin, token = operated
    tiny_policy_file(folder / "door.onnx", weight=weight)
    return admin.LoadPolicy(pb.LoadPolicyRequest(name="door"), metadata=token).policy.version


def test_a_folder_is_served_by_the_names_of_its_files(unchanged):
    running, _, token = unchanged
    entries = running.stub.ListPolicies(pb.ListPoliciesRequest(), metadata=token).policies
    assert [(e.name, e.is_default) for e in entries] == [("door", True), ("other", False)]


def test_a_file_that_no_caller_could_name_is_told(folder, serve, caplog):
    tiny_policy_file(folder / "my door.onnx")
    running = serve(policies=folder, default_policy="door")
    assert {p.name for p in running.server.registry} == {"door", "other"}
    assert "my door.onnx is left out" in caplog.text


def test_a_new_file_goes_live_when_it_is_asked_for(operated, folder):
    running, admin, token = operated
    (before,) = versions(running)
    assert admin.LoadPolicy(pb.LoadPolicyRequest(name="door"), metadata=token).policy.version == before
    tiny_policy_file(folder / "door.onnx", weight=1.5)
    assert running.stub.GetAction(acting(), metadata=token).version == before
    loaded = admin.LoadPolicy(pb.LoadPolicyRequest(name="door"), metadata=token).policy
    assert [p.name for p in loaded.proofs] == ["golden", "symmetry", "gripper"]
    assert loaded.inference_ms > 0
    assert running.stub.GetAction(acting(), metadata=token).version == loaded.version != before
    assert running.stub.GetAction(acting(version=before), metadata=token).version == before


def test_the_oldest_version_leaves(operated, folder):
    running, _, _ = operated
    seen = versions(running) + [take_up(operated, folder, weight) for weight in (1.5, 1.6, 1.7)]
    assert versions(running) == seen[-2:]


def test_a_version_can_come_back(operated, folder):
    running, _, token = operated
    (first,) = versions(running)
    for weight in (1.5, 1.0):
        take_up(operated, folder, weight)
    assert running.stub.GetAction(acting(), metadata=token).version == first


def truncated(path):
    tiny_policy_file(path, weight=3.0)
    path.write_bytes(path.read_bytes()[:-200])


def garbage(path):
    path.write_bytes(b"no model at all")


def transposed(path):
    tiny_policy_file(path, weight=3.0, breaks=["transposed"])


def lopsided(path):
    tiny_policy_file(path, weight=3.0, breaks=["lopsided"], golden_from="broken")


def deaf(path):
    tiny_policy_file(path, weight=3.0, breaks=["gripper_dead"], golden_from="broken")


def not_a_number(path):
    tiny_policy_file(path, weight=3.0, breaks=["nan"])


def another_contract(path):
    tiny_policy_file(path, PolicySpec(ObservationSpec(height=16, width=16), ACTION), weight=3.0)


def weights_elsewhere(path):
    model = onnx.load(tiny_policy_file(path, weight=3.0))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=1024)


def squeezed(path):
    """Its value has a batch's shape for two robots, and none for one."""
    model = onnx.load(tiny_policy_file(path, weight=3.0))
    model.graph.output.remove(next(o for o in model.graph.output if o.name == "value"))
    for node in model.graph.node:
        node.output[:] = ["whole" if name == "value" else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Squeeze", ["whole"], ["value"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("value", onnx.TensorProto.FLOAT, None))
    onnx.save(model, path)


def operators_of_its_own(path):
    model = onnx.load(tiny_policy_file(path, weight=3.0))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)


def no_text(path):
    content = tiny_policy_file(path, weight=3.0).read_bytes()
    path.write_bytes(content.replace(b"equiserve/tiny-v0", b"equiserve/tiny-v\xff"))


def another_input(path):
    model = onnx.load(tiny_policy_file(path, weight=3.0))
    model.graph.input.append(onnx.helper.make_tensor_value_info("extra", onnx.TensorProto.FLOAT, [1]))
    onnx.save(model, path)


def unsure(path):
    tiny_policy_file(path, weight=3.0, breaks=["nan_std"], golden_from="broken")


def missing(path):
    path.unlink()


BAD = (truncated, garbage, transposed, lopsided, deaf, not_a_number, another_contract, weights_elsewhere)
BAD += (operators_of_its_own, another_input, squeezed, no_text, unsure)


@pytest.mark.parametrize("candidate", BAD, ids=lambda c: c.__name__)
def test_a_bad_candidate_never_replaces_a_good_policy(operated, folder, candidate):
    """Neither when all files are looked at, nor when it is asked for."""
    running, admin, token = operated

    def live():
        return versions(running), running.stub.GetAction(acting(), metadata=token).action

    before = live()
    candidate(folder / "door.onnx")
    running.server.library.refresh()
    assert live() == before
    code, parts = refusal(admin.LoadPolicy, pb.LoadPolicyRequest(name="door"), metadata=token)
    assert code == "FAILED_PRECONDITION"
    assert "stays live" in parts["remedy"]
    assert live() == before


@pytest.mark.parametrize("name", ["nothing", "../door", "/etc/passwd", "door.onnx", "door\n", "x" * 5000])
def test_callers_name_policies_and_never_paths(unchanged, name):
    _, admin, token = unchanged
    code, parts = refusal(admin.LoadPolicy, pb.LoadPolicyRequest(name=name), metadata=token)
    assert (code, parts["field"], parts["expected"]) == ("NOT_FOUND", "name", "one of: door, other")


def test_the_default_is_chosen_and_not_taken_away(operated):
    running, admin, token = operated
    assert refusal(admin.UnloadPolicy, pb.UnloadPolicyRequest(name="door"), metadata=token)[0] == "FAILED_PRECONDITION"
    admin.SetDefaultPolicy(pb.SetDefaultPolicyRequest(name="other"), metadata=token)
    assert running.stub.GetAction(acting(), metadata=token).policy == "other"
    admin.UnloadPolicy(pb.UnloadPolicyRequest(name="door"), metadata=token)
    assert refusal(running.stub.GetAction, acting(policy="door"), metadata=token)[0] == "NOT_FOUND"


@pytest.mark.parametrize("method", ["LoadPolicy", "UnloadPolicy", "SetDefaultPolicy"])
@pytest.mark.parametrize(("name", "code"), [("", "INVALID_ARGUMENT"), ("nothing", "NOT_FOUND")])
def test_a_change_must_say_what_it_means(unchanged, method, name, code):
    _, admin, token = unchanged
    asked = getattr(pb, f"{method}Request")(name=name)
    assert refusal(getattr(admin, method), asked, metadata=token)[0] == code


def test_a_refresh_takes_up_new_files_and_drops_vanished_ones(operated, folder):
    running, _, token = operated
    shutil.copy(folder / "other.onnx", folder / "third.onnx")
    (folder / "other.onnx").unlink()
    (folder / "not a name!.onnx").write_bytes(b"")
    running.server.library.refresh()
    assert [p.name for p in running.server.registry] == ["door", "third"]
    missing(folder / "door.onnx")
    running.server.library.refresh()
    assert running.stub.GetAction(acting(), metadata=token).policy == "door"


def test_a_folder_that_is_away_takes_nothing_with_it(operated, folder):
    running, admin, token = operated
    away = folder.rename(folder.with_name("away"))
    for comes_back_empty in (False, True):  # as the place does where a disk was mounted
        if comes_back_empty:
            folder.mkdir()
        running.server.library.refresh()
        assert [p.name for p in running.server.registry] == ["door", "other"]
    folder.rmdir()
    code, parts = refusal(admin.LoadPolicy, pb.LoadPolicyRequest(name="door"), metadata=token)
    assert (code, parts["field"]) == ("FAILED_PRECONDITION", "policies")
    admin.UnloadPolicy(pb.UnloadPolicyRequest(name="other"), metadata=token)
    away.rename(folder)
    running.server.library.refresh()  # and nothing that was unloaded meanwhile comes back with it
    assert [p.name for p in running.server.registry] == ["door"]


@pytest.mark.parametrize("how", ["folder is empty", "file cannot be read"])
def test_what_was_unloaded_while_its_file_was_away_stays_so(operated, folder, how):
    running, admin, token = operated
    away = folder.with_name("away")
    if how == "folder is empty":  # as the place is where a disk was mounted
        folder.rename(away)
        folder.mkdir()
    else:
        (folder / "other.onnx").rename(away)
        (folder / "other.onnx").mkdir()
    admin.UnloadPolicy(pb.UnloadPolicyRequest(name="other"), metadata=token)
    running.server.library.refresh()
    (folder if how == "folder is empty" else folder / "other.onnx").rmdir()
    away.rename(folder if how == "folder is empty" else folder / "other.onnx")
    running.server.library.refresh()
    assert [p.name for p in running.server.registry] == ["door"]


def test_a_policy_that_was_given_by_its_file_needs_no_folder(serve, folder, tmp_path):
    file, secret = tiny_policy_file(tmp_path / "named.onnx"), new_token("operator", ("admin",), tmp_path / "tokens")
    running = serve(policy=(f"named={file}",), policies=folder, tokens=tmp_path / "tokens")
    folder.rename(folder.with_name("away"))
    tiny_policy_file(file, weight=1.5)
    asked, token = pb.LoadPolicyRequest(name="named"), (("authorization", f"Bearer {secret}"),)
    loaded = pb_grpc.PolicyAdminStub(running.channel).LoadPolicy(asked, metadata=token)
    assert versions(running, "named")[-1] == loaded.policy.version


def test_a_name_keeps_its_contract_while_nothing_is_live_under_it(operated, folder):
    running, admin, token = operated
    admin.UnloadPolicy(pb.UnloadPolicyRequest(name="other"), metadata=token)
    another_contract(folder / "other.onnx")
    code, parts = refusal(admin.LoadPolicy, pb.LoadPolicyRequest(name="other"), metadata=token)
    assert code == "FAILED_PRECONDITION"
    assert "contract" in parts["got"]
    assert [p.name for p in running.server.registry] == ["door"]


def test_what_was_unloaded_comes_back_when_asked_for_alone(operated, folder):
    """Or a token that is revoked by SIGHUP would bring back a version that was found to be bad."""
    running, admin, token = operated
    (good,) = versions(running)
    bad = take_up(operated, folder, 1.5)
    admin.UnloadPolicy(pb.UnloadPolicyRequest(name="door", version=bad), metadata=token)
    admin.UnloadPolicy(pb.UnloadPolicyRequest(name="other"), metadata=token)
    running.server.library.refresh()
    assert [(p.name, p.version) for p in running.server.registry] == [("door", good)]
    tiny_policy_file(folder / "other.onnx", weight=2.5)
    running.server.library.refresh()
    assert [p.name for p in running.server.registry] == ["door", "other"]
    admin.LoadPolicy(pb.LoadPolicyRequest(name="door"), metadata=token)
    assert versions(running) == [good, bad]


def test_a_file_that_is_put_back_goes_live(operated, folder):
    """What was unloaded is what its file held, not every version that ever was."""
    running, admin, token = operated
    (first,) = versions(running)
    second = take_up(operated, folder, 1.5)
    admin.UnloadPolicy(pb.UnloadPolicyRequest(name="door", version=first), metadata=token)
    tiny_policy_file(folder / "door.onnx", weight=1.0)
    running.server.library.refresh()
    assert versions(running) == [second, first]


def test_metrics_speak_of_live_policies_alone(operated, folder):
    running, admin, token = operated
    metrics = running.server.metrics.registry

    def proved():
        samples = (s for family in metrics.collect() for s in family.samples if s.name == "equiserve_proof_error")
        return {(s.labels["policy"], s.labels["version"]) for s in samples}

    def loads(result):
        return metrics.get_sample_value("equiserve_policy_loads_total", {"result": result}) or 0

    another_contract(folder / "door.onnx")
    refusal(admin.LoadPolicy, pb.LoadPolicyRequest(name="door"), metadata=token)
    assert (loads("live"), loads("refused")) == (2, 1)
    for weight in (1.5, 1.6, 1.7):
        take_up(operated, folder, weight)
    admin.UnloadPolicy(pb.UnloadPolicyRequest(name="other"), metadata=token)
    assert proved() == {(p.name, p.version) for p in running.server.registry}


def test_nothing_is_loaded_into_a_server_that_starts(tmp_path, folder):
    library = Library(Registry(), Metrics(), (), folder, 1, Limits())
    for change in (lambda: library.load("other", 60.0), lambda: library.unload("other", "", 60.0)):
        with library._loading, pytest.raises(Rejected) as refused:  # as a start does, until all have proved themselves
            change()
        assert refused.value.status is Status.UNAVAILABLE
    assert not list(library.registry)


def test_a_change_does_not_wait_for_another_for_ever(operated, monkeypatch):
    """In a thread that robots' calls need."""
    running, admin, token = operated
    monkeypatch.setattr("serving.library.PATIENCE_S", 0.2)
    with running.server.library._loading:  # as while many files prove themselves
        for method, asked in (("LoadPolicy", pb.LoadPolicyRequest), ("UnloadPolicy", pb.UnloadPolicyRequest)):
            code, parts = refusal(getattr(admin, method), asked(name="other"), metadata=token, timeout=10)
            assert (code, parts["expected"]) == ("UNAVAILABLE", "no other change of policies under way")
    admin.LoadPolicy(pb.LoadPolicyRequest(name="other"), metadata=token)


def test_a_start_that_is_told_to_stop_goes_live_with_nothing(folder):
    library, asked = Library(Registry(), Metrics(), (), folder, 1, Limits()), []

    def stopped():
        asked.append(True)
        return len(asked) > 1

    assert library.open("door", stopped=stopped) is False
    assert not list(library.registry)


def test_a_failure_does_not_make_the_server_deaf_to_the_next_signal():
    """Which may revoke a token."""
    asked, heard, again = threading.Event(), [], threading.Semaphore(0)

    def fail(what):
        heard.append(what)
        again.release()
        raise TypeError("nobody foresaw that")

    library = SimpleNamespace(refresh=lambda: fail("policies"))
    refresh_when(asked, SimpleNamespace(reload_tokens=lambda: fail("tokens"), library=library))
    for _ in range(2):
        asked.set()
        assert again.acquire(timeout=5)
        assert again.acquire(timeout=5)
    assert heard == 2 * ["tokens", "policies"]


def test_policies_that_take_long_do_not_keep_a_token_from_being_revoked():
    asked, slow, revoked = threading.Event(), threading.Event(), threading.Semaphore(0)
    library = SimpleNamespace(refresh=lambda: slow.wait(10))
    refresh_when(asked, SimpleNamespace(reload_tokens=revoked.release, library=library))
    for _ in range(2):
        asked.set()
        assert revoked.acquire(timeout=5)
    slow.set()


def test_drain_ends_the_server(operated):
    running, admin, token = operated
    admin.Drain(pb.DrainRequest(), metadata=token)
    assert running.server.stopping.is_set()


def test_reloads_under_load_are_never_noticed(operated, folder):
    errors, mixed, episodes = reloads_under_load(*operated, folder, reloads=12, clients=3)
    assert (errors, mixed) == ([], 0)
    assert episodes > 3


def reloads_under_load(running, admin, token, folder, *, reloads, clients):
    """Errors that clients saw, episodes that were answered by more than one version, and all episodes.

    A step that is refused for want of room is asked for again, as a robot does.
    """
    errors, mixed, episodes, over = [], 0, 0, threading.Event()

    def act(request):
        while True:
            try:
                return running.stub.GetAction(request, metadata=token)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise

    def drive():
        nonlocal mixed, episodes
        picture = 0
        while not over.is_set():
            try:
                started = running.stub.StartEpisode(pb.StartEpisodeRequest(), metadata=token)
                seen = set()
                for step in range(5):
                    picture += 1
                    request = acting(picture % 16, episode_id=started.episode_id, step=step)
                    seen.add(act(request).version)
                running.stub.EndEpisode(pb.EndEpisodeRequest(episode_id=started.episode_id), metadata=token)
                mixed += seen != {started.version}
                episodes += 1
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=drive) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for i in range(reloads):
        tiny_policy_file(folder / "door.onnx", weight=1.0 + 0.1 * (i % 7 + 1))
        admin.LoadPolicy(pb.LoadPolicyRequest(name="door"), metadata=token)
    over.set()
    for thread in threads:
        thread.join()
    return errors, mixed, episodes


def test_health_knows_every_policy_by_its_name(operated, folder):
    running, admin, token = operated

    def health(name):
        try:
            asked = health_pb2.HealthCheckRequest(service=name)
            return health_pb2_grpc.HealthStub(running.channel).Check(asked).status
        except grpc.RpcError as error:
            return error.code().name

    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert (health("door"), health("third")) == (serving, "NOT_FOUND")
    tiny_policy_file(folder / "third.onnx", weight=3.0)
    admin.LoadPolicy(pb.LoadPolicyRequest(name="third"), metadata=token)
    assert health("third") == serving
    admin.UnloadPolicy(pb.UnloadPolicyRequest(name="third"), metadata=token)
    assert health("third") == not_serving
