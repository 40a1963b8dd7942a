"""Final weights: brought together, written as Hugging Face folders, verified before they count."""
