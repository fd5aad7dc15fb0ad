"""Hypothesis draws the same examples on every run, so that the tests pass or fail by the code
alone; FOUNDATION_EXPLORE=1 draws new ones"""

import os

from hypothesis import settings

settings.register_profile(
    "steady", derandomize=not os.environ.get("FOUNDATION_EXPLORE"), deadline=None
)
settings.load_profile("steady")
