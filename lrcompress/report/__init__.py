"""What a user sees: progress, tables, the model card."""
