"""Keys, hosts, pages of other sites, methods, and the headers that every answer carries."""

import os

import pytest
from starlette.testclient import TestClient

from hvdext.serving.http.api_keys import read_keys
from hvdext.serving.http.app import make_app
from tests.unit.serving.serving_fakes import FakeService

KEYS = ("a-key-of-some-length", "another-key-of-that-kind")
ROWS = {"instances": [[1, 2, 3]]}
PREDICT = "/v1/models/scale:predict"


@pytest.fixture
def guarded():
    return TestClient(make_app(FakeService(), api_keys=KEYS))


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEYS[0]}"},
        {"Authorization": f"bearer  {KEYS[1]}"},
        {"X-API-Key": KEYS[1]},
    ],
)
def test_a_key_opens(guarded, headers):
    answer = guarded.post(PREDICT, json=ROWS, headers=headers)
    assert answer.json() == {"predictions": [[3, 6, 9]]}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": KEYS[0]},
        {"Authorization": f"Basic {KEYS[0]}"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {KEYS[0]}x"},
        {"Authorization": f"Bearer {KEYS[0][:-1]}"},
        {"X-API-Key": "\xff\xfe".encode("latin-1")},
        {"X-API-Key": ", ".join(KEYS)},
    ],
)
def test_nothing_else_opens(guarded, headers):
    for method, path in (
        ("POST", PREDICT),
        ("GET", "/metrics"),
        ("GET", "/status"),
        ("GET", "/openapi.json"),
    ):
        answer = guarded.request(method, path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == 'Bearer realm="hvdext"'
        assert list(answer.json()) == ["error"]
    assert guarded.get("/none", headers=headers).status_code == 401  # which paths there are is not told


def test_health_and_the_pages_are_free_and_tell_nothing_of_the_models(guarded):
    for path in ("/v2/health/live", "/v2/health/ready", "/", "/docs"):
        answer = guarded.get(path)
        assert answer.status_code == 200
        assert "scale" not in answer.text.replace("initial-scale", "").replace("non-scaling", "")
    assert "mixed" in TestClient(make_app(FakeService())).get("/docs").text


def test_keys_are_read_from_a_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEYS[0]}\n\n  {KEYS[1]}  \n")
    path.chmod(0o640)
    assert read_keys(path) == KEYS


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        (KEYS[0], 0o644, "must not be readable by everyone"),
        (KEYS[0], 0o620, "nor writable by others than its owner"),
        ("", 0o600, "one key per line. Received: none"),
        ("# nothing\n", 0o600, "Received: none"),
        (f"{KEYS[0]}\nfifteen-letters\n", 0o600, "line 2 of .*, 15 characters"),
        ("with a space in its middle", 0o600, "printable ASCII characters without spaces"),
        ("schlüssel-mit-umlaut", 0o600, "printable ASCII"),
    ],
)
def test_key_files_that_are_refused(tmp_path, text, mode, said):
    path = tmp_path / "keys"
    path.write_text(text)
    os.chmod(path, mode)
    with pytest.raises(ValueError, match=said) as raised:
        read_keys(path)
    assert not text or text.splitlines()[0] not in str(raised.value)  # no message shows a key


LOOPBACK = ("localhost", "127.0.0.1", "::1")


@pytest.mark.parametrize("host", ["localhost:8000", "LOCALHOST", "127.0.0.1:1", "[::1]:8000", "[::1]"])
def test_hosts_that_are_ours(host):
    client = TestClient(make_app(FakeService(), allowed_hosts=LOOPBACK))
    assert client.get("/v2", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:8000", "", "127.0.0.1.evil", "[::2]"]
)
def test_hosts_that_are_not(host):
    client = TestClient(make_app(FakeService(), allowed_hosts=LOOPBACK))
    answer = client.get("/v2", headers={"Host": host})
    assert answer.status_code == 403
    assert "127.0.0.1 or ::1 or localhost" in answer.json()["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://testserver"}, 200),
        ({"Origin": "https://models.example", "Sec-Fetch-Site": "same-origin"}, 200),  # behind a proxy
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://testserver:81"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://testserver"}, 403),
    ],
)
def test_pages_of_other_sites_cannot_post(client, headers, status):
    answer = client.post(PREDICT, json=ROWS, headers=headers)
    assert answer.status_code == status
    assert client.post("/v2/repository/models/mixed/unload", headers=headers).status_code == status
    assert client.get("/v2", headers=headers).status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_a_form_from_a_browser_is_refused(client):
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Sec-Fetch-Site": "same-origin"}
    assert client.post(PREDICT, json=ROWS, headers=headers).status_code == 415


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v2/models/scale/infer", "POST"),
        ("DELETE", "/v2/models/scale", "GET, HEAD"),
        ("POST", "/v2/health/live", "GET, HEAD"),
        ("OPTIONS", "/v2/repository/index", "POST"),
        ("TRACE", "/", "GET, HEAD"),
        ("POST", "/metrics", "GET, HEAD"),
        ("PUT", "/v1/models/scale:predict", "POST"),
    ],
)
def test_wrong_methods(client, method, path, allowed):
    answer = client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert answer.json() == {"error": f"This path takes {allowed}. Received: {method}."}


@pytest.mark.parametrize(
    "path", ["/v3", "/v2/", "/v2/models", "/v2/models//infer", "/v2/models/a%2Fb", "/%00"]
)
def test_unknown_paths(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert list(answer.json()) == ["error"]


def test_every_answer_carries_the_headers_of_security(client):
    for answer in (client.get("/"), client.get("/v2"), client.get("/none"), client.delete("/v2")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert client.head("/v2").status_code == 200
