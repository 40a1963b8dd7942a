"""What is trained on: read strictly, laid out in steps, made into tensors."""
