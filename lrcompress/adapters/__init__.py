"""What fine-tuning adds: adapters made smaller, and many held together."""
