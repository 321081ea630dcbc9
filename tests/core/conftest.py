"""Settings of the property tests: a busy machine must not fail them by being slow."""

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
