"""The installed package, shared by the tests that run documents."""

import pytest

from tests.support import installed_package


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of programs that see the package as it is installed, and nothing of the checkout."""
    return installed_package.install(tmp_path_factory.mktemp("installed"))
