"""From a completion's text to rewards: parsing, checks, scores. Pure Python, no model in here."""
