"""Pure mathematics: tensors in, tensors out; inputs are never changed."""
