"""Work done at once: by several processes of one run, and by the threads of each."""
