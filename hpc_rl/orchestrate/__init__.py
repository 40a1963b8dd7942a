"""What a run consists of and what to do next. No scheduler and no machine learning in here."""
