"""What the tests of the HTTP side share."""

import pytest
from starlette.testclient import TestClient

from hvdext.serving.http.app import make_app
from tests.unit.serving.serving_fakes import FakeService


@pytest.fixture
def service():
    return FakeService()


@pytest.fixture
def client(service):
    return TestClient(make_app(service, max_request_bytes=100_000))
