"""Teachers: asking a model behind an OpenAI-compatible endpoint, once for each question (S2, S3)."""
