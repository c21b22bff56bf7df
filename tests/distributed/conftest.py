"""Scenarios run on ranks of their own, by test_ranks.py: pytest collects neither them nor what they import."""

collect_ignore_glob = ["ranks.py", "sharded_models.py", "scenarios/*"]
