"""What holds for every test: random numbers are the same in each run of it, alone or among others."""

import random
import sys
import zlib

import pytest
from hypothesis import settings

settings.register_profile("same examples", derandomize=True)
settings.load_profile("same examples")


def seed_everything(seed: int) -> None:
    """Give the global generators their states; those of packages that are not imported are left alone, so that tests
    that only start processes need not wait for torch."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)


@pytest.fixture(autouse=True)
def seeded():
    seed_everything(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """A fixture that several tests share is set up before the first of them, whichever that is."""
    if fixturedef.scope != "function":
        seed_everything(zlib.crc32(fixturedef.argname.encode()))
