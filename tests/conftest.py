"""Hypothesis draws the same examples on every run, so that the tests pass or fail by the code
alone; FOUNDATION_EXPLORE=1 draws new ones"""

import os

from hypothesis import settings

settings.register_profile(
    "steady", derandomize=not os.environ.get("FOUNDATION_EXPLORE"), deadline=None
)
settings.load_profile("steady")


def pytest_collection_modifyitems(items):
    "The longest files begin, so that two processes end at about the same time"
    long = ("test_site", "test_fuzz", "test_lab", "test_tour")
    items.sort(key=lambda item: item.path.stem not in long)
