"""What the suites of one contract share: each test runs for every implementation."""

import pytest
from implementations import IMPLEMENTATIONS


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param
