"""Run at the start of every process of the suite (conftest.py puts this folder on PYTHONPATH, and runs it for itself).

Leaves an eighth of the topics that the calibration text `python-docs` is made of: tokenising all of them took more than
half of a tiny model's compression, a quarter of them still two fifths. `prose` is a longer text, of that quarter.
"""

from pydoc_data import topics

if not hasattr(topics, "prose"):
    names = sorted(topics.topics)
    topics.prose = "\n\n".join(topics.topics[name] for name in sorted({*names[::4], "for"}))
    topics.topics = {name: topics.topics[name] for name in [*names[::8], "for"]}
