"""A pytest plugin: the hypothesis profile `brief`, for runs whose builds are many times slower."""

import hypothesis

hypothesis.settings.register_profile(
    "brief", deadline=None, derandomize=True, max_examples=8, database=None
)
