"""Settings: a file, then the environment, then flags; what does not fit is named with where it stands."""

import sys

import pytest

from protos.spaces import ACTION, ObservationSpec, PolicySpec
from serving import server
from serving.config import Config, parse
from serving.errors import StartupError
from tests.makers import tiny_policy_file

FILE = """
policy = ["a=one.onnx", "b=two.onnx"]
listen = "localhost:1"
insecure = true
valid_for_ms = 150.5
workspace = [0.3, 0.7, -0.2, 0.2, 0.0, 0.5]
limits = { planar = 0.02, z_floor_m = -0.1 }
record = "flight"
log_format = "json"
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "server.toml"
    path.write_text(FILE)
    return str(path)


def test_a_file_says_it_all(file):
    config = parse(["--config", file], {})
    assert config.policy == ("a=one.onnx", "b=two.onnx")
    assert (config.listen, config.insecure, config.valid_for_ms, config.log_format) == (
        "localhost:1",
        True,
        150.5,
        "json",
    )
    assert config.workspace == (0.3, 0.7, -0.2, 0.2, 0.0, 0.5)
    assert config.limits == {"planar": 0.02, "z_floor_m": -0.1}
    assert str(config.record) == "flight"
    bounds = config.bounds
    assert (bounds.fields, bounds.z_floor_m) == ({"planar": 0.02}, -0.1)


@pytest.mark.parametrize("given", [["--config", "{}"], ["--config={}"]])
def test_the_environment_overrides_the_file_and_flags_override_both(file, given):
    environment = {"EQUISERVE_LISTEN": "localhost:2", "EQUISERVE_QUEUE": "7", "OTHER": "x"}
    config = parse([part.format(file) for part in given], environment)
    assert (config.listen, config.queue, config.valid_for_ms) == ("localhost:2", 7, 150.5)
    config = parse(
        [*(part.format(file) for part in given), "--listen", "localhost:3", "--policy", "c.onnx"], environment
    )
    assert (config.listen, config.policy, config.queue) == ("localhost:3", ("c.onnx",), 7)


def test_a_switch_of_the_file_can_be_switched_off(file):
    assert parse(["--config", file, "--no-insecure"], {}).insecure is False
    assert parse(["--config", file], {"EQUISERVE_INSECURE": "false"}).insecure is False


@pytest.mark.parametrize("text", ["1.10", "true", "007", "1e3", "[door]", '"quoted"'])
def test_a_name_stays_a_name_where_it_looks_like_a_number(text):
    config = parse(["--policy", "p.onnx"], {"EQUISERVE_DEFAULT_POLICY": text, "EQUISERVE_RECORD": text})
    assert (config.default_policy, str(config.record)) == 2 * (text.strip('"'),)
    if text != "[door]":  # which is a list of one, but for its quotes
        assert parse([], {"EQUISERVE_POLICY": text}).policy == (text.strip('"'),)


@pytest.mark.parametrize("name", ["RECORD", "POLICIES", "QUEUE", "TOKENS", "TLS_CLIENT_CA", "WORKSPACE", "LIMITS"])
def test_an_empty_variable_is_refused_by_its_name(name):
    """As ${RECORD:-} of a compose file leaves it. A path would be the current folder; a server without tokens, open."""
    with pytest.raises(StartupError, match=f"EQUISERVE_{name} must have a value, or not be there"):
        parse(["--policy", "p.onnx"], {f"EQUISERVE_{name}": ""})


@pytest.mark.parametrize("name", ["record", "policies", "tokens", "metrics_host", "default_policy"])
def test_an_empty_text_is_refused_wherever_it_stands(tmp_path, name):
    """As `--record "$RECORD"` of a unit file leaves it where nothing has set the variable."""
    flag = "--" + name.replace("_", "-")
    for flags in ([flag, ""], [f"{flag}="]):
        with pytest.raises(StartupError, match=f"{flag} must have a value, or not be there"):
            parse(["--policy", "p.onnx", *flags, "--insecure"], {})
    (tmp_path / "server.toml").write_text(f"policy = 'p.onnx'\n{name} = ''")
    with pytest.raises(StartupError, match=f"server.toml: {name} must have a value"):
        parse(["--config", str(tmp_path / "server.toml")], {})


def test_limits_that_are_given_in_several_places_all_hold(file):
    limits = parse(["--policy", "p.onnx", "--limits", "planar", "0.03", "--limits", "lift", "0.01"], {}).limits
    assert limits == {"planar": 0.03, "lift": 0.01}
    assert parse(["--policy", "p.onnx", "--limits=lift", "0.01"], {"EQUISERVE_LIMITS": "{ yaw = 0.1 }"}).limits == {
        "yaw": 0.1,
        "lift": 0.01,
    }
    more = ["--limits", "jump_m", "0.04", "z_floor_m", "-0.2"]
    limits = parse(
        ["--config", file, *more], {"EQUISERVE_LIMITS": "{ lift = 0.02, planar = 0.01, jump_m = 9.0 }"}
    ).limits
    assert limits == {"planar": 0.01, "z_floor_m": -0.2, "lift": 0.02, "jump_m": 0.04}


@pytest.mark.parametrize("pairs", [[], ["planar"], ["planar", "0.03", "lift"]], ids=len)
def test_half_a_limit_is_refused(pairs):
    with pytest.raises(StartupError, match="--limits takes pairs NAME VALUE"):
        parse(["--policy", "p.onnx", "--limits", *pairs, "--limits", "yaw", "0.1"], {})


def test_a_limit_that_no_policy_exceeds_is_told(healthy, caplog):
    """Of millimetres, say."""
    server.check(Config(policy=(f"a={healthy}",), limits={"planar": 30.0, "lift": 0.01}))
    assert [m for m in caplog.messages if "--limits" in m] == [
        "--limits planar 30 changes nothing: the policies' own is 0.05"
    ]


def test_who_acts_by_default_does_not_change_with_a_file_that_is_added(monkeypatch, capsys, tmp_path):
    tiny_policy_file(tmp_path / "drawer.onnx")
    assert checked(monkeypatch, "--policies", tmp_path) == 0
    tiny_policy_file(tmp_path / "bowl.onnx", weight=2.0)
    assert checked(monkeypatch, "--policies", tmp_path) == 1
    assert "by --default-policy, one of bowl, drawer" in capsys.readouterr().err
    assert checked(monkeypatch, "--policies", tmp_path, "--default-policy", "drawer") == 0
    assert "by default drawer" in capsys.readouterr().out
    assert checked(monkeypatch, "--policies", tmp_path, "--policy", f"door={tmp_path / 'drawer.onnx'}") == 0
    assert "by default door" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["METRIC_PORT", "PORT", "LISTEN_PORT", "METRICSPORT"])
def test_a_port_that_kubernetes_would_not_write_is_a_name_mistyped(name):
    with pytest.raises(StartupError, match="no setting is called"):
        parse(["--policy", "p.onnx"], {f"EQUISERVE_{name}": "9090"})


def test_every_kind_of_setting_fits_into_a_variable():
    environment = {
        "EQUISERVE_POLICY": "drawer=p.onnx",
        "EQUISERVE_INSECURE": "true",
        "EQUISERVE_STRICT_FRAMES": "false",
        "EQUISERVE_WORKSPACE": "[0.3, 0.7, -0.2, 0.2, 0.0, 0.5]",
        "EQUISERVE_LIMITS": "{ planar = 0.03 }",
        "EQUISERVE_LOG_FORMAT": "json",
        "EQUISERVE_METRICS_PORT": "9090",
    }
    config = parse([], environment)
    assert (config.policy, config.insecure, config.strict_frames) == (("drawer=p.onnx",), True, False)
    assert (config.workspace[1], config.limits, config.metrics_port) == (0.7, {"planar": 0.03}, 9090)


def test_a_value_is_not_taken_for_a_flag():
    """A name that is also a setting's would switch that setting off, tokens for example, without a word."""
    environment = {"EQUISERVE_TOKENS": "file", "EQUISERVE_QUEUE": "7"}
    config = parse(["--default-policy", "tokens", "--policy", "queue=p.onnx"], environment)
    assert (str(config.tokens), config.queue) == ("file", 7)


def test_the_neighbours_that_kubernetes_tells_of_are_no_settings():
    links = {
        "EQUISERVE_SERVICE_HOST": "10.0.0.1", "EQUISERVE_SERVICE_PORT": "50051", "EQUISERVE_SERVICE_PORT_GRPC": "50051",
        "EQUISERVE_PORT": "tcp://10.0.0.1:50051", "EQUISERVE_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "EQUISERVE_PORT_50051_TCP_ADDR": "10.0.0.1", "EQUISERVE_METRICS_SERVICE_HOST": "10.0.0.2",
        "EQUISERVE_METRICS_PORT": "tcp://10.0.0.2:9090",
    }  # fmt: skip
    assert parse(["--policy", "p.onnx"], links) == parse(["--policy", "p.onnx"], {})


@pytest.mark.parametrize(
    ("content", "environment", "words"),
    [
        ("polici = 'a.onnx'", {}, "no setting is called polici"),
        ("= 3", {}, "server.toml"),
        ("policy = 'a.onnx'", {"EQUISERVE_LISTN": "x"}, "the environment: no setting is called listn"),
        ("queue = -1\npolicy = 'a.onnx'", {}, "queue must be"),
        ("policy = 'a.onnx'\nvalid_for_ms = 1e17", {}, "valid_for_ms must be"),
        ("policy = 'a.onnx'\ngrace_s = inf", {}, "grace_s must be"),
        ("policy = 'a.onnx'\nlimits = { planar = -0.1 }", {}, "planar"),
        ("policy = 'a.onnx'\nmax_batch = 8", {}, "raise --queue"),
        ("check_config = true\npolicy = 'a.onnx'", {}, "no setting is called check_config"),
        ("listen = 'localhost:1'", {}, "no policy"),
        ("policies = '/nowhere'", {}, "must be a folder"),
        ("policy = 'a.onnx'\nmetrics_port = 70000", {}, "metrics_port must be a port"),
        ("policy = 3", {}, "policy must be text"),
        ("policy = 'a.onnx'\nlimits = 3", {}, "limits must be like"),
        ("policy = 'a.onnx'\ninvalid_share = 20", {}, "invalid_share must be 0 to 1"),
        ("policy = 'a.onnx'\nfrozen_after = 1", {}, "frozen_after must be 0 or at least 2"),
        ("policy = 'a.onnx'\nintra_op_threads = 1000000", {}, "intra_op_threads must be 1 to 1024"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, content, environment, words):
    path = tmp_path / "server.toml"
    path.write_text(content)
    with pytest.raises(StartupError, match=words):
        parse(["--config", str(path)], environment)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StartupError, match=r"nothing\.toml"):
        parse(["--config", str(tmp_path / "nothing.toml")], {})


def test_a_wrong_type_is_named_by_its_flag(tmp_path, capsys):
    path = tmp_path / "server.toml"
    path.write_text("policy = 'a.onnx'\nqueue = 'many'")
    with pytest.raises(SystemExit):
        parse(["--config", str(path)], {})
    assert "--queue" in capsys.readouterr().err


def test_defaults_are_safe():
    config = Config(policy=("p.onnx",))
    assert config.listen.startswith("localhost")
    assert not config.insecure
    assert config.valid_for_ms == 200
    assert (config.tokens, config.tls_cert, config.metrics_port, config.record) == (None, None, None, None)


def checked(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["server", *map(str, arguments), "--check-config"])
    return server.main()


def test_a_good_configuration_is_said_to_be_good(monkeypatch, capsys, healthy):
    assert checked(monkeypatch, "--policy", f"door={healthy}") == 0
    assert "it serves door " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--policy", "{bad}"], "image mirrored or transposed?"),
        (["--policy", "{good}", "--default-policy", "other"], "must be one of"),
        (["--policy", "{good}", "--tokens", "{bad}"], "--tokens"),
        (["--policy", "{good}", "--tls-cert", "{bad}", "--tls-key", "{bad}"], "--tls-cert"),
        (["--policy", "{good}", "--limits", "speed", "0.1"], "speed"),
        (["--policies", "{empty}"], "no policy in"),
        (["--policy", "{good}", "--listen", "0.0.0.0:50051"], "--insecure"),
        (["--policy", "{good}", "--listen", "nonsense"], "HOST:PORT"),
        (["--policy", "{good}", "--record", "{bad}"], "--record"),
        (["--policy", "a={good}", "--policy", "a={other}"], "also called a; "),
        (["--policy", "{good}", "--policy", "{newer}"], "are both called tiny; name them apart: A="),
        (["--policy", "tiny={good}", "--policy", "{newer}"], "are both called tiny; name them apart: A="),
    ],
)
def test_a_bad_configuration_is_said_to_be_bad(monkeypatch, capsys, healthy, tmp_path, flags, words):
    empty = tmp_path / "empty"
    empty.mkdir()
    files = {
        "good": healthy,
        "empty": empty,
        "bad": tiny_policy_file(tmp_path / "bad.onnx", breaks=["transposed"]),
        "newer": tiny_policy_file(tmp_path / "newer.onnx", weight=2.0),
        "other": tiny_policy_file(tmp_path / "other.onnx", PolicySpec(ObservationSpec(height=16, width=16), ACTION)),
    }
    assert checked(monkeypatch, *(flag.format(**files) for flag in flags)) == 1
    assert words in capsys.readouterr().err


def test_a_name_stands_for_one_file(monkeypatch, capsys, healthy, tmp_path):
    tiny_policy_file(tmp_path / "door.onnx", weight=2.0)
    assert checked(monkeypatch, "--policy", f"door={healthy}", "--policies", tmp_path) == 1
    assert f"door is in {tmp_path} and is given as {healthy}" in capsys.readouterr().err
