"""What the inputs look like: text, tokens, and exact sums over a layer's inputs."""
