"""The long phases of a compression by their titles: who runs one and who predicts its time name it alike."""

CALIBRATE = "calibrate and decompose"
FORWARD = "forward"
BACKWARD = "backward and decompose"
DECOMPOSE = "decompose"
"""Instead of BACKWARD, where the statistics are known."""
PROFILE = (CALIBRATE, FORWARD, BACKWARD)
"""Those before anything is allocated, of which statistics that were kept save the most."""

SEARCH = "search"
PROPAGATE = "propagate and decompose"
ENCODE = "encode"
WRITE = "write"
REFINE = "refine"
