"""Run at the start of every process of the suite (conftest.py puts this folder on PYTHONPATH, and runs it for itself).

Leaves an eighth of the topics that the calibration text `python-docs` is made of: tokenising all of them took more than
half of a tiny model's compression, a quarter of them still two fifths.
"""

from pydoc_data import topics

if not getattr(topics, "shortened", False):
    kept = [*sorted(topics.topics)[::8], "for"]
    topics.topics = {name: topics.topics[name] for name in kept}
    topics.shortened = True
