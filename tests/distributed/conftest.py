from tests.training.conftest import models, shards, two_ranks  # noqa: F401
