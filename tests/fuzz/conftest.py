import pytest
from fuzz.home import make_home
from fuzz.judge import settle


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """What every input changes a copy of, once for all of them."""
    folder = make_home(tmp_path_factory.mktemp("home"))
    settle()
    return folder
