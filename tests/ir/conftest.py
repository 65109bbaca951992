"""Property tests here run without a deadline (the first call of torch is slow) and derive their examples from the test, not from chance."""

from hypothesis import settings

settings.register_profile("ir", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("ir")
