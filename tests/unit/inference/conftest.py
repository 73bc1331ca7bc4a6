"""What the tests of the HTTP side share."""

import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from hvdext.inference.serving.app import make_app

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("serving_fakes")


@pytest.fixture
def service():
    from serving_fakes import FakeService

    return FakeService()


@pytest.fixture
def client(service):
    return TestClient(make_app(service, max_request_bytes=100_000))
