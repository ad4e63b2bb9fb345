"""Tests; a package, so that helpers import as `tests.support.models`."""
