"""The runs in field/ are run by tests, and are none: to import one is to run it."""

collect_ignore = ["field"]
