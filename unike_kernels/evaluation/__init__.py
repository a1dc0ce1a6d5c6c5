"""What an edit changed and what it left alone: metrics and their scoring."""
